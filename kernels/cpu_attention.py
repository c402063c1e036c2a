"""Attention of one token over the quantized cache, read in place; or of one token each of several conversations.

Three rows of a program: `place` (norm and rotate the heads, store key and value), `attend` (each kv head and piece of
the context is one task, its keys decoded once for all of its query heads, online softmax) and `merge` (the pieces of
each head). Several conversations are described by a table of views, each `VIEW` words: 0 cos [D/2], 1 sin, 2 position,
3-9 K (kind, codes, their head stride and position stride in bytes, and the same of the scales), 10-16 V, 17 first
position seen, 18 pieces.
"""
# pyright: basic

from functools import cache

import numpy as np

from qrun.kernels.cpu_kv import INT4, decode, encode, hadamard
from qrun.kernels.cpu_norm import normalise
from qrun.kernels.cpu_pool import FIRST, arg, arg_f32, inline, kernel, more, take
from qrun.kernels.cpu_simd import (
    exp,
    fma,
    get_f32,
    get_i64,
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
VIEW = 24
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
def _word(view, index):
    return get_i64(view + 8 * index)


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
    head stride, 18 position stride, 19-25 the same of V, 26 out [S, heads + 2 kv heads, D padded to 32], 27 views of
    S conversations instead of 9-25, or none.
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
                view, own = a + 8 * (FIRST + 9), s
                if arg(a, 27) != 0:
                    view, own = arg(a, 27) + 8 * VIEW * s, 0
                out = arg(a, 26) + 4 * wide * i
                weight = arg(a, 6) if head < heads else arg(a, 7)
                if head >= heads + kv_heads:
                    weight = 0
                for j in range((dim + 15) // 16 * 16, wide):
                    set_f32(out + 4 * j, _f32(0))
                normalise(arg(a, 0) + s * arg(a, 1) + 4 * dim * head, weight, arg_f32(a, 8), dim, out)
                if head < heads + kv_heads:
                    half = dim // 2
                    _rotate(out, _word(view, 0) + 4 * half * own, _word(view, 1) + 4 * half * own, half)
                if head < heads:
                    factor = splat(_f32(1.0 / np.sqrt(np.float64(dim))))
                    for j in range(0, 4 * wide, 64):
                        store_f32(out + j, load_f32(out + j) * factor)
                    if _word(view, 3) == INT4:
                        hadamard(out, wide)
                else:
                    at = view + 8 * (3 if head < heads + kv_heads else 10)
                    h = (head - heads) % kv_heads
                    position = _word(view, 2) + own
                    codes = _word(at, 1) + h * _word(at, 2) + position * _word(at, 3)
                    scale = _word(at, 4) + h * _word(at, 5) + position * _word(at, 6)
                    encode(_word(at, 0), out, dim, codes, scale)
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
def _blocks(a, queries, stores, kv_head, start, stop, partial, scratch):
    """One kv head's piece; stores: the words of K, then V, as a view has them."""
    heads, kv_heads, dim = arg(a, 1), arg(a, 2), arg(a, 3)
    wide = (dim + 31) // 32 * 32
    each = heads // kv_heads
    stride = 4 * (wide + 16) * arg(a, 21)
    keys, values = scratch, scratch + 4 * _BLOCK * wide
    chances = values + 4 * _BLOCK * wide
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
            codes = _word(stores, 1) + kv_head * _word(stores, 2) + p * _word(stores, 3)
            scale = _word(stores, 4) + kv_head * _word(stores, 5) + p * _word(stores, 6)
            decode(_word(stores, 0), codes, scale, dim, keys + 4 * wide * i)
            codes = _word(stores, 8) + kv_head * _word(stores, 9) + p * _word(stores, 10)
            scale = _word(stores, 11) + kv_head * _word(stores, 12) + p * _word(stores, 13)
            decode(_word(stores, 7), codes, scale, dim, values + 4 * wide * i)
        for q in range(each):
            out = partial + q * stride
            _scores(queries + 4 * wide * (kv_head * each + q), keys, wide, chances)
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
    scratch, 23 its bytes a thread, 24 conversations, 25 their views instead of 4-19, or none (then there is one). For
    several, queries are what `place` left of them, and 21 the most pieces that one of them has.
    """

    @kernel
    def run(a, thread, job):
        heads, kv_heads, dim, pieces = arg(a, 1), arg(a, 2), arg(a, 3), arg(a, 21)
        wide = (dim + 31) // 32 * 32
        scratch = arg(a, 22) + thread * arg(a, 23)
        tasks = arg(a, 24) * kv_heads * pieces
        task = take(a, job, tasks, 1)
        while task < tasks:
            piece, head, talk = task % pieces, task // pieces % kv_heads, task // (pieces * kv_heads)
            stores, first, end = a + 8 * (FIRST + 6), arg(a, 4), arg(a, 5)
            if arg(a, 25) != 0:
                view = arg(a, 25) + 8 * VIEW * talk
                stores, first, end = view + 24, _word(view, 17), _word(view, 2) + 1
            start = first + piece * PIECE
            if start < end:
                queries = arg(a, 0) + 4 * wide * (heads + 2 * kv_heads) * talk
                rows = (talk * heads + head * (heads // kv_heads)) * pieces + piece
                partial = arg(a, 20) + 4 * (wide + 16) * rows
                _blocks(a, queries, stores, head, start, min(start + PIECE, end), partial, scratch)
            task = more(a, job, tasks, 1, task)
        return tasks

    return run.address


@cache
def merge() -> int:
    """Kernel: pieces of `attend` -> [heads, D]; rotates back what a 4-bit V left rotated.

    Arguments: 0 pieces' results (overwritten), 1 heads, 2 D, 3 pieces, 4 kind of V, 5 out, 6 conversations, 7 their
    views instead of 4, or none.
    """

    @kernel
    def run(a, thread, job):
        dim = arg(a, 2)
        wide = (dim + 31) // 32 * 32
        size = 4 * (wide + 16)
        heads = arg(a, 6) * arg(a, 1)
        head = take(a, job, heads, 1)
        while head < heads:
            base = arg(a, 0) + head * arg(a, 3) * size
            pieces, kind = arg(a, 3), arg(a, 4)
            if arg(a, 7) != 0:
                view = arg(a, 7) + 8 * VIEW * (head // arg(a, 1))
                pieces, kind = _word(view, 18), _word(view, 10)
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
            if kind == INT4:
                hadamard(base, wide)
            for i in range(0, dim, 16):
                v = load_f32_first(base + 4 * i, dim - i) * splat(_f32(1) / total)
                store_f32_first(arg(a, 5) + 4 * (head * dim + i), v, dim - i)
            head = more(a, job, heads, 1, head)
        return heads

    return run.address
