"""Spark's network for training: the ERNIE-4.5-MoE shape in plain torch, and nothing else.

Knows tensors only: no text, no files, and nothing of qrun's runtime. QKV and gate/up are fused here; the checkpoint
writer (`spark_checkpoint`) splits them. With `fake_int4` set, every linear weight is rounded to 4 bits in groups of
64 on the way forward (straight through on the way back), so that the model learns to live with int4 weights.
"""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The sizes of the network; the defaults are spark's."""

    vocab: int = 2048
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    dense: int = 512
    experts: int = 10
    chosen: int = 2
    expert: int = 128
    shared: int = 1
    positions: int = 2048
    theta: float = 500000.0
    eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden // self.heads


def round_to_int4(w: Tensor, group: int = 64) -> Tensor:
    """Asymmetric 4-bit rounding in groups along the last dimension, back in floating point."""
    grouped = w.reshape(-1, group)
    low, high = grouped.amin(1, keepdim=True), grouped.amax(1, keepdim=True)
    scale = (high - low).clamp_min(1e-8) / 15
    return ((grouped - low) / scale).round_().mul_(scale).add_(low).view_as(w)


class Weights(nn.Module):
    """A matrix [N, K], or a stack [E, N, K], that can be seen through 4 bits."""

    def __init__(self, *size: int, std: float = 0.02) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*size) * std)
        self.fake_int4 = False

    def forward(self) -> Tensor:
        w = self.weight
        return w + (round_to_int4(w.detach()) - w.detach()) if self.fake_int4 else w


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm."""
    return F.rms_norm(x, weight.shape, weight, eps)


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The gated MLP."""
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    return F.linear(F.silu(gate) * up, down)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved rotary embedding: pairs (2i, 2i+1). x [B, H, S, D]; cos, sin [S, D/2]."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


class Moe(nn.Module):
    """Softmax router, top-k by corrected probability, weights normalised, one shared expert always added."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.chosen = s.chosen
        self.router = nn.Parameter(torch.randn(s.experts, s.hidden) * 0.02)
        self.bias = nn.Buffer(torch.zeros(s.experts))
        self.load = nn.Buffer(torch.zeros(s.experts), persistent=False)
        out = 0.02 / (2 * s.layers) ** 0.5
        self.gate_up = Weights(s.experts, 2 * s.expert, s.hidden)
        self.down = Weights(s.experts, s.hidden, s.expert, std=out)
        self.shared_gate_up = Weights(2 * s.expert * s.shared, s.hidden)
        self.shared_down = Weights(s.hidden, s.expert * s.shared, std=out)

    def forward(self, x: Tensor) -> Tensor:  # [T, H]
        p = F.linear(x, self.router).softmax(-1)
        picked = torch.topk(p.detach() + self.bias, self.chosen, dim=-1).indices
        weights = p.gather(-1, picked)
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-12)
        y = swiglu(x, self.shared_gate_up(), self.shared_down())
        experts = picked.flatten()
        order = experts.argsort(stable=True)  # slots sorted by expert
        counts = torch.bincount(experts, minlength=len(self.bias))
        if self.training:
            self.load += counts
        rows = order // self.chosen
        gate_up, down = self.gate_up(), self.down()
        sizes = cast("list[int]", counts.tolist())  # pyright: ignore[reportUnknownMemberType]
        parts = [swiglu(part, gate_up[e], down[e]) for e, part in enumerate(torch.split(x[rows], sizes))]
        return y.index_add(0, rows, torch.cat(parts) * weights.flatten()[order, None])

    def balance(self, rate: float) -> None:
        """Nudge the correction bias towards equal load: up where tokens were few, down where they were many."""
        self.bias += rate * torch.sign(self.load.mean() - self.load)
        self.load.zero_()


class Layer(nn.Module):
    """Attention and an MLP (dense in the first layer, a mixture of experts after it)."""

    def __init__(self, s: Shape, index: int) -> None:
        super().__init__()
        self.s = s
        out = 0.02 / (2 * s.layers) ** 0.5
        self.norm1, self.norm2 = nn.Parameter(torch.ones(s.hidden)), nn.Parameter(torch.ones(s.hidden))
        self.qkv = Weights((s.heads + 2 * s.kv_heads) * s.head_dim, s.hidden)
        self.o = Weights(s.hidden, s.heads * s.head_dim, std=out)
        self.moe = Moe(s) if index else None
        self.gate_up = None if index else Weights(2 * s.dense, s.hidden)
        self.down = None if index else Weights(s.hidden, s.dense, std=out)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [B, S, H]
        s, (batch, length, _) = self.s, x.shape
        qkv = F.linear(norm(x, self.norm1, s.eps), self.qkv()).view(batch, length, -1, s.head_dim).transpose(1, 2)
        q, k, v = torch.split(qkv, [s.heads, s.kv_heads, s.kv_heads], 1)
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        k, v = (torch.repeat_interleave(t, s.heads // s.kv_heads, 1) for t in (k, v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.linear(a.transpose(1, 2).reshape(batch, length, -1), self.o())
        h = norm(x, self.norm2, s.eps)
        if self.moe is not None:
            return x + self.moe(h.flatten(0, 1)).view_as(x)
        assert self.gate_up is not None and self.down is not None
        return x + swiglu(h, self.gate_up(), self.down())


class Spark(nn.Module):
    """Token ids [B, S] to logits; the head is the embedding."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.shape = s
        self.embed = nn.Parameter(torch.randn(s.vocab, s.hidden) * 0.02)
        self.layers = nn.ModuleList(Layer(s, i) for i in range(s.layers))
        self.norm = nn.Parameter(torch.ones(s.hidden))
        angle = torch.arange(s.positions)[:, None] * s.theta ** -(torch.arange(0, s.head_dim, 2) / s.head_dim)
        self.cos, self.sin = nn.Buffer(angle.cos(), persistent=False), nn.Buffer(angle.sin(), persistent=False)

    def forward(self, ids: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits [B, S, V], or [n, V] of the n positions that are true in `keep` [B, S]."""
        x = F.embedding(ids, self.embed)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        x = norm(x, self.norm, self.shape.eps)
        return F.linear(x if keep is None else x[keep], self.embed)

    def set_fake_int4(self, on: bool) -> None:
        """See all linear weights through 4 bits, or not."""
        for module in self.modules():
            if isinstance(module, Weights):
                module.fake_int4 = on

    @property
    def blocks(self) -> list[Layer]:
        """The layers, from below."""
        return [module for module in self.layers if isinstance(module, Layer)]

    @property
    def mixtures(self) -> list[Moe]:
        """The mixtures of experts, from below."""
        return [layer.moe for layer in self.blocks if layer.moe is not None]
