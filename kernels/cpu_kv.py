"""Reading and writing single keys and values in the KV cache's formats, and the Hadamard rotation of the 4-bit one.

Groups of 32 values share a bf16 scale (int8: absmax/127; int4: the signed extreme over -8, after the rotation); fp8
e4m3 has a float32 scale a token and head (absmax/448).
"""
# pyright: basic

import numpy as np

from qrun.kernels.cpu_pool import inline
from qrun.kernels.cpu_simd import (
    and_i32,
    as_f32,
    as_i32,
    bits_of,
    fabs,
    float_of,
    fma,
    fmax,
    get_bf16,
    get_f32,
    load_bf16_first,
    load_f32,
    load_f32_first,
    load_s8_f32,
    load_u8_i32,
    load_u8_i32_first,
    max_lanes,
    set_bf16,
    set_f32,
    set_u8,
    shl_i32,
    shr_i32,
    splat,
    splat_i32,
    store_f32,
    store_f32_first,
    to_f32,
    zip_high,
    zip_low,
)

FP32, BF16, INT8, INT4, FP8 = range(5)
KINDS = {"fp32": FP32, "bf16": BF16, "int8": INT8, "int4": INT4, "fp8": FP8}
_f32 = np.float32
_i32 = np.int32


@inline
def hadamard(x, count):
    """In place, orthonormal, in blocks of 32 floats; its own inverse."""
    for base in range(x, x + 4 * count, 128):
        h = 1
        while h < 32:
            for i in range(0, 32, 2 * h):
                for j in range(base + 4 * i, base + 4 * (i + h), 4):
                    a, b = get_f32(j), get_f32(j + 4 * h)
                    set_f32(j, a + b)
                    set_f32(j + 4 * h, a - b)
            h *= 2
        for j in (base, base + 64):
            store_f32(j, load_f32(j) * splat(_f32(0.17677669529663687)))


@inline
def decode(kind, codes, scale, dim, out):
    """One key or value -> out, zero-padded to a multiple of 32 floats. Int4 stays rotated."""
    if kind == INT8:
        for g in range((dim + 31) // 32):
            s = splat(get_bf16(scale + 2 * g))
            store_f32(out + 128 * g, load_s8_f32(codes + 32 * g) * s)
            store_f32(out + 128 * g + 64, load_s8_f32(codes + 32 * g + 16) * s)
    elif kind == INT4:
        for g in range((dim + 31) // 32):
            s = get_bf16(scale + 2 * g)
            pair = load_u8_i32(codes + 16 * g)
            shift = splat(_f32(-8) * s)
            even = fma(to_f32(and_i32(pair, splat_i32(_i32(15)))), splat(s), shift)
            odd = fma(to_f32(shr_i32(pair, 4)), splat(s), shift)
            store_f32(out + 128 * g, zip_low(even, odd))
            store_f32(out + 128 * g + 64, zip_high(even, odd))
    else:
        for i in range(0, dim, 16):
            if kind == BF16:
                v = load_bf16_first(codes + 2 * i, dim - i)
            elif kind == FP8:
                c = load_u8_i32_first(codes + i, dim - i)
                # e4m3 shares float32's layout up to the exponents' bias: 2^120 makes up for it, subnormals included.
                magnitude = as_f32(shl_i32(and_i32(c, splat_i32(_i32(127))), 20)) * splat(
                    _f32(2.0**120) * get_f32(scale)
                )
                sign = shl_i32(and_i32(c, splat_i32(_i32(128))), 24)
                v = as_f32(sign + as_i32(magnitude))
            else:
                v = load_f32_first(codes + 4 * i, dim - i)
            store_f32(out + 4 * i, v)


@inline
def _top(x, count):
    top = splat(_f32(0))
    for i in range(0, count, 16):
        top = fmax(fabs(load_f32_first(x + 4 * i, count - i)), top)
    return max_lanes(top)


@inline
def _bf16_of(value):
    bits = bits_of(value)
    return float_of((bits + _i32(0x7FFF) + ((bits >> _i32(16)) & _i32(1))) & _i32(-65536))


@inline
def e4m3(value):
    """The code of a float within ±448, to nearest even."""
    bits = bits_of(value)
    sign = (bits >> 24) & 128
    size = abs(value)
    if size < _f32(2.0**-6):
        return sign | np.int64(np.rint(size * _f32(512)))
    magnitude = bits & 0x7FFFFFFF
    rounded = magnitude + 0x7FFFF + ((magnitude >> 20) & 1)
    return sign | min((rounded >> 20) - (120 << 3), 126)


@inline
def encode(kind, x, dim, codes, scale):
    """x, zero-padded to a multiple of 32 floats -> one key or value. Int4 rotates x in place."""
    if kind == INT8:
        for g in range((dim + 31) // 32):
            s = _bf16_of(_top(x + 128 * g, 32) / _f32(127))
            set_bf16(scale + 2 * g, s)
            inverse = _f32(0) if s == _f32(0) else _f32(1) / s
            for i in range(32 * g, 32 * g + 32):
                set_u8(codes + i, np.int64(max(min(np.rint(get_f32(x + 4 * i) * inverse), _f32(127)), _f32(-127))))
    elif kind == INT4:
        hadamard(x, (dim + 31) // 32 * 32)
        for g in range((dim + 31) // 32):
            extreme = _f32(0)
            for i in range(32 * g, 32 * g + 32):
                v = get_f32(x + 4 * i)
                if abs(v) > abs(extreme) or (v == -extreme and v > _f32(0)):
                    extreme = v
            s = _bf16_of(extreme / _f32(-8))
            set_bf16(scale + 2 * g, s)
            inverse = _f32(0) if s == _f32(0) else _f32(1) / s
            for i in range(16 * g, 16 * g + 16):
                low = np.int64(max(min(get_f32(x + 8 * i) * inverse + _f32(8.5), _f32(15)), _f32(0)))
                high = np.int64(max(min(get_f32(x + 8 * i + 4) * inverse + _f32(8.5), _f32(15)), _f32(0)))
                set_u8(codes + i, low + 16 * high)
    elif kind == FP8:
        top = _top(x, dim)
        usable = top > _f32(2e-36)
        set_f32(scale, top / _f32(448) if usable else _f32(1))
        inverse = _f32(448) / top if usable else _f32(1)
        for i in range(dim):
            set_u8(codes + i, e4m3(max(min(get_f32(x + 4 * i) * inverse, _f32(448)), _f32(-448))))
    elif kind == BF16:
        for i in range(dim):
            set_bf16(codes + 2 * i, get_f32(x + 4 * i))
    else:
        for i in range(0, dim, 16):
            store_f32_first(codes + 4 * i, load_f32(x + 4 * i), dim - i)
