"""Many tokens through an integer weight: the arithmetic of `cpu_gemv`, 64 outputs at a time.

A thread unpacks 64 rows of codes once into bytes (four k by four k) and runs all tokens through them: both planes of
activations accumulate in integers over the codes that share a scale, and only these sums become floats.
"""
# pyright: basic

from functools import cache

import numpy as np

from qrun.kernels import cpu_trellis
from qrun.kernels.cpu_gemv import GROUP, ROW, SPAN, TRELLIS, WIDE, block
from qrun.kernels.cpu_pool import arg, arg_f32, inline, kernel, more, take
from qrun.kernels.cpu_simd import (
    and_bytes,
    bytes_as_i32,
    exp,
    fdiv,
    get_bf16,
    get_f32,
    get_u8,
    load_bytes,
    load_f32,
    prefetch,
    set_f32,
    shr_bytes,
    splat,
    splat_bytes,
    store_f32,
    store_f32_first,
    store_i32,
    xor_bytes,
)
from qrun.kernels.cpu_tile import (
    TOKENS,
    WIDTH,
    tile_dot,
    tile_flush,
    tile_flush_tokens,
    tile_fma,
    tile_shift,
    tile_store,
    transpose,
    zero_floats,
    zero_ints,
)

TABLE = 36
"""Where a trellis' table is: among the arguments of `cpu_gemv`, which follow."""
BATCH = 96  # tokens whose sums stay in the cache: a multiple of TOKENS
_f32 = np.float32


def scratch_size(blocks: int, per: int, groups: int) -> int:
    """Bytes of scratch a thread needs, a multiple of 64."""
    return blocks * 64 * per * WIDTH + 8 * groups * WIDTH + 4 * BATCH * WIDTH + 1024


@inline
def source_row(column, first, count, pairs):
    """The weight's row behind column `column` of the tile at output `first`; pairs: 32 gate rows, then their up
    rows."""
    if pairs != 0:
        half = WIDTH // 2
        if column < half:
            return min(first + column, count - 1)
        return count + min(first + column - half, count - 1)
    return min(first + column, count - 1)


@inline
def finish(sums, tokens, first, count, out, stride, bias, residual, pairs):
    """Sums [tokens][64] -> out, with bias, residual or silu(gate)·up."""
    half = WIDTH // 2
    for s in range(tokens):
        row = sums + 4 * WIDTH * s
        if bias != 0:
            for c in range(WIDTH):
                add = get_f32(bias + 4 * source_row(c, first, count, pairs))
                set_f32(row + 4 * c, get_f32(row + 4 * c) + add)
        place = out + s * stride + 4 * first
        if pairs != 0:
            for c in range(0, min(half, count - first), 16):
                gate, up = load_f32(row + 4 * c), load_f32(row + 4 * (c + half))
                value = fdiv(gate, splat(_f32(1)) + exp(splat(_f32(0)) - gate)) * up
                store_f32_first(place + 4 * c, value, count - first - c)
        else:
            if residual != 0:
                other = residual + s * stride + 4 * first
                for c in range(min(WIDTH, count - first)):
                    set_f32(row + 4 * c, get_f32(row + 4 * c) + get_f32(other + 4 * c))
            for c in range(0, min(WIDTH, count - first), 16):
                store_f32_first(place + 4 * c, load_f32(row + 4 * c), count - first - c)


