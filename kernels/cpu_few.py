"""A few tokens through a weight whose codes are read in place, as `cpu_gemv` does it for one.

Where scales are of whole rows, each block is unpacked for four tokens; where they are of groups, 64 rows stay in the
cache while the tokens pass one by one. The kernels take the arguments of those for many tokens, `cpu_gemm` and
`cpu_gemm_plain`, whose unpacking only pays where more tokens share it.
"""
# pyright: basic

from functools import cache

import numpy as np
from llvmlite import ir
from numba import types

from qrun.kernels.cpu_gemm import finish, source_row
from qrun.kernels.cpu_gemv import AHEAD, SPAN, block
from qrun.kernels.cpu_gemv import rows as gemv_rows
from qrun.kernels.cpu_plain import load_plain, load_plain_first
from qrun.kernels.cpu_pool import arg, arg_f32, inline, kernel, more, take
from qrun.kernels.cpu_simd import (
    _B,
    _F,
    _F32,
    _I,
    VNNI,
    F32x16,
    I8x64,
    I32x16,
    _call,
    _dot_portable,
    _load,
    _op,
    _splat,
    and_bytes,
    get_f32,
    load_f32,
    load_f32_first,
    prefetch,
    shr_bytes,
    splat,
    splat_bytes,
    store_f32,
    store_four_sums,
    xor_bytes,
)
from qrun.kernels.cpu_tile import WIDTH

FEW = 8
"""More tokens are better served by unpacking the weight."""
FEW_GROUPED = 5
"""The same where scales are of groups."""
TOKENS = 4
Ints = types.UniTuple(I32x16, TOKENS)
Floats = types.UniTuple(F32x16, TOKENS)
_INTS, _FLOATS = ir.ArrayType(_I, TOKENS), ir.ArrayType(_F, TOKENS)
_I64 = types.int64
_f32 = np.float32


def _each(builder, tile, kind, address, stride, combine):
    """combine(a token's cell, its address) for the four tokens."""
    out = ir.Constant(kind, ir.Undefined)
    for i in range(TOKENS):
        out = builder.insert_value(out, combine(builder.extract_value(tile, i), address), i)
        address = builder.add(address, stride)
    return out


@_op(Ints)
def zero_ints(b):
    return ir.Constant(_INTS, None)


@_op(Floats)
def zero_floats(b):
    return ir.Constant(_FLOATS, None)


@_op(Ints, Ints, I8x64, _I64, _I64)
def dot_tokens(b, tile, codes, x, stride):
    """tile += 64 unsigned codes times 64 signed bytes x of each token."""

    def combine(cell, token):
        signed = _load(b, token, _B)
        if VNNI:
            return _call(b, "llvm.x86.avx512.vpdpbusd.512", _I, cell, b.bitcast(codes, _I), b.bitcast(signed, _I))
        return _dot_portable(b, cell, codes, signed)

    return _each(b, tile, _INTS, x, stride, combine)


@_op(Ints, Ints)
def shift_tokens(b, tile):
    """Times 256."""
    zero = ir.Constant(ir.IntType(64), 0)
    return _each(b, tile, _INTS, zero, zero, lambda cell, _: b.shl(cell, ir.Constant(_I, [8] * 16)))


@_op(Floats, Floats, Ints, _I64, _I64)
def add_tokens(b, sums, tile, x_scales, stride):
    """sums + tile · each token's scale."""
    out = ir.Constant(_FLOATS, ir.Undefined)
    for i in range(TOKENS):
        factor = _splat(b, _load(b, x_scales, _F32, 4), _F)
        cell = b.sitofp(b.extract_value(tile, i), _F)
        out = b.insert_value(out, _call(b, "llvm.fma.v16f32", _F, cell, factor, b.extract_value(sums, i)), i)
        x_scales = b.add(x_scales, stride)
    return out


@_op(Floats, Floats, F32x16, _I64, _I64)
def fma_tokens(b, sums, weight, x, stride):
    """sums + weight [16] · x [16] of each token."""
    return _each(
        b, sums, _FLOATS, x, stride,
        lambda cell, token: _call(b, "llvm.fma.v16f32", _F, weight, _load(b, token, _F, 4), cell),
    )  # fmt: skip


