"""Triton's kernels as ways to attend on an Intel GPU: K and V into the cache in one launch, one token over it in
two. All read where a step stands on the device, so that it can be recorded."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qrun.backends.base import AttentionSpec, Step
from qrun.backends.xpu_device import XPUCard
from qrun.cache import KVStore, LayerCache
from qrun.kernels import gpu_append, xpu_attention
from qrun.kernels.gpu_kv import Side, padded


def side(store: KVStore) -> Side:
    """A layer's keys or values as the kernels take them."""
    return Side(store.format.name, store.codes, store.scale)


def append(
    spec: AttentionSpec, norms: Sequence[Tensor | None], card: XPUCard
) -> Callable[[Tensor, LayerCache, Step], Tensor]:
    """An `Append`."""
    q_norm, k_norm = norms

    def call(mixed: Tensor, cache: LayerCache, step: Step) -> Tensor:
        shape = (mixed.shape[0], spec.heads, padded(spec.head_dim))
        q = torch.empty(shape, dtype=card.half, device=mixed.device)
        gpu_append.append(
            mixed.float(), heads=spec.heads, kv_heads=spec.kv_heads, dim=spec.head_dim, positions=step.positions,
            cos=step.cos, sin=step.sin, q_norm=q_norm, k_norm=k_norm, eps=spec.eps, k=side(cache.k), v=side(cache.v),
            q_out=q,
        )  # fmt: skip
        return q

    return call


def decode(spec: AttentionSpec, card: XPUCard) -> Callable[[Tensor, LayerCache, Step], Tensor]:
    """A `One`."""

    def call(q: Tensor, cache: LayerCache, step: Step) -> Tensor:
        longest = min(step.limit, spec.window or step.limit)
        splits = xpu_attention.split_count(card.processors, spec.kv_heads, longest)
        partial = torch.empty(xpu_attention.partial_shape(spec.heads, spec.head_dim, splits), device=q.device)
        out = torch.empty(1, spec.heads * spec.head_dim, dtype=card.half, device=q.device)
        xpu_attention.decode_attention(
            q[0], k=side(cache.k), v=side(cache.v), dim=spec.head_dim, length=step.length, window=spec.window or 0,
            splits=splits, partial=partial, out=out,
        )  # fmt: skip
        return out

    return call
