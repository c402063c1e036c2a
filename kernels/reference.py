"""Each kernel in plain torch: right on any device, for any shape, and never fast on purpose.

Shapes: S tokens, H model width, D head width, E experts. Everything accumulates in float32 or in what it is given.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3_MAX = 448.0


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H] / sqrt(mean(x²) + eps) * weight [H], computed in float32, in the dtype of x (Zhang, Sennrich 2019)."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """[..., 2I] -> [..., I]: silu of the first half times the second (SwiGLU, Shazeer 2020)."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of x [S, heads, D] by angles with cos and sin [S, D/2] (Su et al. 2021)."""
    a, b = x.float().chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def quantize_int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] -> int8 codes and a float32 scale [..., 1]: absmax/127 per row, as W8A8 runtimes do per token."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp_min(1e-10) / 127
    return (wide / scale).round().clamp(-127, 127).to(torch.int8), scale


def quantize_fp8_rows(x: Tensor, group: int = 128) -> tuple[Tensor, Tensor]:
    """x [..., K] -> e4m3 codes [..., K] and float32 scales [..., ceil(K/group)]: amax/448 per row and group."""
    k = x.shape[-1]
    padded = F.pad(x.float(), (0, -k % group))
    padded = padded.view(*padded.shape[:-1], -1, group)
    scale = padded.abs().amax(-1, keepdim=True).clamp_min(1e-10) / E4M3_MAX
    codes = (padded / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes.flatten(-2)[..., :k], scale.squeeze(-1)


def round_activations(x: Tensor, kind: str) -> Tensor:
    """x as a matmul of activation type ``kind`` sees it: as it is for 16 and 32, else through int8 or e4m3 and back."""
    if kind == "int8":
        codes, scale = quantize_int8_rows(x)
        return (codes.float() * scale).to(x.dtype)
    if kind == "fp8":
        codes, scale = quantize_fp8_rows(x)
        return (codes.float() * scale.repeat_interleave(128, -1)[..., : x.shape[-1]]).to(x.dtype)
    return x


def attend(
    q: Tensor,
    read: Callable[[int, int], tuple[Tensor, Tensor]],
    start: int,
    *,
    window: int | None = None,
    piece: int = 1024,
) -> Tensor:
    """Causal attention of q [S, heads, D] at positions start … start+S-1 over a cache, read piece by piece.

    ``read(a, b)`` gives keys and values [kv_heads, b-a, D] of positions a … b-1, in float32. The softmax is kept
    online (Milakov & Gimelshein 2018), so no more than one piece is ever expanded. A query sees the last ``window``
    positions, itself included, or all. Returns [S, heads, D] in the dtype of q.
    """
    tokens, heads, dim = q.shape
    total = start + tokens
    first = 0 if window is None else max(0, start - window + 1)
    grouped: Tensor | None = None
    peak = weight = out = torch.empty(0)
    at = torch.arange(start, total, device=q.device)
    for a in range(first, total, piece):
        b = min(a + piece, total)
        keys, values = read(a, b)
        kv_heads = keys.shape[0]
        if grouped is None:
            # [kv_heads, heads per kv head, S, D]
            grouped = q.float().view(tokens, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3) / math.sqrt(dim)
            peak = grouped.new_full((*grouped.shape[:-1], 1), -torch.inf)
            weight = torch.zeros_like(peak)
            out = torch.zeros_like(grouped)
        scores = grouped @ keys[:, None].transpose(-1, -2)
        there = torch.arange(a, b, device=q.device)
        hidden = there[None, :] > at[:, None]
        if window is not None:
            hidden |= there[None, :] <= at[:, None] - window
        scores.masked_fill_(hidden, -torch.inf)
        top = torch.maximum(peak, scores.amax(-1, keepdim=True))
        safe = torch.where(top.isinf(), 0.0, top)  # a query that sees nothing of this piece yet
        scores = torch.exp(scores - safe)
        shrink = torch.exp(peak - safe)
        weight = weight * shrink + scores.sum(-1, keepdim=True)
        out = out * shrink + scores @ values[:, None]
        peak = top
    return (out / weight).permute(2, 0, 1, 3).reshape(tokens, heads, dim).to(q.dtype)


def route(
    x: Tensor, router: Tensor, correction: Tensor | None, top_k: int, *, normalise: bool, norm_min: float
) -> tuple[Tensor, Tensor]:
    """Choose experts for x [S, H]: softmax of x @ routerᵀ in float32, the top k of it plus the correction bias [E].

    The correction only selects; the weights are the plain probabilities, divided by max(their sum, norm_min) if
    ``normalise``. Returns weights [S, k] float32 and experts [S, k] int64.
    """
    chances = torch.softmax(x.float() @ router.float().t(), -1)
    chosen = torch.topk(chances if correction is None else chances + correction, top_k, dim=-1).indices
    weights = chances.gather(-1, chosen)
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(norm_min)
    return weights, chosen
