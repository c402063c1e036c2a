"""Number formats by their bits, the same on every GPU and under the interpreter: bfloat16 rounding, e4m3, Hadamard.

The hardware's own conversions differ from card to card (no fp8 type below sm_89) and the interpreter has some of them
wrong; integer arithmetic on the bits is exact everywhere.
"""
# pyright: basic

import triton
import triton.language as tl


@triton.jit
def round_bf16(x):
    """float32 to the nearest bfloat16 (ties to even), still as float32: a store as bfloat16 is then exact."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 to the nearest number of ``dtype``, ties to even."""
    if dtype == tl.bfloat16:
        x = round_bf16(x)
    return x.to(dtype)


@triton.jit
def rint(x):
    """float32 of magnitude below 2^22 to the nearest integer, ties to even."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def e4m3_encode(x):
    """float32 to e4m3fn bits (uint8), to nearest even, saturating at 448."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = tl.minimum(tl.abs(x), 448.0)
    wide = magnitude.to(tl.int32, bitcast=True)
    normal = ((wide + 0x7FFFF + ((wide >> 20) & 1)) >> 20) - 960
    small = rint(magnitude * 512.0).to(tl.int32)  # multiples of 2^-9; 8 of them are the least normal number
    return (tl.where(magnitude < 0.015625, small, normal) | sign).to(tl.uint8)


@triton.jit
def e4m3_decode(code):
    """e4m3fn bits (uint8) to float32."""
    wide = code.to(tl.int32)
    bits = ((wide & 0x80) << 24) | ((wide & 0x7F) << 20)
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120: the difference of the exponents' biases