@inline
def _codes(per, w, j, flip):
    if per == 1:
        return xor_bytes(w, splat_bytes(flip))
    return and_bytes(shr_bytes(w, (8 // per) * j), splat_bytes((1 << (8 // per)) - 1))


@inline
def _dots(per, planes, codes, left, count, x, stride, flip):
    """`count` blocks of a row times both planes of four tokens; `left` bytes belong to each."""
    tile = zero_ints()
    if planes == 2:
        for t in range(count):
            for j in range(per):
                u = _codes(per, block(codes + 64 * t, left), j, flip)
                tile = dot_tokens(tile, u, x + 128 * (t * per + j), stride)
        tile = shift_tokens(tile)
    for t in range(count):
        for j in range(per):
            u = _codes(per, block(codes + 64 * t, left), j, flip)
            tile = dot_tokens(tile, u, x + 128 * (t * per + j) + 64, stride)
    return tile


@inline
def _store(out, f0, f1, f2, f3):
    """Sums of four rows and four tokens -> [tokens][64]."""
    store_four_sums(out, f0[0], f1[0], f2[0], f3[0])
    store_four_sums(out + 4 * WIDTH, f0[1], f1[1], f2[1], f3[1])
    store_four_sums(out + 8 * WIDTH, f0[2], f1[2], f2[2], f3[2])
    store_four_sums(out + 12 * WIDTH, f0[3], f1[3], f2[3], f3[3])


@inline
def _four(per, planes, a, s, n0, n1, n2, n3, out):
    """Four rows and the four tokens from s on, without the rows' scales."""
    codes, row, blocks, flip = arg(a, 0), arg(a, 1), arg(a, 2), arg(a, 14)
    stride, span_stride = arg(a, 7), arg(a, 9)
    planes_at, spans = arg(a, 6) + s * stride, arg(a, 8) + s * span_stride
    c0, c1, c2, c3 = codes + n0 * row, codes + n1 * row, codes + n2 * row, codes + n3 * row
    f0 = zero_floats()
    f1 = zero_floats()
    f2 = zero_floats()
    f3 = zero_floats()
    each = SPAN // (64 * per)
    whole = row // (64 * each) * each
    for t in range(0, whole, each):
        x, span, at = planes_at + t * 128 * per, spans + 4 * (t // each), 64 * t
        for i in range(0, 64 * each, 64):
            prefetch(c0 + 4 * row + at + i)
            prefetch(c1 + 4 * row + at + i)
            prefetch(c2 + 4 * row + at + i)
            prefetch(c3 + 4 * row + at + i)
        d0 = _dots(per, planes, c0 + at, 64, each, x, stride, flip)
        f0 = add_tokens(f0, d0, span, span_stride)
        d1 = _dots(per, planes, c1 + at, 64, each, x, stride, flip)
        f1 = add_tokens(f1, d1, span, span_stride)
        d2 = _dots(per, planes, c2 + at, 64, each, x, stride, flip)
        f2 = add_tokens(f2, d2, span, span_stride)
        d3 = _dots(per, planes, c3 + at, 64, each, x, stride, flip)
        f3 = add_tokens(f3, d3, span, span_stride)
    for t in range(whole, blocks):
        x, span, at = planes_at + t * 128 * per, spans + 4 * (t // each), 64 * t
        f0 = add_tokens(f0, _dots(per, planes, c0 + at, row - at, 1, x, stride, flip), span, span_stride)
        f1 = add_tokens(f1, _dots(per, planes, c1 + at, row - at, 1, x, stride, flip), span, span_stride)
        f2 = add_tokens(f2, _dots(per, planes, c2 + at, row - at, 1, x, stride, flip), span, span_stride)
        f3 = add_tokens(f3, _dots(per, planes, c3 + at, row - at, 1, x, stride, flip), span, span_stride)
    _store(out, f0, f1, f2, f3)


@inline
def _scale_rows(a, first, tokens, sums):
    """(sums [tokens][64] - zero · Σx) times each row's scale."""
    count, pairs, half = arg(a, 15), arg(a, 21), WIDTH // 2
    for c in range(0, WIDTH, 16):
        row = first + c
        left = count - row
        if pairs != 0 and c >= half:
            left += half
            row += count - half
        scale = load_f32_first(arg(a, 3) + 4 * row, left)
        for s in range(tokens):
            at = sums + 4 * (WIDTH * s + c)
            zero = splat(arg_f32(a, 5) * get_f32(arg(a, 10) + s * arg(a, 11)))
            store_f32(at, (load_f32(at) - zero) * scale)


@cache
def affine(per: int, planes: int) -> int:
    """The kernel's address for a weight with a scale every row. Arguments are those of `cpu_gemm.affine`; activations
    have rows up to a multiple of 4, and there are at most `FEW` tokens."""

    @kernel
    def run(a, thread, job):
        sums = arg(a, 22) + thread * arg(a, 23)
        count, tokens, pairs, stride = arg(a, 15), arg(a, 16), arg(a, 21), arg(a, 18)
        step = WIDTH // 2 if pairs != 0 else WIDTH
        first = take(a, job, count, step)
        while first < count:
            for c in range(0, WIDTH, 4):
                n0, n1 = source_row(c, first, count, pairs), source_row(c + 1, first, count, pairs)
                n2, n3 = source_row(c + 2, first, count, pairs), source_row(c + 3, first, count, pairs)
                for s in range(0, tokens, TOKENS):
                    _four(per, planes, a, s, n0, n1, n2, n3, sums + 4 * (WIDTH * s + c))
            _scale_rows(a, first, tokens, sums)
            finish(sums, tokens, first, count, arg(a, 17), stride, arg(a, 19), arg(a, 20), pairs)
            first = more(a, job, count, step, first)
        return count

    return run.address


@cache
def grouped(per: int, scales: int) -> int:
    """The kernel's address for a weight with a scale every group. Arguments are those of `cpu_gemm.affine`, and from 26
    on those of `cpu_gemv.affine` up to 12."""

    @kernel
    def run(a, thread, job):
        sums = arg(a, 22) + thread * arg(a, 23)
        count, tokens, pairs, stride = arg(a, 15), arg(a, 16), arg(a, 21), arg(a, 18)
        step = WIDTH // 2 if pairs != 0 else WIDTH
        first = take(a, job, count, step)
        while first < count:
            stop = min(first + step, count)
            for s in range(tokens):
                planes, spans = arg(a, 6) + s * arg(a, 7), arg(a, 8) + s * arg(a, 9)
                totals, out = arg(a, 10) + s * arg(a, 11), sums + 4 * (WIDTH * s - first)
                gemv_rows(per, scales, a + 8 * 26, planes, spans, totals, 0, first, stop, count - 1, out)
                if pairs != 0:
                    out += 4 * (WIDTH // 2)
                    gemv_rows(per, scales, a + 8 * 26, planes, spans, totals, count, first, stop, count - 1, out)
            finish(sums, tokens, first, count, arg(a, 17), stride, arg(a, 19), arg(a, 20), pairs)
            first = more(a, job, count, step, first)
        return count

    return run.address


@inline
def _plain(bf16, columns, stride, x, w0, w1, w2, w3, out):
    size = 2 if bf16 else 4
    f0 = zero_floats()
    f1 = zero_floats()
    f2 = zero_floats()
    f3 = zero_floats()
    whole = columns // 16 * 16
    for k in range(0, whole, 16):
        at, v = size * k, x + 4 * k
        prefetch(w0 + at + AHEAD)
        prefetch(w1 + at + AHEAD)
        prefetch(w2 + at + AHEAD)
        prefetch(w3 + at + AHEAD)
        f0 = fma_tokens(f0, load_plain(bf16, w0 + at), v, stride)
        f1 = fma_tokens(f1, load_plain(bf16, w1 + at), v, stride)
        f2 = fma_tokens(f2, load_plain(bf16, w2 + at), v, stride)
        f3 = fma_tokens(f3, load_plain(bf16, w3 + at), v, stride)
    if whole < columns:
        at, v, left = size * whole, x + 4 * whole, columns - whole
        f0 = fma_tokens(f0, load_plain_first(bf16, w0 + at, left), v, stride)
        f1 = fma_tokens(f1, load_plain_first(bf16, w1 + at, left), v, stride)
        f2 = fma_tokens(f2, load_plain_first(bf16, w2 + at, left), v, stride)
        f3 = fma_tokens(f3, load_plain_first(bf16, w3 + at, left), v, stride)
    _store(out, f0, f1, f2, f3)


@cache
def plain(bf16: bool) -> int:
    """The kernel's address; arguments are those of `cpu_gemm_plain.plain`, as above."""

    @kernel
    def run(a, thread, job):
        sums = arg(a, 11) + thread * arg(a, 12)
        count, tokens, pairs, columns = arg(a, 4), arg(a, 5), arg(a, 10), arg(a, 1)
        row = (2 if bf16 else 4) * columns
        step = WIDTH // 2 if pairs != 0 else WIDTH
        first = take(a, job, count, step)
        while first < count:
            for c in range(0, WIDTH, 4):
                w0 = arg(a, 0) + row * source_row(c, first, count, pairs)
                w1 = arg(a, 0) + row * source_row(c + 1, first, count, pairs)
                w2 = arg(a, 0) + row * source_row(c + 2, first, count, pairs)
                w3 = arg(a, 0) + row * source_row(c + 3, first, count, pairs)
                for s in range(0, tokens, TOKENS):
                    x = arg(a, 2) + s * arg(a, 3)
                    _plain(bf16, columns, arg(a, 3), x, w0, w1, w2, w3, sums + 4 * (WIDTH * s + c))
            finish(sums, tokens, first, count, arg(a, 6), arg(a, 7), arg(a, 8), arg(a, 9), pairs)
            first = more(a, job, count, step, first)
        return count

    return run.address
