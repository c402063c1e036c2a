"""Attention over a cache in any of its formats, piece by piece: no more than one is ever out of its codes.

It knows stored positions and queries that are ready for them; not where these come from, nor other ways to attend.
"""

from collections.abc import Callable, Mapping
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from qrun.backends.xpu_buckets import KEYS, bucket, key_length
from qrun.cache import KVStore, LayerCache
from qrun.formats.kv import KV_GROUP, hadamard32
from qrun.formats.packing import grouped

ONE_PIECE: Final = 4096
"""Positions of a piece for one token: few launches, and no more memory than a prompt's scores take."""
MANY_PIECE: Final = 1024
HIDDEN: Final = -1e30
"""The score of what a query does not see; finite, so that a row without anything to see stays so."""
MultiplyWide = Callable[[Tensor, Tensor], Tensor]
"""half [B, M, K] times half [B, K, N], accumulated and returned in float32."""


def aten_wide(a: Tensor, b: Tensor) -> Tensor:
    """torch's own product of halves with a float32 result, which not every version has."""
    return torch.bmm(a, b, out_dtype=torch.float32)


def float_wide(a: Tensor, b: Tensor) -> Tensor:
    """The same from operands in float32."""
    return torch.bmm(a.float(), b.float())


def expand(store: KVStore, start: int, stop: int, half: torch.dtype) -> Tensor:
    """Positions start … stop-1 as half [kv_heads, whole 256es, width], zero behind them, int4 still rotated.

    The width is the format's: the head's, in whole 32es where the format groups. Where the cache itself is of that
    type and length, this is a view of it.
    """
    codes, count = store.codes[:, start:stop], stop - start
    length = key_length(count)
    if store.scale is None:
        codes = codes.to(half)
        return codes if length == count else F.pad(codes, (0, 0, 0, length - count))
    width = 2 * codes.shape[2] if codes.dtype == torch.uint8 else codes.shape[2]
    out = torch.empty(codes.shape[0], length, width, dtype=half, device=codes.device)
    out[:, count:].zero_()
    _SCALED[codes.dtype](codes, store.scale[:, start:stop].float(), out[:, :count])
    return out


def _int8(codes: Tensor, scale: Tensor, out: Tensor) -> None:
    torch.mul(grouped(codes, KV_GROUP), scale[..., None], out=grouped(out, KV_GROUP))


def _int4(codes: Tensor, scale: Tensor, out: Tensor) -> None:
    pairs = grouped(out, KV_GROUP).view(*scale.shape, -1, 2)  # [kv_heads, positions, groups, 16, 2]
    for i, nibble in enumerate((codes & 15, codes >> 4)):
        values = nibble.view(torch.int8).sub_(8)
        torch.mul(grouped(values, KV_GROUP // 2), scale[..., None], out=pairs[..., i])


def _fp8(codes: Tensor, scale: Tensor, out: Tensor) -> None:
    out.copy_(codes)
    out.mul_(scale)  # what e4m3 holds, either half holds exactly


_SCALED: Final[Mapping[torch.dtype, Callable[[Tensor, Tensor, Tensor], None]]] = {
    torch.int8: _int8,
    torch.uint8: _int4,
    torch.float8_e4m3fn: _fp8,
}


def hidden(rows: int, start: int, keys: tuple[int, int], *, window: int | None, device: torch.device) -> Tensor | None:
    """[rows, keys]: whether queries at start … do not see positions keys[0] … keys[1]-1; none if they see all."""
    first, end = keys
    if end <= start + 1 and (window is None or first > start + rows - 1 - window):
        return None
    there = torch.arange(first, end, device=device)[None]
    at = torch.arange(start, start + rows, device=device)[:, None]
    unseen = there > at
    return unseen if window is None else unseen | (there <= at - window)


def first_seen(start: int, window: int | None) -> int:
    """The first position that a query at ``start`` sees, down to a multiple of 256."""
    return 0 if window is None else max(0, start - window + 1) // KEYS * KEYS


def leave(out: Tensor, cache: LayerCache, dim: int, half: torch.dtype) -> Tensor:
    """out [heads, S, width], as V is stored, to half [S, heads·dim]."""
    if cache.v.format.rotated:
        out = hadamard32(out)
    return out[..., :dim].transpose(0, 1).to(half).flatten(1)


def attend(
    q: Tensor, cache: LayerCache, start: int, *, dim: int, window: int | None, multiply: MultiplyWide, most: int
) -> Tensor:
    """Causal attention of q half [S, heads, DP] at positions start … over the cache, to half [S, heads·dim].

    q is scaled, padded to whole 32es, and rotated if K is. Beside the result this takes one piece of K and of V in
    half, [kv_heads, most, DP], and twice its scores in float32, [heads, bucket(S), most], whatever the context.
    """
    tokens, heads, _ = q.shape
    kv_heads = cache.k.codes.shape[0]
    rows = 1 if tokens == 1 else bucket(tokens)
    grouped = F.pad(q, (0, 0, 0, 0, 0, rows - tokens)).transpose(0, 1).reshape(kv_heads, -1, q.shape[2])
    peak = torch.full((*grouped.shape[:2], 1), HIDDEN, device=q.device)
    weight = torch.zeros_like(peak)
    out: Tensor | None = None
    stop = start + tokens
    for a in range(first_seen(start, window), stop, most):
        b = min(a + most, stop)
        keys = expand(cache.k, a, b, q.dtype)
        scores = multiply(grouped[..., : keys.shape[2]], keys.transpose(1, 2))
        end = a + keys.shape[1]
        mask = hidden(rows, start, (a, end), window=window, device=q.device)
        if mask is not None:
            scores.view(kv_heads, -1, rows, end - a).masked_fill_(mask, HIDDEN)
        top = torch.maximum(peak, scores.amax(-1, keepdim=True))
        shrink = torch.exp(peak - top)
        scores.sub_(top).exp_()
        weight = weight * shrink + scores.sum(-1, keepdim=True)
        mixed = multiply(scores.to(q.dtype), expand(cache.v, a, b, q.dtype))
        out = mixed if out is None else out.mul_(shrink).add_(mixed)
        peak = top
    assert out is not None, "attention is of one token at least"
    return leave((out / weight).view(heads, rows, -1)[:, :tokens], cache, dim, q.dtype)
