"""Reading the GPU's cache where it lies: tiles of positions in any of its formats, to what tensor cores multiply.

It does not know what becomes of the tiles.
"""
# pyright: basic

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Side:
    """codes [kv_heads, capacity, …] and scale [kv_heads, capacity, …] or none, last dimensions contiguous.

    ``kind``: "bf16", "fp32", "int8" (bf16 scale per 32), "int4" (the same, rotated by the 32-Hadamard, two codes to a
    byte) or "fp8" (e4m3, or its bytes as uint8; one float32 scale a vector).
    """

    kind: str
    codes: Tensor
    scale: Tensor | None = None


def padded(dim: int) -> int:
    """A head's width in whole groups."""
    return -(-dim // 32) * 32


def power_of_two(size: int) -> int:
    """The least one that is no smaller than ``size``."""
    return 1 << (size - 1).bit_length()


@triton.jit
def load_tile(base, rows, stop, WIDTH: tl.constexpr, COLS: tl.constexpr, MASKED: tl.constexpr, T: tl.constexpr):
    """[rows, COLS], or its transpose, of a contiguous matrix [..., WIDTH].

    Zero from column WIDTH and, if MASKED, from row ``stop`` on.
    """
    d = tl.arange(0, COLS)
    if T:
        n = rows[None, :]
        d = d[:, None]
    else:
        n = rows[:, None]
        d = d[None, :]
    at = base + n * WIDTH + d
    if MASKED:
        if WIDTH < COLS:
            x = tl.load(at, mask=(n < stop) & (d < WIDTH), other=0)
        else:
            x = tl.load(at, mask=n < stop, other=0)
    elif WIDTH < COLS:
        x = tl.load(at, mask=d < WIDTH, other=0)
    else:
        x = tl.load(at)
    return x


@triton.constexpr_function
def codes_width(kind, dim):
    """Elements of one position's codes as :func:`packed` gives them."""
    words = {"int8": -(-dim // 32) * 8, "int4": -(-dim // 32) * 4, "fp8": dim if dim % 4 else dim // 4}
    return words.get(kind, dim)


@triton.constexpr_function
def scale_width(kind, dim):
    """Scales of one position; 0 where the format has none."""
    return {"int8": -(-dim // 32), "int4": -(-dim // 32), "fp8": 1}.get(kind, 0)


@triton.jit
def field(word, mask: tl.constexpr, exponent: tl.constexpr, ASM: tl.constexpr):
    """The bits under the mask, of weight 1 at bit 23 - exponent, as the float32 2^exponent + them."""
    magic: tl.constexpr = (127 + exponent) << 23
    if ASM:  # one instruction, which the compiler makes two
        word = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xea;", "=r,r,n,n", [word, mask, magic], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        word = (word & mask) | magic
    return word.to(tl.float32, bitcast=True)


@triton.jit
def e4m3_top(word):
    """The e4m3 code in the highest byte as float32."""
    return ((word >> 4) & -0x78100000).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120: the biases apart


@triton.jit
def each_word(s, PER: tl.constexpr, T: tl.constexpr):
    """A group's scale [BN, GB] for each of its PER words: [BN, GB·PER]; or both transposed."""
    if T:
        s = tl.reshape(tl.broadcast_to(s[:, None, :], (s.shape[0], PER, s.shape[1])), (s.shape[0] * PER, s.shape[1]))
    else:
        s = tl.reshape(tl.broadcast_to(s[:, :, None], (s.shape[0], s.shape[1], PER)), (s.shape[0], s.shape[1] * PER))
    return s


@triton.jit
def read(
    codes,
    scale,
    rows,
    stop,
    KIND: tl.constexpr,
    DIM: tl.constexpr,
    DB: tl.constexpr,
    OP: tl.constexpr,
    MASKED: tl.constexpr,
    T: tl.constexpr,
    ASM: tl.constexpr,
):
    """Positions ``rows`` of one head as [BN, DB], or its transpose, in OP; int4 still rotated, fp8 without its scale.

    Integer codes come as words. A code is masked into the mantissa of a float32 power of two; one multiplication and
    addition, exact with these exponents, takes that off again and applies the scale.
    """
    BN: tl.constexpr = rows.shape[0]
    DP: tl.constexpr = (DIM + 31) // 32 * 32
    if KIND == "bf16" or KIND == "fp32":
        x = load_tile(codes, rows, stop, DIM, DB, MASKED, T)
        if x.dtype != OP:
            x = x.to(tl.float32).to(OP)
    elif KIND == "fp8":
        if DIM % 4 == 0:
            w = load_tile(codes, rows, stop, DIM // 4, DB // 4, MASKED, T)
            x = tl.join(tl.join(e4m3_top(w << 24), e4m3_top(w << 8)), tl.join(e4m3_top(w << 16), e4m3_top(w)))
            if T:
                x = tl.permute(x, (0, 2, 3, 1))
            x = tl.reshape(x, (DB, BN) if T else (BN, DB)).to(OP)
        else:
            x = e4m3_top(load_tile(codes, rows, stop, DIM, DB, MASKED, T).to(tl.int32) << 24).to(OP)
    else:
        s = load_tile(scale, rows, stop, DP // 32, DB // 32, MASKED, T).to(tl.float32)
        if KIND == "int8":
            w = load_tile(codes, rows, stop, DP // 4, DB // 4, MASKED, T) ^ -0x7F7F7F80
            s = each_word(s, 8, T)
            zero = s * 32896.0  # 2^15 + 128
            b0 = field(w << 8, 0xFF00, 15, ASM) * s - zero
            b1 = field(w, 0xFF00, 15, ASM) * s - zero
            b2 = field(w >> 8, 0xFF00, 15, ASM) * s - zero
            b3 = field(w >> 16, 0xFF00, 15, ASM) * s - zero
            x = tl.join(tl.join(b0, b2), tl.join(b1, b3))
            if T:
                x = tl.permute(x, (0, 2, 3, 1))
        else:
            tl.static_assert(KIND == "int4")
            w = load_tile(codes, rows, stop, DP // 8, DB // 8, MASKED, T)
            s = each_word(s, 4, T)
            z15 = s * 32776.0  # 2^15 + 8, and so on
            z11 = s * 2056.0
            z7 = s * 136.0
            n0 = field(w << 8, 0xF00, 15, ASM) * s - z15
            n1 = field(w << 8, 0xF000, 11, ASM) * s - z11
            n2 = field(w, 0xF00, 15, ASM) * s - z15
            n3 = field(w, 0xF000, 11, ASM) * s - z11
            n4 = field(w, 0xF0000, 7, ASM) * s - z7
            n5 = field(w >> 12, 0xF00, 15, ASM) * s - z15
            n6 = field(w >> 12, 0xF000, 11, ASM) * s - z11
            n7 = field(w >> 12, 0xF0000, 7, ASM) * s - z7
            even = tl.join(tl.join(n0, n4), tl.join(n2, n6))
            x = tl.join(even, tl.join(tl.join(n1, n5), tl.join(n3, n7)))
            if T:
                x = tl.permute(x, (0, 2, 3, 4, 1))
        x = tl.reshape(x, (DB, BN) if T else (BN, DB)).to(OP)
    return x


def packed(side: Side) -> tuple[Tensor, Tensor]:
    """Codes and scale as attention reads them: codes as int32 words, or fp8 of odd widths as bytes."""
    assert side.codes.is_contiguous() and (side.scale is None or side.scale.is_contiguous())
    codes = side.codes
    if side.scale is not None:
        codes = codes.view(torch.int32 if codes.shape[2] % 4 == 0 else torch.uint8)
    return codes, codes if side.scale is None else side.scale


POINTERS = {
    "bf16": ("*bf16", "*bf16"),
    "fp32": ("*fp32", "*fp32"),
    "int8": ("*i32", "*bf16"),
    "int4": ("*i32", "*bf16"),
    "fp8": ("*i32", "*fp32"),
}
"""The Triton types of :func:`packed`."""


def side_types(k: str, v: str) -> dict[str, str]:
    types = {}
    for letter, kind in (("k", k), ("v", v)):
        types |= {f"{letter}_{part}": pointer for part, pointer in zip(("codes", "scale"), POINTERS[kind], strict=True)}
    return types
