"""Attention of one token over the quantized cache, read in place.

Three rows of a program: `place` (norm and rotate the heads, store key and value), `attend` (each kv head and piece of
the context is one task, its keys decoded once for all of its query heads, online softmax) and `merge` (the pieces of
each head).
"""
# pyright: basic

from functools import cache

import numpy as np

from qrun.kernels.cpu_kv import INT4, decode, encode, hadamard
from qrun.kernels.cpu_norm import normalise
from qrun.kernels.cpu_pool import arg, arg_f32, inline, kernel, more, take
from qrun.kernels.cpu_simd import (
    exp,
    fma,
    get_f32,
    load_f32,
    load_f32_first,
    max_lanes,
    set_f32,
    splat,
    store_f32,
    store_f32_first,
    sum_lanes,
)

PIECE = 128  # positions of one task
_BLOCK = 16
_f32 = np.float32
_LOW = _f32(-1e30)


def partial_size(dim: int) -> int:
    """Floats that one head's piece takes in `attend`'s output."""
    return -(-dim // 32) * 32 + 16


def scratch_size(dim: int, queries: int) -> int:
    """Floats of scratch that one thread of `attend` needs for `queries` query heads a kv head."""
    return (2 * _BLOCK) * (-(-dim // 32) * 32) + 16 * (queries + 1)


@inline
def _rotate(x, cos, sin, half):
    if half % 16 == 0:
        for i in range(0, 4 * half, 64):
            a, b = load_f32(x + i), load_f32(x + 4 * half + i)
            c, s = load_f32(cos + i), load_f32(sin + i)
            store_f32(x + i, a * c - b * s)
            store_f32(x + 4 * half + i, b * c + a * s)
    else:
        for i in range(0, 4 * half, 4):
            a, b = get_f32(x + i), get_f32(x + 4 * half + i)
            c, s = get_f32(cos + i), get_f32(sin + i)
            set_f32(x + i, a * c - b * s)
            set_f32(x + 4 * half + i, b * c + a * s)


@cache
def place() -> int:
    """Kernel: the qkv rows of S tokens -> rotated queries (and their 1/sqrt(D)), and keys and values in the cache.

    Arguments: 0 qkv, 1 stride in bytes, 2 tokens, 3 heads, 4 kv heads, 5 D, 6 q norm or none, 7 k norm, 8 eps, 9 cos
    [S, D/2], 10 sin, 11 first position, 12 kind of K, 13 codes, 14 head stride, 15 position stride, 16 scales, 17
    head stride, 18 position stride, 19-25 the same of V, 26 out [S, heads + 2 kv heads, D padded to 32].
    """

    @kernel
    def run(a, thread, job):
        heads, kv_heads, dim = arg(a, 3), arg(a, 4), arg(a, 5)
        every = heads + 2 * kv_heads
        wide = (dim + 31) // 32 * 32
        units = arg(a, 2) * every
        unit = take(a, job, units, 4)
        while unit < units:
            for i in range(unit, min(unit + 4, units)):
                s, head = i // every, i % every
                out = arg(a, 26) + 4 * wide * i
                weight = arg(a, 6) if head < heads else arg(a, 7)
                if head >= heads + kv_heads:
                    weight = 0
                for j in range((dim + 15) // 16 * 16, wide):
                    set_f32(out + 4 * j, _f32(0))
                normalise(arg(a, 0) + s * arg(a, 1) + 4 * dim * head, weight, arg_f32(a, 8), dim, out)
                if head < heads + kv_heads:
                    half = dim // 2
                    _rotate(out, arg(a, 9) + 4 * half * s, arg(a, 10) + 4 * half * s, half)
                if head < heads:
                    factor = splat(_f32(1.0 / np.sqrt(np.float64(dim))))
                    for j in range(0, 4 * wide, 64):
                        store_f32(out + j, load_f32(out + j) * factor)
                    if arg(a, 12) == INT4:
                        hadamard(out, wide)
                else:
                    at = 12 if head < heads + kv_heads else 19
                    h = (head - heads) % kv_heads
                    position = arg(a, 11) + s
                    codes = arg(a, at + 1) + h * arg(a, at + 2) + position * arg(a, at + 3)
                    scale = arg(a, at + 4) + h * arg(a, at + 5) + position * arg(a, at + 6)
                    encode(arg(a, at), out, dim, codes, scale)
            unit = more(a, job, units, 4, unit)
        return units

    return run.address


@inline
def _scores(query, keys, wide, out):
    for i in range(0, _BLOCK, 4):
        f0 = splat(_f32(0))
        f1 = splat(_f32(0))
        f2 = splat(_f32(0))
        f3 = splat(_f32(0))
        row = keys + 4 * wide * i
        for d in range(0, 4 * wide, 64):
            q = load_f32(query + d)
            f0 = fma(q, load_f32(row + d), f0)
            f1 = fma(q, load_f32(row + 4 * wide + d), f1)
            f2 = fma(q, load_f32(row + 8 * wide + d), f2)
            f3 = fma(q, load_f32(row + 12 * wide + d), f3)
        set_f32(out + 4 * i, sum_lanes(f0))
        set_f32(out + 4 * i + 4, sum_lanes(f1))
        set_f32(out + 4 * i + 8, sum_lanes(f2))
        set_f32(out + 4 * i + 12, sum_lanes(f3))


@inline
def _blocks(a, kv_head, start, stop, partial, scratch):
    heads, kv_heads, dim = arg(a, 1), arg(a, 2), arg(a, 3)
    wide = (dim + 31) // 32 * 32
    each = heads // kv_heads
    stride = 4 * (wide + 16) * arg(a, 21)
    keys, values = scratch, scratch + 4 * _BLOCK * wide
    chances = values + 4 * _BLOCK * wide
    kinds = (arg(a, 6), arg(a, 13))
    for q in range(each):
        out = partial + q * stride
        for d in range(0, 4 * wide, 64):
            store_f32(out + d, splat(_f32(0)))
        set_f32(out + 4 * wide, _LOW)
        set_f32(out + 4 * wide + 4, _f32(0))
    for block in range(start, stop, _BLOCK):
        count = min(_BLOCK, stop - block)
        for i in range(count):
            p = block + i
            codes = arg(a, 7) + kv_head * arg(a, 8) + p * arg(a, 9)
            decode(kinds[0], codes, arg(a, 10) + kv_head * arg(a, 11) + p * arg(a, 12), dim, keys + 4 * wide * i)
            codes = arg(a, 14) + kv_head * arg(a, 15) + p * arg(a, 16)
            decode(kinds[1], codes, arg(a, 17) + kv_head * arg(a, 18) + p * arg(a, 19), dim, values + 4 * wide * i)
        for q in range(each):
            out = partial + q * stride
            _scores(arg(a, 0) + 4 * wide * (kv_head * each + q), keys, wide, chances)
            for i in range(count, _BLOCK):
                set_f32(chances + 4 * i, _LOW)
            s = load_f32(chances)
            before = get_f32(out + 4 * wide)
            top = max(before, max_lanes(s))
            s = exp(s - splat(top))
            shrink = np.exp(before - top)
            store_f32(chances, s)
            set_f32(out + 4 * wide, top)
            total = get_f32(out + 4 * wide + 4) * shrink
            for d in range(0, 4 * wide, 64):
                f = load_f32(out + d) * splat(shrink)
                for i in range(count):
                    f = fma(splat(get_f32(chances + 4 * i)), load_f32(values + 4 * wide * i + d), f)
                store_f32(out + d, f)
            weight = _f32(0)
            for i in range(count):
                weight += get_f32(chances + 4 * i)
            set_f32(out + 4 * wide + 4, total + weight)


@cache
def attend() -> int:
    """Kernel: one query a head over the cache, in pieces.

    Arguments: 0 queries [heads, D padded to 32], 1 heads, 2 kv heads, 3 D, 4 first position seen, 5 end, 6-12 K as in
    `place`, 13-19 V, 20 out [heads, pieces, partial_size(D)] (numerators, then maximum and weight), 21 pieces, 22
    scratch, 23 its bytes a thread.
    """

    @kernel
    def run(a, thread, job):
        heads, kv_heads, dim, first, end, pieces = arg(a, 1), arg(a, 2), arg(a, 3), arg(a, 4), arg(a, 5), arg(a, 21)
        size = 4 * ((dim + 31) // 32 * 32 + 16)
        tasks = kv_heads * pieces
        task = take(a, job, tasks, 1)
        while task < tasks:
            head, piece = task // pieces, task % pieces
            start = first + piece * PIECE
            partial = arg(a, 20) + size * (head * (heads // kv_heads) * pieces + piece)
            _blocks(a, head, start, min(start + PIECE, end), partial, arg(a, 22) + thread * arg(a, 23))
            task = more(a, job, tasks, 1, task)
        return tasks

    return run.address


@cache
def merge() -> int:
    """Kernel: pieces of `attend` -> [heads, D]; rotates back what a 4-bit V left rotated.

    Arguments: 0 pieces' results (overwritten), 1 heads, 2 D, 3 pieces, 4 kind of V, 5 out.
    """

    @kernel
    def run(a, thread, job):
        dim, pieces = arg(a, 2), arg(a, 3)
        wide = (dim + 31) // 32 * 32
        size = 4 * (wide + 16)
        heads = arg(a, 1)
        head = take(a, job, heads, 1)
        while head < heads:
            base = arg(a, 0) + head * pieces * size
            top = _LOW
            for p in range(pieces):
                top = max(top, get_f32(base + p * size + 4 * wide))
            total = _f32(0)
            for p in range(pieces):
                part = base + p * size
                factor = np.exp(get_f32(part + 4 * wide) - top)
                total += factor * get_f32(part + 4 * wide + 4)
                for d in range(0, 4 * wide, 64):
                    f = load_f32(part + d) * splat(factor)
                    store_f32(base + d, f if p == 0 else f + load_f32(base + d))
            if arg(a, 4) == INT4:
                hadamard(base, wide)
            for i in range(0, dim, 16):
                v = load_f32_first(base + 4 * i, dim - i) * splat(_f32(1) / total)
                store_f32_first(arg(a, 5) + 4 * (head * dim + i), v, dim - i)
            head = more(a, job, heads, 1, head)
        return heads

    return run.address
