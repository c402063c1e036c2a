"""The error-minimising search for one scale (and zero point) per group, over all groups at once.

Groups lie in columns, w [g, M], so that every step is a plain vectorised pass. For snapped values c = snap(w / s),
|w − s·c|² = |w|² − (2·s·Σwc − s²·Σc²): the bracket, the gain, is what is maximised, and s = Σwc / Σc² is its maximum
for given c. So every start of the search yields its own least-squares scale for free; the winner is refined by snapping
once more against it. Gains compare scales as they will be stored, never better ones.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Snap: TypeAlias = Callable[[Tensor, Tensor], object]
"""snap(t [g, M], zero [M]) rounds t in place to representable values, zero point taken off."""
Round: TypeAlias = Callable[[Tensor], Tensor]
"""Rounds scales to what the storage can hold, still as fp32."""


@dataclass(frozen=True)
class Start:
    """One scale [M] to begin from, already rounded, with the zero point [M] that goes with it."""

    scale: Tensor
    zero: Tensor


def search(w: Tensor, starts: Iterable[Start], snap: Snap, round_scale: Round, refinements: int = 1) -> Start:
    """The best scale and zero found for each column of ``w`` [g, M] (fp32); of equals the first."""
    snapped, product = torch.empty_like(w), torch.empty_like(w)
    best_gain = torch.full_like(w[0], -torch.inf)
    best = Start(torch.zeros_like(best_gain), torch.zeros_like(best_gain))

    def keep(gain: Tensor, scale: Tensor, zero: Tensor) -> None:
        nonlocal best_gain, best
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best = Start(torch.where(better, scale, best.scale), torch.where(better, zero, best.zero))

    def consider(start: Start) -> Tensor:
        torch.mul(w, reciprocal(start.scale), out=snapped)
        snap(snapped, start.zero)
        along = torch.mul(w, snapped, out=product).sum(0)
        norm = torch.mul(snapped, snapped, out=product).sum(0)
        keep(start.scale * (2 * along - start.scale * norm), start.scale, start.zero)
        fitted = round_scale(torch.where(norm > 0, along / norm, start.scale))
        keep(fitted * (2 * along - fitted * norm), fitted, start.zero)
        return fitted

    for start in starts:
        consider(start)
    for _ in range(refinements):
        consider(best)
    return best


def reciprocal(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where the scale is 0 or so small that its reciprocal overflows."""
    inverse = 1 / scale
    return torch.where(torch.isfinite(inverse), inverse, 0.0)


def affine_search(w: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Start]:
    """Codes (fp32 [g, M], 0 … 2^bits − 1), BF16-representable scales and integer zeros for ``w`` [g, M].

    A code q stands for (q − zero) · scale. Starts are the plain min/max (or absmax) range and that range narrowed.
    """
    top = 2**bits - 1
    low, high = torch.aminmax(w, dim=0)
    low, high = low.clamp_(max=0.0), high.clamp_(min=0.0)
    middle = torch.full_like(low, 2 ** (bits - 1))
    absmax = torch.maximum(-low, high)

    def start(ratio: float) -> Start:
        if symmetric:
            return Start(_bf16(absmax * (ratio / (top // 2))), middle)
        scale = _bf16(high * (ratio / top) - low * (ratio / top))
        return Start(scale, (low * reciprocal(scale)).mul_(-ratio).round_().clamp_(0, top))

    def snap(t: Tensor, zero: Tensor) -> object:
        return torch.clamp(t.round_(), -zero, top - zero, out=t)

    best = search(w, map(start, _RATIOS.get(bits, (1.0, 0.95))), snap, _bf16)
    codes = w * reciprocal(best.scale)
    snap(codes, best.zero)
    return codes.add_(best.zero), best


# How far to narrow the range: the fewer the levels, the more clipping pays.
_RATIOS = {2: (1.0, 0.9, 0.8, 0.7, 0.6), 3: (1.0, 0.9, 0.8, 0.7, 0.6), 4: (1.0, 0.9, 0.8)}


def _bf16(x: Tensor) -> Tensor:
    return x.bfloat16().float()
