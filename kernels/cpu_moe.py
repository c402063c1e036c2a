"""A few tokens through the chosen experts of a stacked weight [E, N, K]: expert e's rows begin at row e·N.

A slot is a token at an expert. Slots come in the order of their experts, so that what one reads the next finds in the
cache.
"""
# pyright: basic

from functools import cache

import numpy as np

from qrun.kernels import cpu_gemv, cpu_plain
from qrun.kernels.cpu_gemv import silu_pairs
from qrun.kernels.cpu_pool import arg, arg_f32, inline, kernel, more, take
from qrun.kernels.cpu_simd import get_f32, get_i64, set_f32, set_i64

BF16, FP32 = 16, 32
CHUNK = 16
_f32 = np.float32


@inline
def _rows(per, scales, a, place, first, n, stop, last, out):
    """Rows n … stop-1 of a weight as `cpu_gemv` (per 1, 2, 4) or `cpu_plain` (BF16, FP32) take them, for the
    activations in a place."""
    if per >= BF16:
        w, columns, x = arg(a, 0), arg(a, 1), arg(a, 2) + place * arg(a, 24)
        for i in range(n, stop, 4):
            n0, n1 = first + min(i, last), first + min(i + 1, last)
            cpu_plain.four(
                per == BF16, w, columns, x, n0, n1, first + min(i + 2, last), first + min(i + 3, last), out + 4 * i
            )
    else:
        planes, spans, sums = (
            arg(a, 6) + place * arg(a, 24),
            arg(a, 7) + place * arg(a, 25),
            arg(a, 8) + place * arg(a, 26),
        )
        cpu_gemv.rows(per, scales, a, planes, spans, sums, first, n, stop, last, out)


@cache
def route() -> int:
    """Kernel: router logits -> the chosen experts and their weights (the arithmetic of `reference.route`).

    Arguments: 0 logits [E] (overwritten), 1 E, 2 correction [E] or none, 3 k, 4 whether to normalise, 5 least sum, 6
    experts int64 [k], 7 weights [k].
    """

    @kernel
    def run(a, thread, job):
        piece = take(a, job, 1, 1)
        while piece < 1:
            logits, count, correction, top_k = arg(a, 0), arg(a, 1), arg(a, 2), arg(a, 3)
            top = get_f32(logits)
            for e in range(1, count):
                top = max(top, get_f32(logits + 4 * e))
            total = _f32(0)
            for e in range(count):
                p = np.exp(get_f32(logits + 4 * e) - top)
                set_f32(logits + 4 * e, p)
                total += p
            chosen = _f32(0)
            for i in range(top_k):
                best = -1
                score = _f32(0)
                for e in range(count):
                    p = get_f32(logits + 4 * e)
                    if p >= _f32(0):
                        s = p / total + (get_f32(correction + 4 * e) if correction != 0 else _f32(0))
                        if best < 0 or s > score:
                            best, score = e, s
                p = get_f32(logits + 4 * best) / total
                set_f32(logits + 4 * best, _f32(-1))
                set_i64(arg(a, 6) + 8 * i, best)
                set_f32(arg(a, 7) + 4 * i, p)
                chosen += p
            if arg(a, 4) != 0:
                for i in range(top_k):
                    set_f32(arg(a, 7) + 4 * i, get_f32(arg(a, 7) + 4 * i) / max(chosen, arg_f32(a, 5)))
            piece = more(a, job, 1, 1, piece)
        return 1

    return run.address


@cache
def widen(per: int, scales: int) -> int:
    """Kernel: silu(gate)·up of every slot.

    Arguments: those of the weight's own kernel up to 12; 20 experts, 21 slots, 22 pairs, 23 out, 24-26 bytes between
    the tokens' activations, 27 scratch [slots, 2 · pairs padded to 16], 28 pairs padded to 16 (out's and scratch's
    stride), 29 rows an expert, 30 the slots' tokens int64, or none where there is one.
    """

    @kernel
    def run(a, thread, job):
        experts, pairs, wide = arg(a, 20), arg(a, 22), arg(a, 28)
        chunks = (pairs + CHUNK - 1) // CHUNK
        slots, tokens = arg(a, 21), arg(a, 30)
        units = slots * chunks
        unit = take(a, job, units, 1)
        while unit < units:
            slot, n, token = unit // chunks, unit % chunks * CHUNK, 0
            if tokens != 0:
                slot, n = unit % slots, unit // slots * CHUNK
                token = get_i64(tokens + 8 * slot)
            first = get_i64(experts + 8 * slot) * arg(a, 29)
            gate = arg(a, 27) + 8 * wide * slot
            stop = min(n + CHUNK, pairs)
            _rows(per, scales, a, token, first, n, stop, pairs - 1, gate)
            _rows(per, scales, a, token, first + pairs, n, stop, pairs - 1, gate + 4 * wide)
            silu_pairs(gate + 4 * n, gate + 4 * (wide + n), arg(a, 23) + 4 * (wide * slot + n))
            unit = more(a, job, units, 1, unit)
        return units

    return run.address


@cache
def narrow(per: int, scales: int) -> int:
    """Kernel: out = residual + the weighted sum of a token's experts' rows times its slots' own activations.

    Arguments: those of the weight's own kernel up to 12; 20 experts, 21 slots, 22 rows an expert, 23 out, 24-26 bytes
    between the slots' activations, 27 scratch [threads, 16], 28 weights [slots], 29 residual (may be out), 30 the
    slots' tokens int64, or none where there is one, 31 tokens, 32 bytes between out's rows and residual's.
    """

    @kernel
    def run(a, thread, job):
        count, experts, out, weights = arg(a, 22), arg(a, 20), arg(a, 23), arg(a, 28)
        temp = arg(a, 27) + 64 * thread
        n = take(a, job, count, CHUNK)
        while n < count:
            stop = min(n + CHUNK, count)
            for token in range(arg(a, 31)):
                row = token * arg(a, 32)
                for i in range(n, stop):
                    set_f32(out + row + 4 * i, get_f32(arg(a, 29) + row + 4 * i))
            for slot in range(arg(a, 21)):
                sums = out
                if arg(a, 30) != 0:
                    sums += arg(a, 32) * get_i64(arg(a, 30) + 8 * slot)
                first = get_i64(experts + 8 * slot) * count
                weight = get_f32(weights + 4 * slot)
                _rows(per, scales, a, slot, first, n, stop, count - 1, temp - 4 * n)
                for i in range(n, stop):
                    set_f32(sums + 4 * i, get_f32(sums + 4 * i) + weight * get_f32(temp + 4 * (i - n)))
            n = more(a, job, count, CHUNK, n)
        return count

    return run.address
