"""Attention of many tokens over the quantized cache: causal, in blocks of 64 positions, with an online softmax.

A task is one kv head and some tokens: their query heads are the rows of 6 × 64 tiles, so a block's keys and values
are decoded once for all of them. After FlashAttention (Dao et al. 2022).
"""
# pyright: basic

from functools import cache

import numpy as np

from qrun.kernels.cpu_kv import INT4, decode, hadamard
from qrun.kernels.cpu_pool import arg, inline, kernel, more, take
from qrun.kernels.cpu_simd import (
    exp,
    fmax,
    get_f32,
    keep,
    load_f32,
    load_f32_first,
    max_lanes,
    set_f32,
    splat,
    store_f32,
    store_f32_first,
    sum_lanes,
)
from qrun.kernels.cpu_tile import TOKENS, WIDTH, tile_fma, tile_load, tile_store, transpose, zero_floats

ROWS = 192  # query rows of a task: their sums stay in the second-level cache
_LOW = np.float32(-1e30)
_HIDDEN = np.float32(-3e38)
_f32 = np.float32


def task_tokens(heads: int, kv_heads: int) -> int:
    return max(1, ROWS // (heads // kv_heads))


def scratch_size(dim: int, heads: int, kv_heads: int) -> int:
    """Floats that one thread needs, a multiple of 16."""
    wide, broad = -(-dim // 32) * 32, -(-dim // WIDTH) * WIDTH
    rows = -(-task_tokens(heads, kv_heads) * (heads // kv_heads) // TOKENS) * TOKENS
    return rows * (wide + broad + 2) + WIDTH * (2 * wide + broad) + TOKENS * WIDTH + 64


@inline
def _gather(a, head, first, tokens, rows):
    """The task's queries, row after row."""
    heads, kv_heads, dim = arg(a, 2), arg(a, 3), arg(a, 4)
    wide, each = (dim + 31) // 32 * 32, heads // kv_heads
    for s in range(tokens):
        for q in range(each):
            source = arg(a, 0) + 4 * wide * ((first + s) * (heads + 2 * kv_heads) + head * each + q)
            for d in range(0, 4 * wide, 64):
                store_f32(rows + 4 * wide * (s * each + q) + d, load_f32(source + d))


@inline
def _expand(a, head, block, count, rows, keys, values):
    """Some positions: keys [D][64], values [64][D]."""
    dim = arg(a, 4)
    wide, broad = (dim + 31) // 32 * 32, (dim + WIDTH - 1) // WIDTH * WIDTH
    for i in range(count):
        p = block + i
        codes, scale = arg(a, 8) + head * arg(a, 9) + p * arg(a, 10), arg(a, 11) + head * arg(a, 12) + p * arg(a, 13)
        decode(arg(a, 7), codes, scale, dim, rows + 4 * wide * i)
        codes, scale = arg(a, 15) + head * arg(a, 16) + p * arg(a, 17), arg(a, 18) + head * arg(a, 19) + p * arg(a, 20)
        decode(arg(a, 14), codes, scale, dim, values + 4 * broad * i)
    for i in range(0, WIDTH, 16):
        for d in range(0, wide, 16):
            transpose(rows + 4 * (i * wide + d), 4 * wide, keys + 4 * (d * WIDTH + i), 4 * WIDTH)


@inline
def _soften(chances, row, peak, weight, low, high, first_block):
    """One row of scores [64] -> probabilities up to their peak; returns what earlier sums shrink by."""
    top = splat(_LOW)
    for c in range(0, WIDTH, 16):
        s = keep(load_f32(chances + 4 * c), low - c, high - c, _HIDDEN)
        store_f32(chances + 4 * c, s)
        top = fmax(s, top)
    before = _LOW if first_block else get_f32(peak + 4 * row)
    now = max(before, max_lanes(top))
    total = splat(_f32(0))
    for c in range(0, WIDTH, 16):
        s = exp(load_f32(chances + 4 * c) - splat(now))
        store_f32(chances + 4 * c, s)
        total = total + s
    shrink = _f32(0) if first_block else np.exp(before - now)
    kept = _f32(0) if first_block else get_f32(weight + 4 * row) * shrink
    set_f32(peak + 4 * row, now)
    set_f32(weight + 4 * row, kept + sum_lanes(total))
    return shrink


@inline
def _tiles(a, block, first, count, rows, keys, values, sums, peak, weight, chances, first_block):
    heads, kv_heads, dim, window = arg(a, 2), arg(a, 3), arg(a, 4), arg(a, 6)
    wide, broad, each = (dim + 31) // 32 * 32, (dim + WIDTH - 1) // WIDTH * WIDTH, heads // kv_heads
    for i in range(0, count, TOKENS):
        tile = zero_floats()
        for d in range(wide):
            tile = tile_fma(tile, keys + 4 * WIDTH * d, rows + 4 * (i * wide + d), 4 * wide)
        tile_store(chances, tile)
        mine = sums + 4 * broad * i
        for r in range(TOKENS):
            position = arg(a, 5) + first + (i + r) // each
            low = 0 if window == 0 else max(0, position - window + 1 - block)
            shrink = _soften(chances + 4 * WIDTH * r, i + r, peak, weight, low, position + 1 - block, first_block)
            for c in range(0, broad, WIDTH):
                for j in range(0, WIDTH, 16):
                    at = mine + 4 * (TOKENS * c + WIDTH * r + j)
                    value = splat(_f32(0)) if first_block else load_f32(at) * splat(shrink)
                    store_f32(at, value)
        for c in range(0, broad, WIDTH):
            tile = tile_load(mine + 4 * TOKENS * c)
            for p in range(WIDTH):
                tile = tile_fma(tile, values + 4 * (broad * p + c), chances + 4 * p, 4 * WIDTH)
            tile_store(mine + 4 * TOKENS * c, tile)


@inline
def _finish(a, head, first, count, sums, weight, row):
    heads, kv_heads, dim = arg(a, 2), arg(a, 3), arg(a, 4)
    wide, broad, each = (dim + 31) // 32 * 32, (dim + WIDTH - 1) // WIDTH * WIDTH, heads // kv_heads
    for i in range(count):
        tile = sums + 4 * broad * (i // TOKENS * TOKENS) + 4 * WIDTH * (i % TOKENS)
        scale = splat(_f32(1) / get_f32(weight + 4 * i))
        for d in range(0, wide, 16):
            store_f32(row + 4 * d, load_f32(tile + 4 * (d // WIDTH * WIDTH * TOKENS + d % WIDTH)) * scale)
        if arg(a, 14) == INT4:
            hadamard(row, wide)
        out = arg(a, 21) + 4 * dim * ((first + i // each) * heads + head * each + i % each)
        for d in range(0, dim, 16):
            store_f32_first(out + 4 * d, load_f32_first(row + 4 * d, dim - d), dim - d)


@cache
def flash() -> int:
    """Kernel: queries of S tokens -> [S, heads·D].

    Arguments: 0 queries as `place` leaves them, 1 tokens, 2 heads, 3 kv heads, 4 D, 5 first position, 6 window or 0,
    7-13 K as in `place`, 14-20 V, 21 out, 22 scratch, 23 its bytes a thread, 24 tokens a task.
    """

    @kernel
    def run(a, thread, job):
        total, heads, kv_heads, dim, start, window = arg(a, 1), arg(a, 2), arg(a, 3), arg(a, 4), arg(a, 5), arg(a, 6)
        wide, broad, each, step = (
            (dim + 31) // 32 * 32,
            (dim + WIDTH - 1) // WIDTH * WIDTH,
            heads // kv_heads,
            arg(a, 24),
        )
        most = (step * each + TOKENS - 1) // TOKENS * TOKENS
        chances = arg(a, 22) + thread * arg(a, 23)
        keys = chances + 4 * TOKENS * WIDTH
        values = keys + 4 * WIDTH * wide
        rows = values + 4 * WIDTH * broad
        temp = rows + 4 * most * wide
        sums = temp + 4 * WIDTH * wide
        peak = sums + 4 * most * broad
        weight = peak + 4 * most
        parts = (total + step - 1) // step
        tasks = kv_heads * parts
        task = take(a, job, tasks, 1)
        while task < tasks:
            # The longest tasks, which end last, go first.
            head, first = task % kv_heads, (parts - 1 - task // kv_heads) * step
            tokens = min(step, total - first)
            _gather(a, head, first, tokens, rows)
            begin = 0 if window == 0 else max(0, start + first - window + 1) // WIDTH * WIDTH
            end = start + first + tokens
            for block in range(begin, end, WIDTH):
                _expand(a, head, block, min(WIDTH, end - block), temp, keys, values)
                _tiles(a, block, first, tokens * each, rows, keys, values, sums, peak, weight, chances, block == begin)
            _finish(a, head, first, tokens * each, sums, weight, chances)
            task = more(a, job, tasks, 1, task)
        return tasks

    return run.address
