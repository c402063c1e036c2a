"""The scale (and zero point) of each group of weights that costs least where inputs weigh differently.

The search of :mod:`qrun.formats.search` knows the weights alone; here each input has an importance, the diagonal of
what calibration saw. Knows neither layers nor files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from qrun.formats.search import reciprocal

RATIOS: Final = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)


@dataclass(frozen=True)
class Grid:
    """What codes mean: w = (q − zero) · scale, q in 0 … 2^bits − 1. scale and zero [M, 1], float32.

    Scales hold what ``dtype`` can; one may be negative, where the lowest code, which has no positive twin, pays.
    """

    bits: int
    scale: Tensor
    zero: Tensor

    def codes(self, w: Tensor) -> Tensor:
        """The nearest codes to w [M, n], as float32."""
        return (w * reciprocal(self.scale)).round_().add_(self.zero).clamp_(0, 2**self.bits - 1)

    def values(self, codes: Tensor) -> Tensor:
        """What codes stand for."""
        return (codes - self.zero) * self.scale


def find_grid(
    w: Tensor, importance: Tensor, bits: int, symmetric: bool, *,
    ratios: Sequence[float] = RATIOS, dtype: torch.dtype = torch.bfloat16,
) -> Grid:  # fmt: skip
    """The grid of each row of w [M, g] that minimises Σ importance · (w − ŵ)², importance [g] or [M, g].

    ``ratios`` are how far the range is narrowed, of which the best is taken.
    """
    top = 2**bits - 1
    low, high = torch.aminmax(w, dim=1, keepdim=True)
    low, high = low.clamp(max=0), high.clamp(min=0)
    middle = torch.full_like(low, 2 ** (bits - 1))
    absmax = torch.maximum(-low, high)
    best = torch.full_like(low, torch.inf)
    found = Grid(bits, torch.zeros_like(low), middle)

    def consider(scale: Tensor, zero: Tensor) -> None:
        nonlocal best, found
        grid = Grid(bits, scale.to(dtype).float(), zero)
        steps = grid.codes(w).sub_(zero)
        weighted = steps * importance
        norm = (weighted * steps).sum(1, keepdim=True)
        fitted = (weighted * w).sum(1, keepdim=True).div_(norm)
        fitted = torch.where(norm > 0, fitted, grid.scale).to(dtype).float()
        for candidate in (grid.scale, fitted):
            error = ((steps * candidate).sub_(w).square_().mul_(importance)).sum(1, keepdim=True)
            better = error < best
            best = torch.where(better, error, best)
            found = Grid(bits, torch.where(better, candidate, found.scale), torch.where(better, zero, found.zero))

    signed = torch.where(high > -low, -absmax, absmax) / 2 ** (bits - 1)
    for ratio in ratios:
        if symmetric:
            consider(absmax * (ratio / (top // 2)), middle)
            if bits <= 4:  # the largest weight at the lowest code
                consider(signed * ratio, middle)
        else:
            scale = ((high - low) * (ratio / top)).to(dtype).float()
            consider(scale, (low * reciprocal(scale)).mul_(-ratio).round_().clamp_(0, top))
    return found
