"""Codes to the 16-bit floats that a tensor core multiplies, two at a time; each with its twin for the interpreter.

Integers become floats by a mask and an or: the bits of a code below those of a power of two (1024 in fp16, 128 in
BF16) are that number plus the code. The power, and the zero point, are taken off after the dot, from the sum of x.
"""
# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false

from functools import cache

import torch
import triton
import triton.language as tl

MASK_OR = tl.constexpr("{ .reg .b32 t; lop3.b32 t, $2, $3, $4, 0xea; mov.b32 {$0, $1}, t; }")


@triton.jit
def fields(w, BITS: tl.constexpr, DOWN: tl.constexpr, UP: tl.constexpr, HALF: tl.constexpr, ASM: tl.constexpr):
    """int32 words [N, I] -> [N, 2I] of HALF: base + 2^(BITS·UP) · field DOWN + UP, low half-words first."""
    BASE: tl.constexpr = 0x43004300 if tl.bfloat16 == HALF else 0x64006400
    MASK: tl.constexpr = ((1 << BITS) - 1) << (BITS * UP)
    ws = w >> (BITS * DOWN) if DOWN > 0 else w
    if ASM and tl.bfloat16 == HALF:
        low, high = tl.inline_asm_elementwise(
            MASK_OR, "=h,=h,r,n,n", [ws, MASK * 0x10001, BASE], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=1
        )
    elif ASM:
        low, high = tl.inline_asm_elementwise(
            MASK_OR, "=h,=h,r,n,n", [ws, MASK * 0x10001, BASE], (tl.float16, tl.float16), is_pure=True, pack=1
        )
    else:
        t = (ws & (MASK * 0x10001)) | BASE
        low = (t & 0xFFFF).to(tl.int16).to(HALF, bitcast=True)
        high = ((t >> 16) & 0xFFFF).to(tl.int16).to(HALF, bitcast=True)
    return pairs(low, high)


@triton.jit
def pairs(low, high):
    """Two planes' halves [N, I] side by side: [N, 2I]."""
    return tl.join(low, high).reshape(low.shape[0], 2 * low.shape[1])


@triton.jit
def looked_up(w, table, PAIR: tl.constexpr, HALF: tl.constexpr, PTX: tl.constexpr):
    """int32 words [N, I] -> two planes [N, 2I] of HALF: the codebook's values of bytes 2·PAIR and 2·PAIR + 1."""
    if PTX != "":
        # All eight codes of the word at once: what the other call makes again, the compiler merges.
        if tl.bfloat16 == HALF:
            a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
                PTX, "=h,=h,=h,=h,=h,=h,=h,=h,r", [w], is_pure=True, pack=1, dtype=(
                    tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16,
                    tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16,
                ),
            )  # fmt: skip
        else:
            a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
                PTX, "=h,=h,=h,=h,=h,=h,=h,=h,r", [w], is_pure=True, pack=1, dtype=(
                    tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16,
                ),
            )  # fmt: skip
        if PAIR == 0:
            first, second = pairs(a, b), pairs(c, d)
        else:
            first, second = pairs(e, f), pairs(g, h)
    else:
        v = w >> (16 * PAIR)
        first = pairs(tl.load(table + (v & 15)).to(HALF), tl.load(table + ((v >> 4) & 15)).to(HALF))
        second = pairs(tl.load(table + ((v >> 8) & 15)).to(HALF), tl.load(table + ((v >> 12) & 15)).to(HALF))
    return first, second


@triton.jit
def e4m3_words(w, PTX: tl.constexpr):
    """int32 words [N, I] of four e4m3 codes -> bfloat16 [N, 4I]."""
    a, b, c, d = tl.inline_asm_elementwise(
        PTX, "=h,=h,=h,=h,r", [w], (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=1
    )
    both = tl.join(tl.join(a, c), tl.join(b, d))  # [N, I, half of the word, byte of the half]
    return both.reshape(w.shape[0], 4 * w.shape[1])


@cache
def codebook_ptx(values: tuple[float, ...], half: torch.dtype) -> str:
    """The eight codes of a word to 16-bit floats, by byte permutes of a table held in immediates.

    ``prmt`` finds four bytes among eight by three bits each, so a code is looked up in both halves of the table, and a
    third permute takes each byte from the one or the other. Low and high bytes are looked up apart.
    """
    halves = torch.tensor(values).to(half).view(torch.uint8).view(16, 2)
    numbers: list[int] = halves.t().contiguous().view(torch.int32).flatten().tolist()
    words = [f"{n & 0xFFFFFFFF:#x}" for n in numbers]  # low bytes of codes 0-3, 4-7, 8-11, 12-15, then high bytes
    four = (
        f" prmt.b32 x, a, {words[1]}, s; prmt.b32 y, b, {words[3]}, s; prmt.b32 l, x, y, t;"
        f" prmt.b32 x, c, {words[5]}, s; prmt.b32 y, d, {words[7]}, s; prmt.b32 h, x, y, t;"
        " prmt.b32 x, l, h, 0x5140; prmt.b32 y, l, h, 0x7362;"
    )
    return (
        "{ .reg .b32 a, b, c, d, s, t, x, y, l, h;"
        # A zero that the assembler takes for a thread's own keeps the words in registers; as plain constants they would
        # be uniform, and copied before every use.
        " mov.u32 x, %lanemask_lt; shr.u32 x, x, 31;"
        f" add.u32 a, x, {words[0]}; add.u32 b, x, {words[2]}; add.u32 c, x, {words[4]}; add.u32 d, x, {words[6]};"
        " and.b32 s, $8, 0x77777777; shr.b32 t, $8, 1; lop3.b32 t, t, 0x44444444, 0x32103210, 0xea;"
        + four + " mov.b32 {$0, $1}, x; mov.b32 {$2, $3}, y; shr.u32 s, s, 16; shr.u32 t, t, 16;"
        + four + " mov.b32 {$4, $5}, x; mov.b32 {$6, $7}, y; }"
    )  # fmt: skip


E4M3_BF16 = (
    "{ .reg .b32 t, u, m, n; prmt.b32 t, $4, 0, 0x1404; prmt.b32 u, $4, 0, 0x3424;"
    " shr.b32 m, t, 4; and.b32 m, m, 0x07f007f0; lop3.b32 t, t, 0x80008000, m, 0xea;"
    " shr.b32 n, u, 4; and.b32 n, n, 0x07f007f0; lop3.b32 u, u, 0x80008000, n, 0xea;"
    " mov.b32 m, 0x7b807b80; mov.b32 n, 0x80008000;"
    " fma.rn.bf16x2 t, t, m, n; fma.rn.bf16x2 u, u, m, n;"
    " mov.b32 {$0, $1}, t; mov.b32 {$2, $3}, u; }"
)
"""Four e4m3 bytes to BF16: the bits moved into place, then times 2^120, the difference of the exponents' biases."""
