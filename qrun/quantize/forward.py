"""What calibration computes beside matrix products: attention of a window over itself, and which tokens experts take.

Plain torch on the weights' values. Knows neither formats nor Hessians.
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from qrun.kernels import reference
from qrun.models.config import ModelConfig, MoE
from qrun.models.decoder import inverse_frequencies

Norms: TypeAlias = tuple[Tensor | None, Tensor | None]
"""Of queries and keys, [D] each, where the model has them."""


@dataclass(frozen=True)
class Chosen:
    """The tokens [n] of a stream that a block takes, and with which weight [n, 1]; none for all of them, in full."""

    tokens: Tensor
    gates: Tensor | None = None

    def add(self, out: Tensor, piece: slice, y: Tensor) -> None:
        """Add results y for some of the tokens to out [T, H]."""
        out.index_add_(0, self.tokens[piece], y if self.gates is None else y * self.gates[piece])


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm."""
    return reference.rms_norm(x, weight, eps)


def attend(config: ModelConfig, mixed: Tensor, norms: Norms) -> tuple[Tensor, Tensor]:
    """Attention of one window over itself, from its q, k and v [S, (heads + 2·kv_heads)·D] as they lie on disk.

    Returns what the output matrix reads, [S, heads·D], and the largest magnitudes of keys and of values, [2].
    """
    heads = mixed.view(len(mixed), -1, config.head_dim)
    q, k, v = torch.split(heads, [config.heads, config.kv_heads, config.kv_heads], 1)
    if config.rope.interleaved:
        q, k = _halves(q), _halves(k)
    if norms[0] is not None and norms[1] is not None:
        q, k = normed(q, norms[0], config.eps), normed(k, norms[1], config.eps)
    angles = torch.arange(len(mixed))[:, None].float() * inverse_frequencies(config.rope, config.head_dim)
    cos, sin = angles.cos(), angles.sin()
    q, k = reference.rope(q, cos, sin), reference.rope(k, cos, sin)
    keys, values = k.transpose(0, 1), v.transpose(0, 1)

    def read(a: int, b: int) -> tuple[Tensor, Tensor]:
        return keys[:, a:b], values[:, a:b]

    out = reference.attend(q, read, 0, window=config.window).flatten(1)
    return out, torch.stack([k.abs().amax(), v.abs().amax()])


def routes(h: Tensor, router: Tensor, correction: Tensor | None, moe: MoE) -> list[Chosen]:
    """Which tokens each expert takes."""
    gates, chosen = reference.route(h, router, correction, moe.top_k, normalise=moe.normalise, norm_min=moe.norm_min)
    found: list[Chosen] = []
    for e in range(moe.experts):
        token, slot = torch.where(chosen == e)
        found.append(Chosen(token, gates[token, slot, None]))
    return found


def _halves(x: Tensor) -> Tensor:
    """Heads [S, heads, D] whose rotary pairs are (2i, 2i+1), with pairs (i, i + D/2)."""
    return x.reshape(*x.shape[:-1], -1, 2).transpose(-1, -2).reshape(x.shape)
