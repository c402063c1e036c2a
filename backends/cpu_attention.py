"""Attention blocks of the CPU: norm, qkv, rope, cache, attention, output and residual as one program."""

import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qrun.backends.base import AttentionSpec, AttentionWeights, Step
from qrun.backends.cpu_matrix import Matrix, Workspace, padded, row_of
from qrun.cache import KVStore, LayerCache
from qrun.kernels import cpu_attention, cpu_flash
from qrun.kernels.cpu_kv import KINDS
from qrun.kernels.cpu_pool import FIRST, Pool, Program, aligned


def _layout(store: KVStore) -> list[int]:
    """Kind, codes, their strides by head and position in bytes, and the same of the scales."""
    parts = [KINDS[store.format.name]]
    for tensor in (store.codes, store.scale):
        if tensor is None:
            parts += [0, 0, 0]
        else:
            parts += [tensor.data_ptr(), *(s * tensor.element_size() for s in tensor.stride()[:2])]
    return parts


def _norms(weights: AttentionWeights) -> list[Tensor | None]:
    return [None if w is None else w.float().contiguous() for w in (weights.q_norm, weights.k_norm)]


class AttentionStep:
    """One token through an attention block."""

    def __init__(
        self, pool: Pool, workspace: Workspace, spec: AttentionSpec, weights: AttentionWeights, qkv: Matrix, o: Matrix
    ) -> None:
        self._pool = pool
        self._workspace = workspace
        self._spec = spec
        self._bound: weakref.ref[LayerCache] | None = None  # whoever changes the cache has its memory at once
        heads, kv_heads, dim = spec.heads, spec.kv_heads, spec.head_dim
        mixed = aligned(padded(qkv.rows, 16), np.float32)
        placed = aligned((heads + 2 * kv_heads) * padded(dim, 32), np.float32)
        attended = aligned(padded(heads * dim, 32), np.float32)
        each = padded(cpu_attention.scratch_size(dim, heads // kv_heads), 16)
        self._program = program = Program(8)
        self._first = qkv.feed(program, None, weights.norm.float().contiguous(), spec.eps)
        qkv.multiply(program, mixed)
        self._place = program.add(cpu_attention.place(), mixed, 0, 1, heads, kv_heads, dim, *_norms(weights), spec.eps)
        program.put(self._place, 26, placed)
        self._attend = program.add(cpu_attention.attend(), placed, heads, kv_heads, dim)
        program.put(self._attend, 22, aligned(each * pool.threads, np.float32))
        program.put(self._attend, 23, 4 * each)
        program.put(self._attend, 24, 1)
        self._merge = program.add(cpu_attention.merge(), None, heads, dim)
        program.put(self._merge, 5, attended)
        program.put(self._merge, 6, 1)
        o.feed(program, attended)
        self._last = o.multiply(program, None)
        self._width = o.rows
        self._size = 4 * heads * cpu_attention.partial_size(dim)

    def _bind(self, cache: LayerCache) -> None:
        k, v = _layout(cache.k), _layout(cache.v)
        words = self._program.words
        words[self._place, FIRST + 12 : FIRST + 26] = k + v
        words[self._attend, FIRST + 6 : FIRST + 20] = k + v
        words[self._merge, FIRST + 4] = v[0]
        self._bound = weakref.ref(cache)

    def __call__(self, x: Tensor, cache: LayerCache, step: Step) -> Tensor:
        if self._bound is None or self._bound() is not cache:
            self._bind(cache)
        x, cos, sin = x.contiguous(), step.cos.contiguous(), step.sin.contiguous()
        out = row_of(self._width)
        end = step.start + 1
        start = 0 if self._spec.window is None else max(0, end - self._spec.window)
        pieces = -(-(end - start) // cpu_attention.PIECE)
        partial = self._workspace("partial", self._size * pieces)
        words = self._program.words
        words[self._first, FIRST] = x.data_ptr()
        words[self._place, FIRST + 9 : FIRST + 12] = cos.data_ptr(), sin.data_ptr(), step.start
        words[self._attend, FIRST + 4 : FIRST + 6] = start, end
        words[self._attend, FIRST + 20 : FIRST + 22] = partial, pieces
        words[self._merge, FIRST] = partial
        words[self._merge, FIRST + 3] = pieces
        self._last.set(out.data_ptr(), x.data_ptr())
        self._pool.run(self._program)
        return out


class AttentionSweep:
    """Many tokens through an attention block."""

    def __init__(
        self,
        pool: Pool,
        workspace: Workspace,
        spec: AttentionSpec,
        weights: AttentionWeights,
        qkv: Matrix,
        o: Matrix,
    ) -> None:
        self._pool = pool
        self._workspace = workspace
        self._spec = spec
        self._bound: weakref.ref[LayerCache] | None = None
        self._qkv, self._o = qkv, o
        heads, kv_heads, dim = spec.heads, spec.kv_heads, spec.head_dim
        self._program = program = Program(8)
        self._feed = qkv.feed_many(program, weights.norm.float().contiguous(), spec.eps)
        self._mix = qkv.multiply_many(program)
        self._place = program.add(
            cpu_attention.place(), None, 4 * qkv.rows, 0, heads, kv_heads, dim, *_norms(weights), spec.eps
        )
        self._flash = program.add(cpu_flash.flash(), None, 0, heads, kv_heads, dim, 0, spec.window or 0)
        self._scratch = 4 * padded(cpu_flash.scratch_size(dim, heads, kv_heads), 16)
        program.put(self._flash, 23, self._scratch)
        program.put(self._flash, 24, cpu_flash.task_tokens(heads, kv_heads))
        self._feed_o, self._last = o.feed_many(program), o.multiply_many(program)

    def _bind(self, cache: LayerCache) -> None:
        k, v = _layout(cache.k), _layout(cache.v)
        words = self._program.words
        words[self._place, FIRST + 12 : FIRST + 26] = k + v
        words[self._flash, FIRST + 7 : FIRST + 21] = k + v
        self._bound = weakref.ref(cache)

    def __call__(self, x: Tensor, cache: LayerCache, step: Step) -> Tensor:
        if self._bound is None or self._bound() is not cache:
            self._bind(cache)
        x, cos, sin = x.contiguous(), step.cos.contiguous(), step.sin.contiguous()
        tokens, spec, space = x.shape[0], self._spec, self._workspace
        out = torch.empty_like(x)
        mixed = space("mixed", 4 * tokens * self._qkv.rows)
        placed = space("placed", 4 * tokens * (spec.heads + 2 * spec.kv_heads) * padded(spec.head_dim, 32))
        attended = space("attended", 4 * tokens * self._o.columns)
        words = self._program.words
        words[self._place, FIRST] = mixed
        words[self._place, FIRST + 2] = tokens
        words[self._place, FIRST + 9 : FIRST + 12] = cos.data_ptr(), sin.data_ptr(), step.start
        words[self._place, FIRST + 26] = placed
        words[self._flash, FIRST : FIRST + 2] = placed, tokens
        words[self._flash, FIRST + 5] = step.start
        words[self._flash, FIRST + 21 : FIRST + 23] = attended, space("flash", self._scratch * space.threads)
        for _ in range(2):  # buffers are shared by name and may grow while the second is aimed
            self._qkv.aim(self._program, self._feed, self._mix, x.data_ptr(), tokens, mixed)
            self._o.aim(self._program, self._feed_o, self._last, attended, tokens, out.data_ptr(), x.data_ptr())
        self._pool.run(self._program)
        return out


class AttentionAbreast:
    """One token of each of several conversations: their rows share the weights, and each attends to its own cache."""

    def __init__(
        self, pool: Pool, workspace: Workspace, spec: AttentionSpec, weights: AttentionWeights, qkv: Matrix, o: Matrix
    ) -> None:
        self._pool = pool
        self._workspace = workspace
        self._spec = spec
        self._qkv, self._o = qkv, o
        self._views = aligned(0, np.int64).reshape(0, cpu_attention.VIEW)
        self._bound: list[weakref.ref[LayerCache]] = []
        heads, kv_heads, dim = spec.heads, spec.kv_heads, spec.head_dim
        self._program = program = Program(8)
        self._feed = qkv.feed_many(program, weights.norm.float().contiguous(), spec.eps)
        self._mix = qkv.multiply_many(program)
        self._place = program.add(
            cpu_attention.place(), None, 4 * qkv.rows, 0, heads, kv_heads, dim, *_norms(weights), spec.eps
        )
        self._attend = program.add(cpu_attention.attend(), None, heads, kv_heads, dim)
        self._scratch = 4 * padded(cpu_attention.scratch_size(dim, heads // kv_heads), 16)
        program.put(self._attend, 23, self._scratch)
        self._merge = program.add(cpu_attention.merge(), None, heads, dim)
        self._feed_o, self._last = o.feed_many(program), o.multiply_many(program)
        self._partial = 4 * heads * cpu_attention.partial_size(dim)

    def _look(self, caches: Sequence[LayerCache], steps: Sequence[Step]) -> int:
        """Describe every conversation in its view; returns the most pieces of one."""
        if len(caches) > len(self._views):
            self._views = aligned(len(caches) * cpu_attention.VIEW, np.int64).reshape(-1, cpu_attention.VIEW)
            self._bound = []
        most = 0
        for b, (cache, step) in enumerate(zip(caches, steps, strict=True)):
            view = self._views[b]
            if b == len(self._bound) or self._bound[b]() is not cache:
                view[3:17] = _layout(cache.k) + _layout(cache.v)
                self._bound[b : b + 1] = [weakref.ref(cache)]
            window = self._spec.window
            first = 0 if window is None else max(0, step.start + 1 - window)
            pieces = -(-(step.start + 1 - first) // cpu_attention.PIECE)
            view[:3] = step.cos.data_ptr(), step.sin.data_ptr(), step.start
            view[17:19] = first, pieces
            most = max(most, pieces)
        return most

    def __call__(self, x: Tensor, caches: Sequence[LayerCache], steps: Sequence[Step]) -> Tensor:
        x = x.contiguous()
        tokens, spec, space = x.shape[0], self._spec, self._workspace
        pieces = self._look(caches, steps)
        out = torch.empty_like(x)
        mixed = space("mixed", 4 * tokens * self._qkv.rows)
        placed = space("placed", 4 * tokens * (spec.heads + 2 * spec.kv_heads) * padded(spec.head_dim, 32))
        partial = space("partial", self._partial * tokens * pieces)
        attended = space("attended", 4 * tokens * self._o.columns)
        words, views = self._program.words, self._views.ctypes.data
        words[self._place, FIRST] = mixed
        words[self._place, FIRST + 2] = tokens
        words[self._place, FIRST + 26 : FIRST + 28] = placed, views
        words[self._attend, FIRST] = placed
        words[self._attend, FIRST + 20 : FIRST + 23] = partial, pieces, space("flash", self._scratch * space.threads)
        words[self._attend, FIRST + 24 : FIRST + 26] = tokens, views
        words[self._merge, FIRST] = partial
        words[self._merge, FIRST + 3] = pieces
        words[self._merge, FIRST + 5 : FIRST + 8] = attended, tokens, views
        for _ in range(2):  # as in AttentionSweep
            self._qkv.aim(self._program, self._feed, self._mix, x.data_ptr(), tokens, mixed)
            self._o.aim(self._program, self._feed_o, self._last, attended, tokens, out.data_ptr(), x.data_ptr())
        self._pool.run(self._program)
        return out


class Attention:
    """An `Attend` of the programs above."""

    def __init__(
        self, pool: Pool, workspace: Workspace, spec: AttentionSpec, weights: AttentionWeights, qkv: Matrix, o: Matrix
    ) -> None:
        self._one = AttentionStep(pool, workspace, spec, weights, qkv, o)
        self._many = AttentionSweep(pool, workspace, spec, weights, qkv, o)
        self._abreast = AttentionAbreast(pool, workspace, spec, weights, qkv, o)

    def __call__(self, x: Tensor, cache: LayerCache, step: Step) -> Tensor:
        return self._one(x, cache, step) if x.shape[0] == 1 else self._many(x, cache, step)

    def abreast(self, x: Tensor, caches: Sequence[LayerCache], steps: Sequence[Step]) -> Tensor:
        return self._abreast(x, caches, steps)
