"""The blocks of a decoder on a GPU: a token in four launches of attention and two of the MLP, many through cuBLAS."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qrun.backends.base import AttentionSpec, AttentionWeights, Step
from qrun.backends.cuda_product import Link, Product, Rows
from qrun.backends.cuda_space import Space
from qrun.cache import KVStore, LayerCache
from qrun.kernels import gpu_norm
from qrun.kernels.gpu_append import append
from qrun.kernels.gpu_attention import decode_attention, partial_shape, split_count
from qrun.kernels.gpu_flash import expand_kv, flash
from qrun.kernels.gpu_gemv import MOST, Operand
from qrun.kernels.gpu_kv import Side
from qrun.kernels.gpu_kv import padded as padded_head


def side(store: KVStore) -> Side:
    """A layer's keys or values as the kernels take them."""
    return Side(store.format.name, store.codes, store.scale)


class AttentionBlock:
    """The attention block, an `Attend`."""

    def __init__(
        self, spec: AttentionSpec, weights: AttentionWeights, products: tuple[Product, Product], space: Space, *,
        before: Link, after: Link, processors: int,
    ) -> None:  # fmt: skip
        self._qkv, self._o = products
        self._spec, self._space = spec, space
        self._before, self._after = before, after
        self._norm = weights.norm.float().contiguous()
        self._head_norms = [None if w is None else w.float().contiguous() for w in (weights.q_norm, weights.k_norm)]
        self._processors = processors
        before.norm = self._norm

    def __call__(self, x: Tensor, cache: LayerCache, step: Step) -> Tensor:
        sides = side(cache.k), side(cache.v)
        tokens, spec = x.shape[0], self._spec
        if tokens > MOST:
            mixed = self._qkv.many(Rows(x, self._norm, spec.eps)).float()
            attended = torch.empty(tokens, spec.heads * spec.head_dim, dtype=self._space.half, device=x.device)
            self._attend_many(mixed, step, sides, attended)
            return self._o.many(Rows(attended), x)
        mixed = self._space.floats("mixed", tokens, self._qkv.weight.n)
        self._qkv.few(self._before.operand(x, self._norm), mixed, eps=spec.eps)
        attended = self._space.operand("attended", tokens, spec.heads * spec.head_dim)
        if tokens == 1:
            self._attend_one(mixed, step, sides, attended)
        else:
            self._attend_many(mixed, step, sides, attended.x)
        return self._leave(x, attended, summed=tokens == 1 and spec.head_dim % 32 == 0)

    def abreast(self, x: Tensor, caches: Sequence[LayerCache], steps: Sequence[Step]) -> Tensor:
        """At most `MOST` conversations: products of all at once, attention one after the other."""
        tokens, spec = x.shape[0], self._spec
        mixed = self._space.floats("mixed", tokens, self._qkv.weight.n)
        self._qkv.few(self._before.operand(x, self._norm), mixed, eps=spec.eps)
        attended = self._space.operand("attended", tokens, spec.heads * spec.head_dim)
        for b, (cache, step) in enumerate(zip(caches, steps, strict=True)):
            here = slice(b, b + 1)
            row = Operand(x=attended.x[here], sums=attended.sums[here], width=attended.width)
            self._attend_one(mixed[here], step, (side(cache.k), side(cache.v)), row)
        return self._leave(x, attended, summed=spec.head_dim % 32 == 0)

    def _leave(self, x: Tensor, attended: Operand, *, summed: bool) -> Tensor:
        """x + o(attended), whose sums attention may have left itself."""
        if not summed:
            gpu_norm.prepare(attended.x, None, xw=attended.x, sums=attended.sums)
        out = self._space.floats("after attention", *x.shape)
        return self._o.few(attended, out, epilogue="residual", residual=x, link=self._after)

    def _append(self, mixed: Tensor, step: Step, sides: tuple[Side, Side]) -> Tensor:
        """Keys and values into the cache; q [M, heads, padded D], ready for attention."""
        spec = self._spec
        q = self._space.queries(mixed.shape[0], spec.heads, padded_head(spec.head_dim))
        q_norm, k_norm = self._head_norms
        append(
            mixed, heads=spec.heads, kv_heads=spec.kv_heads, dim=spec.head_dim, positions=step.positions, cos=step.cos,
            sin=step.sin, q_norm=q_norm, k_norm=k_norm, eps=spec.eps, k=sides[0], v=sides[1], q_out=q,
        )  # fmt: skip
        return q

    def _attend_one(self, mixed: Tensor, step: Step, sides: tuple[Side, Side], out: Operand) -> None:
        spec = self._spec
        q = self._append(mixed, step, sides)
        splits = split_count(self._processors, spec.kv_heads, min(step.limit, spec.window or step.limit))
        shape = partial_shape(spec.heads, spec.kv_heads, spec.head_dim, splits)
        decode_attention(
            q[0], k=sides[0], v=sides[1], dim=spec.head_dim, length=step.length, window=spec.window or 0,
            splits=splits, partial=self._space.partials(shape), counter=self._space.integers("kv heads", spec.kv_heads),
            out=out.x, sums=out.sums if spec.head_dim % 32 == 0 else None,
        )  # fmt: skip

    def _attend_many(self, mixed: Tensor, step: Step, sides: tuple[Side, Side], out: Tensor) -> None:
        spec = self._spec
        q = self._append(mixed, step, sides)
        stop = step.start + mixed.shape[0]
        first = 0 if spec.window is None else max(0, step.start - spec.window + 1)
        shape = (spec.kv_heads, stop - first, padded_head(spec.head_dim))
        keys, values = torch.empty(2, *shape, dtype=self._space.half, device=mixed.device)
        # Keys stay rotated, for q is too.
        for part, into, rotate in ((sides[0], keys, False), (sides[1], values, True)):
            expand_kv(part, dim=spec.head_dim, start=first, stop=stop, rotate=rotate, out=into)
        flash(
            q, keys, values, dim=spec.head_dim, start=step.start, first=first, window=spec.window or 0, out=out,
        )  # fmt: skip


class FfnBlock:
    """x [M, H] -> x + down(silu(gate) * up) of norm(x)."""

    def __init__(
        self, eps: float, norm: Tensor, products: tuple[Product, Product], space: Space, *, before: Link, after: Link
    ) -> None:
        self._eps, self._norm = eps, norm.float().contiguous()
        self._gate_up, self._down = products
        self._space, self._before, self._after = space, before, after
        before.norm = self._norm

    def __call__(self, x: Tensor) -> Tensor:
        tokens = x.shape[0]
        if tokens > MOST:
            both = self._gate_up.many(Rows(x, self._norm, self._eps))
            return self._down.many(Rows(both, pairs=self._gate_up.weight.pairs), x)
        inner = self._space.operand("inner", tokens, self._down.weight.k)
        self._gate_up.few(
            self._before.operand(x, self._norm), inner.x, epilogue="silu", eps=self._eps, out_sums=inner.sums
        )
        out = self._space.floats("after ffn", tokens, x.shape[1])
        return self._down.few(inner, out, epilogue="residual", residual=x, link=self._after)


class Head:
    """x [M, H] -> logits [M, V] float32 of norm(x)."""

    def __init__(self, eps: float, norm: Tensor, product: Product, *, before: Link) -> None:
        self._eps, self._norm = eps, norm.float().contiguous()
        self._product, self._before = product, before
        before.norm = self._norm

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] > MOST:
            return self._product.many(Rows(x, self._norm, self._eps)).float()
        out = torch.empty(x.shape[0], self._product.weight.n, device=x.device)
        return self._product.few(self._before.operand(x, self._norm), out, eps=self._eps)
