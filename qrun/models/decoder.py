"""The one forward. It is built from bound blocks and knows neither formats, caches' insides nor families."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qrun.backends.base import Attend, Feed, Linear, Step
from qrun.cache import KVCache
from qrun.models.config import Rope


@dataclass(frozen=True)
class Layer:
    attend: Attend
    feed: Feed


class Decoder:
    """ids [S] at the next positions of a cache -> logits [S or 1, V] in float32."""

    def __init__(
        self,
        *,
        embed: Callable[[Tensor], Tensor],
        layers: list[Layer],
        head: Linear,
        inv_freq: Tensor,
        device: torch.device,
    ) -> None:
        self.embed = embed
        self.layers = layers
        self.head = head
        self.inv_freq = inv_freq.to(device)
        self.device = device

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [S, D/2] of positions [S]."""
        angles = positions[:, None].float() * self.inv_freq
        return angles.cos(), angles.sin()

    def forward(
        self,
        ids: Tensor,
        cache: KVCache,
        *,
        last_only: bool = False,
        positions: Tensor | None = None,
        limit: int | None = None,
    ) -> Tensor:
        """Run S tokens, appending S positions to the cache. ``last_only``: logits of the last token alone, [1, V].

        ``positions`` [S] and ``limit`` are a recorded step's, as `Step` has them; the cache's length gives them else.
        """
        start, tokens = cache.length, ids.shape[0]
        if positions is None:
            positions = torch.arange(start, start + tokens, device=self.device)
        step = Step(start, positions, *self._angles(positions), positions[-1:] + 1, limit or start + tokens)
        x = self.embed(ids)
        for layer, stored in zip(self.layers, cache.layers, strict=True):
            x = layer.feed(layer.attend(x, stored, step))
        cache.length = start + tokens
        return self.head(x[-1:] if last_only and tokens > 1 else x)

    def forward_many(self, tokens: Tensor, caches: Sequence[KVCache]) -> Tensor:
        """One step of B conversations: tokens [B], each appended to its own cache -> logits [B, V]."""
        positions = torch.tensor([cache.length for cache in caches], device=self.device)
        cos, sin = self._angles(positions)
        after = positions + 1
        steps: list[Step] = []
        for b, cache in enumerate(caches):
            here = slice(b, b + 1)
            steps.append(Step(cache.length, positions[here], cos[here], sin[here], after[here], cache.length + 1))
        x = self.embed(tokens)
        for i, layer in enumerate(self.layers):
            x = layer.feed(layer.attend.abreast(x, [cache.layers[i] for cache in caches], steps))
        for cache in caches:
            cache.length += 1
        return self.head(x)


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Rotation per position of each pair, [head_dim/2] float32: theta^(-2i/D), scaled as the model asks.

    linear divides by the factor (kaiokendev 2023); llama3 divides the slow ones, keeps the fast ones and blends between
    (as transformers' ``_compute_llama3_parameters``).
    """
    freq = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if rope.kind == "linear":
        return freq / rope.factor
    if rope.kind == "llama3":
        wavelength = 2 * math.pi / freq
        low, high = rope.original_positions / rope.low_freq_factor, rope.original_positions / rope.high_freq_factor
        blend = (rope.original_positions / wavelength - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        mixed = (1 - blend) * freq / rope.factor + blend * freq
        slow = torch.where(wavelength > low, freq / rope.factor, freq)
        return torch.where((wavelength <= low) & (wavelength >= high), mixed, slow)
    return freq
