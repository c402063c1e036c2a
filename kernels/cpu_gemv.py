"""One token through an integer weight: y = W x with the codes read in place, at the speed of memory.

Activations come as int16 in two signed byte planes, x = (256·hi + lo)·scale, one scale per 256 values (8-bit
activations: the hi plane is zero), so a product of codes and activations is exact integer arithmetic (two byte dot
products). Codes are unsigned: the zero-point (signed int8 is read as code + 128) comes off at the end as Σ
scale·zero·Σx, one correction a group.

Order of activations: the codes of 64 bytes are one block, `per` codes a byte; plane byte j·64 + i of a block is code
j of byte i.
"""
# pyright: basic

from functools import cache

import numpy as np

from qrun.kernels import cpu_trellis
from qrun.kernels.cpu_pool import arg, arg_f32, inline, kernel, more, take
from qrun.kernels.cpu_simd import (
    and_bytes,
    dot_u8s8,
    exp,
    fdiv,
    fma,
    get_f32,
    load_bf16,
    load_bf16_first,
    load_bytes,
    load_bytes_first,
    load_f32,
    load_f32_first,
    load_i32,
    load_u8_f32,
    load_u8_f32_first,
    permute,
    prefetch,
    shl_i32,
    shr_bytes,
    splat,
    splat_bytes,
    splat_i32,
    store_f32,
    store_four_sums,
    to_f32,
    xor_bytes,
)

SPAN = 256  # activations that share a scale
CHUNK = 32  # rows a thread takes at a time
AHEAD = 1024  # bytes between what is prefetched and what is used
ROW, GROUP, WIDE, TRELLIS = 0, 1, 2, 3
"""What scales there are: float32 of rows; bf16 of groups, with zeros u8; float32 of groups, with minima float32; and
those of `cpu_trellis`, whose codes are looked up besides."""
_f32 = np.float32


