"""Attention on an Intel GPU, between the product before it and the one behind: which kernels, for a cache's formats.

The choice is made when the first cache of those formats comes. It knows neither products nor how a kernel attends.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from qrun.backends.base import AttentionSpec, AttentionWeights, Step
from qrun.backends.xpu_device import XPUCard
from qrun.backends.xpu_pieces import MANY_PIECE, ONE_PIECE, MultiplyWide, aten_wide, attend, float_wide
from qrun.backends.xpu_pointwise import difference
from qrun.backends.xpu_sdpa import Many, Sdpa
from qrun.backends.xpu_tiers import Note, Tier, Tiers
from qrun.backends.xpu_triton import usable
from qrun.cache import KVStore, LayerCache
from qrun.formats.kv import KV_GROUP, KVFormat, PlainKV, hadamard32
from qrun.kernels import reference

Append = Callable[[Tensor, LayerCache, Step], Tensor]
"""mixed [S, (heads + 2·kv_heads)·D], K and V of it into the cache -> q half [S, heads, DP], scaled and rotated as K."""
One = Callable[[Tensor, LayerCache, Step], Tensor]
"""q [1, heads, DP], as `Append` gives it, over the cache with its token -> half [1, heads·D]."""
Call = TypeVar("Call", bound="Append | Many | MultiplyWide", covariant=True)
SCORES: Final = 128 << 20
"""Bytes of a piece's scores for as many of a prompt's tokens as are attended at a time."""
MOST_ROWS: Final = 512


@dataclass(frozen=True)
class Way(Generic[Call]):
    """One way to do a part of attention. recordable: it reads where it stands on the device alone."""

    tier: Tier
    name: str
    call: Call
    recordable: bool = False


@dataclass(frozen=True)
class Ways:
    """The kernels for a cache's formats."""

    append: Way[Append]
    one: Way[One]
    many: Way[Many]


