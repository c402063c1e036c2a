"""torch's own scaled_dot_product_attention over a cache: in place where that is of the card's type, else over one
piece. Shapes are few, for the first call of each compiles; what does not fit is attended piece by piece."""

from collections.abc import Callable
from typing import Final
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from qrun.backends.base import AttentionSpec
from qrun.backends.xpu_buckets import bucket, key_length
from qrun.backends.xpu_device import XPUCard
from qrun.backends.xpu_pieces import HIDDEN, MANY_PIECE, expand, first_seen, hidden, leave
from qrun.cache import KVStore, LayerCache

MOST_BYTES: Final = 512 << 20
"""What torch may take where it has no fused kernel: scores, and keys and values of each head, in float32."""
Many = Callable[[Tensor, LayerCache, int, int], Tensor]
"""q half [S, heads, DP] at start … start+S-1, over a cache filled to ``filled``: (q, cache, start, filled)."""


class Sdpa:
    """Attention of q, as `xpu_pieces.attend` takes it, by torch; beyond `MOST_BYTES` or one piece, by ``beyond``."""

    def __init__(self, spec: AttentionSpec, card: XPUCard, beyond: Many) -> None:
        self._dim, self._window, self._half = spec.head_dim, spec.window, card.half
        self._most = min(MOST_BYTES, card.most_bytes or MOST_BYTES)
        self._beyond = beyond
        self._defined: WeakKeyDictionary[KVStore, int] = WeakKeyDictionary()

    def __call__(self, q: Tensor, cache: LayerCache, start: int, filled: int) -> Tensor:
        tokens, heads, _ = q.shape
        kv_heads, capacity = cache.k.codes.shape[:2]
        stop, first = start + tokens, first_seen(start, self._window)
        in_place = cache.k.codes.dtype == cache.v.codes.dtype == self._half
        length = key_length(stop - first)
        rows = 1 if tokens == 1 else bucket(tokens)
        copies = kv_heads if tokens == 1 else heads
        taken = 4 * length * (heads * rows + copies * 2 * q.shape[2])
        if taken > self._most or (not in_place and length > MANY_PIECE):
            return self._beyond(q, cache, start, filled)
        if in_place:
            end = min(first + length, capacity)
            keys, values = (self._view(store, first, end, filled) for store in (cache.k, cache.v))
        else:
            end = first + length
            keys, values = (expand(store, first, stop, self._half) for store in (cache.k, cache.v))
        q = q[..., : keys.shape[2]]
        if tokens == 1:
            # The heads of a kv head are rows of it: each key is read once, and there is no row to be hidden.
            mask = self._bias(1, start, (first, end), q.device).expand(heads // kv_heads, -1)
            out = F.scaled_dot_product_attention(
                q.view(1, kv_heads, -1, q.shape[2]), keys[None], values[None], attn_mask=mask[None, None], scale=1.0
            )
            return leave(out.reshape(heads, 1, -1), cache, self._dim, self._half)
        q = F.pad(q, (0, 0, 0, 0, 0, rows - tokens)).transpose(0, 1)[None]
        # torch's causal mask begins at the first key: right for queries that do.
        causal = start == 0 and (self._window is None or self._window >= stop)
        mask = None if causal else self._bias(rows, start, (first, end), q.device)[None, None]
        out = F.scaled_dot_product_attention(
            q, keys[None], values[None], attn_mask=mask, is_causal=causal, scale=1.0, enable_gqa=heads != kv_heads
        )
        return leave(out[0, :, :tokens], cache, self._dim, self._half)

    def _view(self, store: KVStore, first: int, end: int, filled: int) -> Tensor:
        """Positions of the cache itself. What it was never given may be NaN, which no mask hides: made zero, once."""
        defined = max(filled, self._defined.get(store, 0))
        if defined < end:
            store.codes[:, defined:end].zero_()
            self._defined[store] = end
        return store.codes[:, first:end]

    def _bias(self, rows: int, start: int, keys: tuple[int, int], device: torch.device) -> Tensor:
        """half [rows, keys]: 0, or what hides."""
        bias = torch.zeros(rows, keys[1] - keys[0], dtype=self._half, device=device)
        unseen = hidden(rows, start, keys, window=self._window, device=device)
        return bias if unseen is None else bias.masked_fill_(unseen, max(HIDDEN, torch.finfo(self._half).min))