@inline
def _unpack(per, scales, a, first, packed, temp):
    codes, row, blocks, flip = arg(a, 0), arg(a, 1), arg(a, 2), arg(a, 14)
    count, pairs = arg(a, 15), arg(a, 21)
    mask = splat_bytes((1 << (8 // per)) - 1)
    for corner in range(0, WIDTH, 16):
        for t in range(blocks):
            for j in range(per):
                for c in range(16):
                    source = codes + source_row(corner + c, first, count, pairs) * row + 64 * t
                    prefetch(source + 16 * row)
                    w = block(source, row - 64 * t)
                    if scales == TRELLIS:
                        w = cpu_trellis.plane(source, row - 64 * t, j, load_bytes(arg(a, TABLE)))
                    elif per == 1:
                        w = xor_bytes(w, splat_bytes(flip))
                    else:
                        w = and_bytes(shr_bytes(w, (8 // per) * j), mask)
                    store_i32(temp + 64 * c, bytes_as_i32(w))
                transpose(temp, 64, packed + (t * per + j) * 64 * WIDTH + 4 * corner, 4 * WIDTH)


@inline
def _scales(scales, a, first, scale, minus):
    """[groups][64] scales, and minus scale·zero or the minimum."""
    groups, count, pairs, zeros = arg(a, 12), arg(a, 15), arg(a, 21), arg(a, 4)
    for c in range(WIDTH):
        row = source_row(c, first, count, pairs)
        for g in range(groups):
            at = 4 * (g * WIDTH + c)
            if scales == WIDE:
                s = get_f32(arg(a, 3) + 4 * (row * groups + g))
                set_f32(scale + at, s)
                if zeros != 0:
                    set_f32(minus + at, -get_f32(zeros + 4 * (row * groups + g)))
                else:
                    set_f32(minus + at, -s * arg_f32(a, 5))
            elif scales == TRELLIS:
                s = cpu_trellis.step(a, row, g) * get_bf16(zeros + 2 * row)
                set_f32(scale + at, s)
                set_f32(minus + at, -s * arg_f32(a, 5))
            elif scales == GROUP:
                s = get_bf16(arg(a, 3) + 2 * (row * groups + g))
                z = _f32(get_u8(zeros + row * groups + g)) if zeros != 0 else arg_f32(a, 5)
                set_f32(scale + at, s)
                set_f32(minus + at, -s * z)
            else:
                set_f32(scale + at, get_f32(arg(a, 3) + 4 * row))
                set_f32(minus + at, -arg_f32(a, 5))


@inline
def _segment(per, planes, x, stride, packed, t0, t1, q0, q1):
    tile = zero_ints()
    if planes == 2:
        for t in range(t0, t1):
            for j in range(per):
                w = packed + (t * per + j) * 64 * WIDTH
                for q in range(q0, q1):
                    tile = tile_dot(tile, w + 4 * WIDTH * q, x + (t * per + j) * 128 + 4 * q, stride)
        tile = tile_shift(tile)
    for t in range(t0, t1):
        for j in range(per):
            w = packed + (t * per + j) * 64 * WIDTH
            for q in range(q0, q1):
                tile = tile_dot(tile, w + 4 * WIDTH * q, x + (t * per + j) * 128 + 64 + 4 * q, stride)
    return tile


@inline
def _batch(per, scales, planes, a, tokens, s0, packed, scale, minus, sums):
    x, stride = arg(a, 6) + s0 * arg(a, 7), arg(a, 7)
    spans, span_stride = arg(a, 8) + s0 * arg(a, 9), arg(a, 9)
    blocks, group, unit = arg(a, 2), arg(a, 13), arg(a, 24)
    for i in range(0, tokens, TOKENS):
        tile = zero_floats()
        for g in range(arg(a, 12)):
            tile = tile_fma(tile, minus + 4 * g * WIDTH, arg(a, 10) + (s0 + i) * arg(a, 11) + 4 * g, arg(a, 11))
        tile_store(sums + 4 * WIDTH * i, tile)
    if scales != ROW:
        quads = unit // (4 * per)
        for t in range(blocks):
            for u in range(16 // quads):
                factors = scale + 4 * WIDTH * ((t * 64 * per + u * unit) // group)
                span = spans + 4 * (t * per * 64 // SPAN)
                for i in range(0, tokens, TOKENS):
                    tile = _segment(per, planes, x + i * stride, stride, packed, t, t + 1, u * quads, (u + 1) * quads)
                    tile_flush(tile, sums + 4 * WIDTH * i, factors, span + i * span_stride, span_stride)
    else:
        each = SPAN // (64 * per)
        for t in range(0, blocks, each):
            span = spans + 4 * (t // each)
            for i in range(0, tokens, TOKENS):
                tile = _segment(per, planes, x + i * stride, stride, packed, t, min(t + each, blocks), 0, 16)
                tile_flush_tokens(tile, sums + 4 * WIDTH * i, span + i * span_stride, span_stride)
        for s in range(tokens):
            for c in range(0, WIDTH, 16):
                at = sums + 4 * (s * WIDTH + c)
                store_f32(at, load_f32(at) * load_f32(scale + 4 * c))


@cache
def affine(per: int, scales: int, planes: int) -> int:
    """The kernel's address; `planes` 1 for 8-bit activations.

    Arguments: 0 codes, 1 bytes a row, 2 blocks, 3 scales, 4 zeros or none, 5 zero, 6 planes, 7 stride, 8 their
    scales, 9 stride, 10 group sums, 11 stride, 12 groups, 13 group, 14 bytes' xor, 15 outputs (or pairs), 16 tokens,
    17 out, 18 stride, 19 bias, 20 residual (out's stride) or none, 21 whether pairs, 22 scratch, 23 its bytes a
    thread, 24 codes a segment. Activations have rows up to a multiple of 6.
    """

    @kernel
    def run(a, thread, job):
        scratch = arg(a, 22) + thread * arg(a, 23)
        packed = scratch
        scale = packed + arg(a, 2) * 64 * per * WIDTH
        minus = scale + 4 * arg(a, 12) * WIDTH
        sums = minus + 4 * arg(a, 12) * WIDTH
        temp = sums + 4 * BATCH * WIDTH
        count, total, pairs, stride = arg(a, 15), arg(a, 16), arg(a, 21), arg(a, 18)
        step = WIDTH // 2 if pairs != 0 else WIDTH
        first = take(a, job, count, step)
        while first < count:
            _unpack(per, scales, a, first, packed, temp)
            _scales(scales, a, first, scale, minus)
            for s0 in range(0, total, BATCH):
                tokens = min(BATCH, total - s0)
                _batch(per, scales, planes, a, tokens, s0, packed, scale, minus, sums)
                residual = arg(a, 20) + s0 * stride if arg(a, 20) != 0 else 0
                finish(sums, tokens, first, count, arg(a, 17) + s0 * stride, stride, arg(a, 19), residual, pairs)
            first = more(a, job, count, step, first)
        return count

    return run.address
