"""One token through a weight of floats: BF16 or FP32 rows against float32 activations."""
# pyright: basic

from functools import cache

import numpy as np

from qrun.kernels.cpu_gemv import AHEAD, add_to, silu_pairs
from qrun.kernels.cpu_norm import normalise
from qrun.kernels.cpu_pool import arg, arg_f32, inline, kernel, more, take
from qrun.kernels.cpu_simd import (
    fma,
    load_bf16,
    load_bf16_first,
    load_f32,
    load_f32_first,
    prefetch,
    splat,
    store_four_sums,
)

CHUNK = 16
_f32 = np.float32


@cache
def norm() -> int:
    """Kernel: rows of x through RMSNorm, zero-padded to 16.

    Arguments: 0 x, 1 its stride in bytes, 2 tokens, 3 K, 4 weight or none (a copy), 5 eps, 6 out, 7 its stride.
    """

    @kernel
    def run(a, thread, job):
        tokens = arg(a, 2)
        s = take(a, job, tokens, 1)
        while s < tokens:
            normalise(arg(a, 0) + s * arg(a, 1), arg(a, 4), arg_f32(a, 5), arg(a, 3), arg(a, 6) + s * arg(a, 7))
            s = more(a, job, tokens, 1, s)
        return tokens

    return run.address


@inline
def load_plain(bf16, address):
    if bf16:
        return load_bf16(address)
    return load_f32(address)


@inline
def load_plain_first(bf16, address, count):
    if bf16:
        return load_bf16_first(address, count)
    return load_f32_first(address, count)


@inline
def _row(bf16, w, columns, x):
    """One row's lanes."""
    size = 2 if bf16 else 4
    f = splat(_f32(0))
    e = splat(_f32(0))
    whole = columns // 32 * 32
    for k in range(0, whole, 32):
        at = w + size * k
        prefetch(at + AHEAD)
        f = fma(load_plain(bf16, at), load_f32(x + 4 * k), f)
        e = fma(load_plain(bf16, at + 16 * size), load_f32(x + 4 * k + 64), e)
    for k in range(whole, columns, 16):
        f = fma(load_plain_first(bf16, w + size * k, columns - k), load_f32(x + 4 * k), f)
    return f + e


@inline
def four(bf16, w, columns, x, n0, n1, n2, n3, out):
    """Four rows, one after the other: see `cpu_gemv`."""
    row = (2 if bf16 else 4) * columns
    f0 = _row(bf16, w + n0 * row, columns, x)
    f1 = _row(bf16, w + n1 * row, columns, x)
    f2 = _row(bf16, w + n2 * row, columns, x)
    f3 = _row(bf16, w + n3 * row, columns, x)
    store_four_sums(out, f0, f1, f2, f3)


@inline
def _rows(bf16, a, first, n, stop, last, out):
    w, columns, x = arg(a, 0), arg(a, 1), arg(a, 2)
    for i in range(n, stop, 4):
        four(
            bf16, w, columns, x,
            first + min(i, last), first + min(i + 1, last), first + min(i + 2, last), first + min(i + 3, last),
            out + 4 * i,
        )  # fmt: skip


@cache
def plain(bf16: bool) -> int:
    """Kernel: y = W x.

    Arguments: 0 weight, 1 K, 2 x (zero-padded to 32), 3 rows, 4 out (room for a multiple of 16), 5 bias or none, 6
    residual or none, 7 scratch for silu(gate)·up or none (then 3 is the number of pairs, up rows follow the gate
    rows).
    """

    @kernel
    def run(a, thread, job):
        count, out, bias, residual, scratch = arg(a, 3), arg(a, 4), arg(a, 5), arg(a, 6), arg(a, 7)
        n = take(a, job, count, CHUNK)
        while n < count:
            stop = min(n + CHUNK, count)
            if scratch != 0:
                gate, up = scratch, scratch + 4 * ((count + 15) // 16 * 16)
                _rows(bf16, a, 0, n, stop, count - 1, gate)
                _rows(bf16, a, count, n, stop, count - 1, up)
                if bias != 0:
                    add_to(gate, bias, n, stop - n)
                    add_to(up, bias + 4 * count, n, stop - n)
                silu_pairs(gate + 4 * n, up + 4 * n, out + 4 * n)
            else:
                _rows(bf16, a, 0, n, stop, count - 1, out)
                if bias != 0:
                    add_to(out, bias, n, stop - n)
                if residual != 0:
                    add_to(out, residual, n, stop - n)
            n = more(a, job, count, CHUNK, n)
        return count

    return run.address