def lane_groups(per: int, group: int) -> np.ndarray:
    """int32 [blocks, 16]: which of 16 consecutive groups each lane of a block belongs to."""
    blocks = 16 * group // (64 * per)
    return ((np.arange(blocks)[:, None] * 64 * per + np.arange(16) * 4 * per) // group).astype(np.int32)


@inline
def block(address, left):
    if left >= 64:
        return load_bytes(address)
    return load_bytes_first(address, left)


@inline
def _dot(w, x, per, flip):
    """A block of codes times both planes of activations: i32x16 whose lanes sum 4·per products each."""
    hi = splat_i32(np.int32(0))
    lo = splat_i32(np.int32(0))
    if per == 1:
        u = xor_bytes(w, splat_bytes(flip))
        hi = dot_u8s8(hi, u, load_bytes(x))
        lo = dot_u8s8(lo, u, load_bytes(x + 64))
    else:
        mask = splat_bytes((1 << (8 // per)) - 1)
        for j in range(per):
            u = and_bytes(shr_bytes(w, (8 // per) * j), mask)
            hi = dot_u8s8(hi, u, load_bytes(x + 128 * j))
            lo = dot_u8s8(lo, u, load_bytes(x + 128 * j + 64))
    return to_f32(shl_i32(hi, 8) + lo)


@inline
def silu_pairs(gate, up, out):
    """Sixteen of silu(gate)·up."""
    g = load_f32(gate)
    store_f32(out, fdiv(g, splat(_f32(1)) + exp(splat(_f32(0)) - g)) * load_f32(up))


@inline
def add_to(out, other, n, count):
    """out += other, from n on; out has room for a multiple of 16."""
    for i in range(0, count, 16):
        at = 4 * (n + i)
        store_f32(out + at, load_f32(out + at) + load_f32_first(other + at, count - i))


@inline
def _row_channel(per, a, planes, spans, n):
    """Row n's lanes; codes · x without the row's scale."""
    row, flip = arg(a, 1), arg(a, 11)
    codes = arg(a, 0) + n * row
    f = splat(_f32(0))
    for t in range(arg(a, 2)):
        prefetch(codes + 64 * t + AHEAD)
        s = splat(get_f32(spans + 4 * ((t * per * 64) >> 8)))
        f = fma(_dot(block(codes + 64 * t, row - 64 * t), planes + t * 128 * per, per, flip), s, f)
    return f


@inline
def _zeros(a, row_groups, left):
    table = arg(a, 4)
    if table != 0:
        if left >= 16:
            return load_u8_f32(table + row_groups)
        return load_u8_f32_first(table + row_groups, left)
    return splat(arg_f32(a, 5))


@inline
def _scales(scales, a, n, groups, g, left):
    if scales == WIDE:
        at = arg(a, 3) + 4 * (n * groups + g)
        if left >= 16:
            return load_f32(at)
        return load_f32_first(at, left)
    at = arg(a, 3) + 2 * (n * groups + g)
    if left >= 16:
        return load_bf16(at)
    return load_bf16_first(at, left)


@inline
def _minus(scales, a, s, row_groups, left):
    """What a group's sum of x is multiplied by and then comes off: scale · zero, or as the table has it."""
    table = arg(a, 4)
    if scales == WIDE and table != 0:
        if left >= 16:
            return load_f32(table + 4 * row_groups)
        return load_f32_first(table + 4 * row_groups, left)
    return s * _zeros(a, row_groups, left)


@inline
def _four_grouped(scales, per, a, planes, spans, sums, n0, n1, n2, n3, out):
    """Four rows at once, for the scales' lanes and the activations are the same; each prefetches the row four on."""
    codes, row, blocks = arg(a, 0), arg(a, 1), arg(a, 2)
    groups, lanes, run, flip = arg(a, 9), arg(a, 10), arg(a, 12), arg(a, 11)
    c0, c1, c2, c3 = codes + n0 * row, codes + n1 * row, codes + n2 * row, codes + n3 * row
    f0 = splat(_f32(0))
    f1 = splat(_f32(0))
    f2 = splat(_f32(0))
    f3 = splat(_f32(0))
    z0 = splat(_f32(0))
    z1 = splat(_f32(0))
    z2 = splat(_f32(0))
    z3 = splat(_f32(0))
    t = 0
    for g in range(0, groups, 16):
        left = groups - g
        s0 = _scales(scales, a, n0, groups, g, left)
        s1 = _scales(scales, a, n1, groups, g, left)
        s2 = _scales(scales, a, n2, groups, g, left)
        s3 = _scales(scales, a, n3, groups, g, left)
        total = load_f32(sums + 4 * g)
        z0 = fma(_minus(scales, a, s0, n0 * groups + g, left), total, z0)
        z1 = fma(_minus(scales, a, s1, n1 * groups + g, left), total, z1)
        z2 = fma(_minus(scales, a, s2, n2 * groups + g, left), total, z2)
        z3 = fma(_minus(scales, a, s3, n3 * groups + g, left), total, z3)
        for i in range(min(run, blocks - t)):
            x = planes + t * 128 * per
            s = splat(get_f32(spans + 4 * ((t * per * 64) >> 8)))
            index = load_i32(lanes + 64 * i)
            at = 64 * t
            rest = row - at
            prefetch(c0 + 4 * row + at)
            prefetch(c1 + 4 * row + at)
            prefetch(c2 + 4 * row + at)
            prefetch(c3 + 4 * row + at)
            f0 = fma(_dot(block(c0 + at, rest), x, per, flip), permute(s0, index) * s, f0)
            f1 = fma(_dot(block(c1 + at, rest), x, per, flip), permute(s1, index) * s, f1)
            f2 = fma(_dot(block(c2 + at, rest), x, per, flip), permute(s2, index) * s, f2)
            f3 = fma(_dot(block(c3 + at, rest), x, per, flip), permute(s3, index) * s, f3)
            t += 1
    store_four_sums(out, f0 - z0, f1 - z1, f2 - z2, f3 - z3)


@inline
def _four(per, scales, a, planes, spans, sums, n0, n1, n2, n3, out):
    # Row after row: memory is then read in one stream, which the prefetchers follow even where rows are short.
    if scales != ROW:
        _four_grouped(scales, per, a, planes, spans, sums, n0, n1, n2, n3, out)
    else:
        f0 = _row_channel(per, a, planes, spans, n0)
        f1 = _row_channel(per, a, planes, spans, n1)
        f2 = _row_channel(per, a, planes, spans, n2)
        f3 = _row_channel(per, a, planes, spans, n3)
        store_four_sums(out, f0, f1, f2, f3)


@inline
def rows(per, scales, a, planes, spans, sums, first, n, stop, last, out):
    """Rows first + (n … stop-1) to out, which is written up to a multiple of 16; `last` is the greatest that exists."""
    for i in range(n, stop, 4):
        n0, n1 = first + min(i, last), first + min(i + 1, last)
        n2, n3 = first + min(i + 2, last), first + min(i + 3, last)
        if scales == TRELLIS:
            cpu_trellis.four(a, planes, spans, sums, n0, n1, n2, n3, out + 4 * i)
        else:
            _four(per, scales, a, planes, spans, sums, n0, n1, n2, n3, out + 4 * i)
    if scales == ROW:
        scale = arg(a, 3) + 4 * first
        zero = splat(arg_f32(a, 5) * get_f32(sums))
        for i in range(n, stop, 16):
            store_f32(out + 4 * i, (load_f32(out + 4 * i) - zero) * load_f32_first(scale + 4 * i, last + 1 - i))


@cache
def affine(per: int, scales: int) -> int:
    """The kernel's address for codes of 8 / `per` bits; scales are ROW, GROUP, WIDE or TRELLIS.

    Arguments: 0 codes, 1 bytes a row, 2 blocks, 3 scales, 4 zeros or minima or none, 5 zero (float) where there is no
    table, 6 planes, 7 their scales, 8 group sums of x, 9 groups, 10 lane_groups, 11 bytes' xor (128 for signed codes),
    12 blocks a part of 16 groups, 13 rows, 14 out, 15 bias or none, 16 residual or none, 17 scratch for silu(gate)·up
    or none (then 13 is the number of pairs, up rows follow the gate rows). `out` has room for a multiple of 16.
    """

    @kernel
    def run(a, thread, job):
        planes, spans, sums = arg(a, 6), arg(a, 7), arg(a, 8)
        count, out, bias, residual, scratch = arg(a, 13), arg(a, 14), arg(a, 15), arg(a, 16), arg(a, 17)
        step = CHUNK // 2 if scratch != 0 else CHUNK
        n = take(a, job, count, step)
        while n < count:
            stop = min(n + step, count)
            if scratch != 0:
                gate, up = scratch, scratch + 4 * ((count + 15) // 16 * 16)
                rows(per, scales, a, planes, spans, sums, 0, n, stop, count - 1, gate)
                rows(per, scales, a, planes, spans, sums, count, n, stop, count - 1, up)
                if bias != 0:
                    add_to(gate, bias, n, stop - n)
                    add_to(up, bias + 4 * count, n, stop - n)
                silu_pairs(gate + 4 * n, up + 4 * n, out + 4 * n)
            else:
                rows(per, scales, a, planes, spans, sums, 0, n, stop, count - 1, out)
                if bias != 0:
                    add_to(out, bias, n, stop - n)
                if residual != 0:
                    add_to(out, residual, n, stop - n)
            n = more(a, job, count, step, n)
        return count

    return run.address
