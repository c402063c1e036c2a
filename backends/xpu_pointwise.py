"""What stands between products on an Intel GPU: RMSNorm and SwiGLU, float32 or half in, half out. It knows no weights
but norms."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qrun.backends import xpu_ipex
from qrun.backends.base import BOUNDS
from qrun.backends.xpu_device import XPUCard
from qrun.backends.xpu_tiers import Tier, Tiers
from qrun.backends.xpu_triton import usable
from qrun.kernels import reference

Norm = Callable[[Tensor, Tensor, float], Tensor]
"""x float32 [S, H], weight float32 [H], eps -> half [S, H]."""
Silu = Callable[[Tensor], Tensor]
"""gate and up, half or float32 [S, 2I] -> half [S, I]."""


@dataclass(frozen=True)
class Pointwise:
    """One way to compute one of them."""

    tier: Tier
    name: str
    call: Callable[..., Tensor]


def norm(card: XPUCard, tiers: Tiers) -> Pointwise:
    """The RMSNorm that is right on this card, a `Norm`."""
    half = card.half

    def native(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, eps).to(half)

    def plain(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return reference.rms_norm(x, weight, eps).to(half)

    def ipex(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return xpu_ipex.rms_norm(x, weight, eps, half)

    def triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        from qrun.kernels.gpu_norm import rms_norm

        out = _rows(x, x.shape[1], half)
        rms_norm(x, weight, eps, out=out)
        return out[:, : x.shape[1]].contiguous()

    ways = [Pointwise("native", "aten rms_norm", native), Pointwise("torch", "torch", plain)]
    if xpu_ipex.available(card):
        ways.append(Pointwise("ipex", "ipex rms_norm", ipex))
    if usable(card):
        ways.append(Pointwise("triton", "triton", triton))

    def trial(way: Pointwise) -> tuple[float, float]:
        random = torch.Generator().manual_seed(0)
        weight = (torch.rand(1024, generator=random) + 0.5).to(card.device)
        errors: list[float] = []
        for tokens in (1, 8):
            x = torch.randn(tokens, 1024, generator=random).to(card.device)
            errors.append(difference(way.call(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5)))
        return max(errors), BOUNDS["16"]

    return tiers.choose(f"rms_norm {half}", ways, trial)


def silu(card: XPUCard, tiers: Tiers) -> Pointwise:
    """The SwiGLU that is right on this card, a `Silu`."""
    half = card.half

    def plain(x: Tensor) -> Tensor:
        return reference.silu_mul(x.float()).to(half)

    def triton(x: Tensor) -> Tensor:
        from qrun.kernels.gpu_norm import silu_mul

        inner = x.shape[1] // 2
        out = _rows(x, inner, half)
        silu_mul(x, inner, out=out)
        return out[:, :inner].contiguous()

    ways = [Pointwise("torch", "torch", plain)]
    if usable(card):
        ways.append(Pointwise("triton", "triton", triton))

    def trial(way: Pointwise) -> tuple[float, float]:
        random = torch.Generator().manual_seed(0)
        errors: list[float] = []
        for tokens in (1, 8):
            x = (3 * torch.randn(tokens, 1536, generator=random)).to(card.device, half)
            errors.append(difference(way.call(x), reference.silu_mul(x.float())))
        return max(errors), BOUNDS["16"]

    return tiers.choose(f"silu_mul {half}", ways, trial)


def _rows(x: Tensor, width: int, half: torch.dtype) -> Tensor:
    """Room for as many rows, padded as the kernels write them."""
    return torch.empty(x.shape[0], width + -width % 128, dtype=half, device=x.device)


def difference(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|; infinite where anything is NaN, which no maximum of several would show."""
    if found.shape != wanted.shape:
        raise ValueError(f"{tuple(found.shape)} came out instead of {tuple(wanted.shape)}")
    wanted = wanted.float()
    error = float(((found.float() - wanted).square().sum() / wanted.square().sum().clamp_min(1e-30)).sqrt())
    return math.inf if math.isnan(error) else error
