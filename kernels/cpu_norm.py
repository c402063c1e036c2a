"""What stands before a weight: RMSNorm and the activations' way into byte planes (their layout: see `cpu_gemv`)."""
# pyright: basic

from functools import cache

import numpy as np

from qrun.kernels.cpu_gemv import SPAN
from qrun.kernels.cpu_pool import arg, arg_f32, inline, kernel, more, take
from qrun.kernels.cpu_simd import (
    evens,
    fabs,
    fma,
    fmax,
    load_f32,
    load_f32_first,
    max_lanes,
    odds,
    rint,
    sar_i32,
    set_f32,
    shl_i32,
    splat,
    splat_i32,
    store_f32,
    store_i32_u8,
    sum_lanes,
    to_i32,
)

_f32 = np.float32


@inline
def normalise(x, weight, eps, count, out):
    """out = x / rms(x) · weight, or a copy where there is no weight; zeros up to a multiple of 16."""
    factor = splat(_f32(1))
    if weight != 0:
        total = splat(_f32(0))
        for k in range(0, count, 16):
            v = load_f32_first(x + 4 * k, count - k)
            total = fma(v, v, total)
        factor = splat(_f32(1.0 / np.sqrt(np.float64(sum_lanes(total)) / count + eps)))
    for k in range(0, count, 16):
        v = load_f32_first(x + 4 * k, count - k) * factor
        if weight != 0:
            v = v * load_f32_first(weight + 4 * k, count - k)
        store_f32(out + 4 * k, v)


@inline
def _put(planes, code, v):
    """Sixteen rounded values as hi and lo bytes."""
    i = to_i32(v)
    hi = sar_i32(i + splat_i32(np.int32(128)), 8)
    store_i32_u8(planes + code, hi)
    store_i32_u8(planes + code + 64, i - shl_i32(hi, 8))


@inline
def to_planes(x, count, per, group, limit, planes, scales, sums):
    """x [count, a multiple of 256] -> planes, a scale every 256 (every row if limit is 127), group sums."""
    # No division here: it takes longer than sixteen values do.
    shift = per >> 1
    row_scale = _f32(0)
    if limit == 127:
        row_scale = _top(x, count) / _f32(127)
    left = group
    total = splat(_f32(0))
    for base in range(0, count, SPAN):
        scale = row_scale
        if limit != 127:
            scale = _top(x + 4 * base, SPAN) / _f32(limit)
        set_f32(scales + (base >> 6), scale)
        inverse = splat(_f32(1) / scale)
        for k in range(base, base + SPAN, 16 * per):
            # The bytes that these values belong to: block, then place in it.
            at = planes + ((k >> (6 + shift)) << (7 + shift)) + ((k & ((64 << shift) - 1)) >> shift)
            a = rint(load_f32(x + 4 * k) * inverse)
            if per == 1:
                _put(at, 0, a)
            else:
                b = rint(load_f32(x + 4 * k + 64) * inverse)
                if per == 2:
                    _put(at, 0, evens(a, b))
                    _put(at, 128, odds(a, b))
                else:
                    c = rint(load_f32(x + 4 * k + 128) * inverse)
                    d = rint(load_f32(x + 4 * k + 192) * inverse)
                    e, f = evens(a, b), evens(c, d)
                    g, h = odds(a, b), odds(c, d)
                    _put(at, 0, evens(e, f))
                    _put(at, 128, evens(g, h))
                    _put(at, 256, odds(e, f))
                    _put(at, 384, odds(g, h))
        for k in range(base, base + SPAN, 16):
            total = fma(rint(load_f32(x + 4 * k) * inverse), splat(scale), total)
            left -= 16
            if left == 0:
                set_f32(sums, sum_lanes(total))
                sums += 4
                left = group
                total = splat(_f32(0))
    set_f32(sums, sum_lanes(total))


@inline
def _top(x, count):
    top = splat(_f32(1e-20))
    for k in range(0, count, 16):
        top = fmax(fabs(load_f32(x + 4 * k)), top)
    return max_lanes(top)


@cache
def quantize() -> int:
    """Kernel: rows of x -> (norm) -> planes.

    Arguments: 0 x, 1 its stride in bytes, 2 tokens, 3 K, 4 norm weight or none, 5 eps, 6 per, 7 group, 8 limit (32639
    for 16 bits, 127), 9 planes, 10 their stride, 11 scales, 12 stride, 13 sums (room for all of 17), 14 stride, 15
    scratch of one row a thread, 16 its bytes, 17 K up to a multiple of 256 that covers the weight's blocks.
    """

    @kernel
    def run(a, thread, job):
        count, full = arg(a, 3), arg(a, 17)
        tokens = arg(a, 2)
        s = take(a, job, tokens, 1)
        while s < tokens:
            row = arg(a, 15) + thread * arg(a, 16)
            normalise(arg(a, 0) + s * arg(a, 1), arg(a, 4), arg_f32(a, 5), count, row)
            for k in range((count + 15) // 16 * 16, full, 16):
                store_f32(row + 4 * k, splat(_f32(0)))
            planes, scales, sums = arg(a, 9) + s * arg(a, 10), arg(a, 11) + s * arg(a, 12), arg(a, 13) + s * arg(a, 14)
            to_planes(row, full, arg(a, 6), arg(a, 7), arg(a, 8), planes, scales, sums)
            s = more(a, job, tokens, 1, s)
        return tokens

    return run.address