class Attention:
    """mixed [S, (heads + 2·kv_heads)·D], half or float32 -> [S, heads·D] half, keys and values appended on the way.

    Beside that and q, memory for one token is bounded by pieces of `ONE_PIECE` positions, for many by `SCORES` twice
    and pieces of `MANY_PIECE`, or by what `Sdpa` allows itself; no cache is ever out of its codes as a whole.
    """

    def __init__(
        self, spec: AttentionSpec, weights: AttentionWeights, card: XPUCard, tiers: Tiers, note: Note
    ) -> None:  # fmt: skip
        self._spec, self._card, self._tiers, self._note = spec, card, tiers, note
        self._norms = [None if w is None else w.float().contiguous() for w in (weights.q_norm, weights.k_norm)]
        fits = min(SCORES, card.most_bytes or SCORES) // (4 * spec.heads * MANY_PIECE)
        self._rows = min(MOST_ROWS, 1 << max(3, fits.bit_length() - 1))
        self._ways: dict[tuple[KVFormat, KVFormat], Ways] = {}

    def __call__(self, mixed: Tensor, cache: LayerCache, step: Step) -> Tensor:
        ways = self._for(cache)
        q = ways.append.call(mixed, cache, step)
        tokens = q.shape[0]
        if tokens == 1:
            return ways.one.call(q, cache, step)
        filled, rows = step.start + tokens, self._rows
        parts = [
            ways.many.call(some, cache, step.start + i * rows, filled) for i, some in enumerate(torch.split(q, rows))
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def abreast(self, mixed: Tensor, caches: Sequence[LayerCache], steps: Sequence[Step]) -> Tensor:
        """The next token of each of B conversations, mixed [B, …], whose caches and steps these are."""
        rows = torch.split(mixed, 1)
        return torch.cat([self(row, cache, step) for row, cache, step in zip(rows, caches, steps, strict=True)])

    def recordable(self, cache: LayerCache) -> bool:
        """Whether the step of one token over such a cache may be replayed at other positions."""
        ways = self._for(cache)
        return ways.append.recordable and ways.one.recordable

    def _for(self, cache: LayerCache) -> Ways:
        formats = cache.k.format, cache.v.format
        ways = self._ways.get(formats)
        if ways is None:
            ways = self._ways[formats] = self._chosen(*formats)
        return ways

    def _chosen(self, k: KVFormat, v: KVFormat) -> Ways:
        spec, card, tiers = self._spec, self._card, self._tiers
        triton, half = usable(card), str(card.half).removeprefix("torch.")
        trial = Trials(spec, self._norms, k, v, card)
        heads = f"{spec.heads}/{spec.kv_heads} heads of {spec.head_dim}, K {k} V {v}, {half}"
        seen = "" if spec.window is None else ", window"

        wide = tiers.choose(
            f"wide product {half}",
            [Way("torch", "aten, float32 out", aten_wide), Way("torch", "torch, float32", float_wide)],
            lambda way: wide_trial(way.call, card),
        )

        def pieces(q: Tensor, cache: LayerCache, start: int, most: int) -> Tensor:
            return attend(q, cache, start, dim=spec.head_dim, window=spec.window, multiply=wide.call, most=most)

        def one_in_pieces(q: Tensor, cache: LayerCache, step: Step) -> Tensor:
            return pieces(q, cache, step.start, ONE_PIECE)

        def many_in_pieces(q: Tensor, cache: LayerCache, start: int, filled: int) -> Tensor:
            return pieces(q, cache, start, MANY_PIECE)

        appends: list[Way[Append]] = [Way("torch", "torch", TorchAppend(spec, self._norms, card.half))]
        ones: list[Way[One]] = [Way("torch", "torch, piecewise", one_in_pieces)]
        manys: list[Way[Many]] = [
            Way("native", "aten sdpa", Sdpa(spec, card, many_in_pieces)),
            Way("torch", "torch, piecewise", many_in_pieces),
        ]
        if isinstance(k, PlainKV) and isinstance(v, PlainKV) and k.dtype == v.dtype == card.half:
            sdpa = Sdpa(spec, card, lambda q, cache, start, filled: pieces(q, cache, start, ONE_PIECE))
            ones.append(Way("native", "aten sdpa", lambda q, cache, step: sdpa(q, cache, step.start, step.start + 1)))
        if triton:
            from qrun.backends import xpu_attention_triton as kernels

            appends.append(Way("triton", "triton", kernels.append(spec, self._norms, card), recordable=True))
            ones.append(Way("triton", "triton", kernels.decode(spec, card), recordable=True))
        norms = "" if self._norms[0] is None else ", head norms"
        ways = Ways(
            tiers.choose(f"append {heads}{norms}", appends, lambda way: trial.append(way.call)),
            tiers.choose(f"attend one {heads}{seen}", ones, lambda way: trial.one(way.call)),
            tiers.choose(f"attend many {heads}{seen}", manys, lambda way: trial.many(way.call)),
        )
        scheme = f"{k}" if k == v else f"K {k}, V {v}"
        self._note("append", scheme, ways.append.name)
        self._note("attention", scheme, f"{ways.one.name}, many tokens {ways.many.name}")
        return ways


class TorchAppend:
    """An `Append` of single operations, which writes where the host knows the step to stand."""

    def __init__(self, spec: AttentionSpec, norms: Sequence[Tensor | None], half: torch.dtype) -> None:
        self._spec, self._half = spec, half
        self._q_norm, self._k_norm = norms

    def __call__(self, mixed: Tensor, cache: LayerCache, step: Step) -> Tensor:
        q, k, v = rotated(self._spec, (self._q_norm, self._k_norm), mixed, step)
        for store, x in ((cache.k, k), (cache.v, v)):
            _put(store, step.start, x)
        # Scaled before it is rounded, so that no half overflows in the scores.
        q = F.pad(q / math.sqrt(self._spec.head_dim), (0, -q.shape[2] % KV_GROUP))
        return (hadamard32(q) if cache.k.format.rotated else q).to(self._half)


def rotated(
    spec: AttentionSpec, norms: Sequence[Tensor | None], mixed: Tensor, step: Step
) -> tuple[Tensor, Tensor, Tensor]:
    """q [S, heads, D], k and v [S, kv_heads, D] in float32, behind the head norms and rope."""
    heads = mixed.float().view(mixed.shape[0], -1, spec.head_dim)
    q, k, v = torch.split(heads, [spec.heads, spec.kv_heads, spec.kv_heads], 1)
    q_norm, k_norm = norms
    if q_norm is not None and k_norm is not None:
        q, k = reference.rms_norm(q, q_norm, spec.eps), reference.rms_norm(k, k_norm, spec.eps)
    return reference.rope(q, step.cos, step.sin), reference.rope(k, step.cos, step.sin), v


def _put(store: KVStore, start: int, x: Tensor) -> None:
    """x [S, kv_heads, D] from position ``start`` on: copies, where KVStore.write scatters by positions."""
    codes, scale = store.format.encode(x.transpose(0, 1))
    here = slice(start, start + x.shape[0])
    store.codes[:, here].copy_(codes)
    if store.scale is not None and scale is not None:
        store.scale[:, here].copy_(scale)


def wide_trial(multiply: MultiplyWide, card: XPUCard) -> tuple[float, float]:
    """Error and bound for products of one row, of eight, and of strided operands."""
    random = torch.Generator().manual_seed(0)
    errors: list[float] = []
    for rows in (1, 8):
        a, b = (torch.randn(2, size, 96, generator=random).to(card.device, card.half) for size in (rows, 256))
        errors.append(difference(multiply(a[..., :80], b[..., :80].mT), a[..., :80].float() @ b[..., :80].float().mT))
    return max(errors), 1e-4


class Trials:
    """What a way is tried on: small caches of the formats, a prefix of 40 positions, then one token or eight."""

    def __init__(
        self, spec: AttentionSpec, norms: Sequence[Tensor | None], k: KVFormat, v: KVFormat, card: XPUCard
    ) -> None:  # fmt: skip
        self._spec, self._norms, self._k, self._v, self._card = spec, norms, k, v, card
        self._bound = 2 * torch.finfo(card.half).eps
        """Four roundings: of q, of K or V, of the softmax and of the result."""

    def append(self, call: Append) -> tuple[float, float]:
        errors: list[float] = []
        for start, tokens in ((40, 1), (40, 8)):
            (wanted, cache), (ours, other) = self._made(start, tokens, None), self._made(start, tokens, call)
            errors.append(difference(ours, wanted))
            pairs = zip(other.read(0, start + tokens), cache.read(0, start + tokens), strict=True)
            errors.extend(difference(*pair) for pair in pairs)
        return max(errors), self._bound

    def one(self, call: One) -> tuple[float, float]:
        q, cache = self._made(40, 1, None)
        return difference(call(q, cache, self._step(40, 1)), self._wanted(q, cache, 40)), self._bound

    def many(self, call: Many) -> tuple[float, float]:
        errors: list[float] = []
        for start, tokens in ((0, 8), (40, 8), (0, 41)):
            q, cache = self._made(start, tokens, None)
            errors.append(difference(call(q, cache, start, start + tokens), self._wanted(q, cache, start)))
        return max(errors), self._bound

    def _step(self, start: int, tokens: int) -> Step:
        device = self._card.device
        positions = torch.arange(start, start + tokens, device=device)
        angles = positions[:, None] / 1e4 ** torch.linspace(0, 1, self._spec.head_dim // 2, device=device)
        length = torch.tensor([start + tokens], device=device)
        return Step(start, positions, angles.cos(), angles.sin(), length, limit=256)  # as one that is recorded

    def _made(self, start: int, tokens: int, call: Append | None) -> tuple[Tensor, LayerCache]:
        """q of the tokens, and a cache with them and ``start`` before, by a way or by plain torch."""
        spec, random = self._spec, torch.Generator().manual_seed(0)
        k, v = (KVStore(form, spec.kv_heads, spec.head_dim, 64, self._card.device) for form in (self._k, self._v))
        width = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
        mixed = torch.randn(start + tokens, width, generator=random).to(self._card.device)
        cache, plain = LayerCache(k, v), TorchAppend(spec, self._norms, self._card.half)
        if start:
            plain(mixed[:start], cache, self._step(0, start))
        return (call or plain)(mixed[start:], cache, self._step(start, tokens)), cache

    def _wanted(self, q: Tensor, cache: LayerCache, start: int) -> Tensor:
        """What plain torch in float32 makes of the same q and cache."""
        wide = q.float() * math.sqrt(self._spec.head_dim)
        wide = (hadamard32(wide) if self._k.rotated else wide)[..., : self._spec.head_dim]
        return reference.attend(wide, cache.read, start, window=self._spec.window).flatten(1)
