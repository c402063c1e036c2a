"""Scales of a matrix's inputs that make it round better, taken off what comes before it, so that nothing is stored.

AWQ (Lin et al. 2023) makes the columns of large inputs large; SmoothQuant (Xiao et al. 2022) moves the outliers of
inputs that are rounded too into the weights. Of several strengths the one with the least error on a sample is taken,
none included.
"""

from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from qrun.formats import AffineFormat, Format, PlainFormat
from qrun.kernels.reference import round_activations
from qrun.quantize.grid import find_grid

SAMPLE: Final = 512
"""Inputs that the scales are tried on."""
_STRENGTHS: Final = (0.25, 0.4, 0.55, 0.7, 0.85, 1.0)
_FEW: Final = (1.0, 0.85)
_MOST: Final = 6.0  # octaves between the middle and the largest scale


def best_scale(
    x: Tensor, weights: Sequence[tuple[Tensor, Format]], activations: str, *,
    exact: bool = False, repeat: int = 1, parts: int = 1,
) -> Tensor | None:  # fmt: skip
    """The scale [K] by which the columns of every weight [N, K] are best multiplied, and the inputs x [S, K] divided.

    ``exact``: only powers of two, which change nothing in BF16. ``repeat`` > 1: the inputs are ``parts`` runs of
    ``repeat`` copies (heads that share values), which share their scales. None where no scaling is better than none.
    """
    wanted = [x @ w.t() for w, _ in weights]
    best: Tensor | None = None
    least = _error(x, weights, wanted, activations)
    for scale in _candidates(x, [w for w, _ in weights], activations):
        if repeat > 1:
            runs = scale.view(parts, repeat, -1)
            scale = runs.log2().mean(1, keepdim=True).exp2().expand_as(runs).reshape(-1)
        if exact:
            scale = scale.log2().round().exp2()
        error = _error(x / scale, [(w * scale, form) for w, form in weights], wanted, activations)
        if error < least:
            best, least = scale, error
    return best


def _candidates(x: Tensor, weights: Sequence[Tensor], activations: str) -> Iterator[Tensor]:
    size = x.abs().mean(0)
    yield from (_balance(size, strength) for strength in _STRENGTHS)
    if activations != "16":
        peak = x.abs().amax(0)
        tallest = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
        yield from (_balance(peak, strength, tallest) for strength in _STRENGTHS)


def _balance(size: Tensor, strength: float, against: Tensor | None = None) -> Tensor:
    """size^strength / against^(1 − strength), around 1 and not further than a few octaves from it."""
    octaves = strength * size.clamp_min(1e-12).log2()
    if against is not None:
        octaves -= (1 - strength) * against.clamp_min(1e-12).log2()
    return (octaves - octaves.median()).clamp_(-_MOST, _MOST).exp2()


def _error(x: Tensor, weights: Sequence[tuple[Tensor, Format]], wanted: Sequence[Tensor], activations: str) -> float:
    seen = round_activations(x, activations)
    importance = x.square().mean(0).add_(1e-12)
    total = 0.0
    for (w, form), target in zip(weights, wanted, strict=True):
        total += float((seen @ _rounded(w, importance, form).t() - target).square().sum())
    return total


def _rounded(w: Tensor, importance: Tensor, form: Format) -> Tensor:
    if isinstance(form, PlainFormat):
        return w
    if not isinstance(form, AffineFormat):
        return form.quantize(w).dequantize()
    group = form.group or w.shape[1]
    rows = w.reshape(-1, group)
    each = importance.view(-1, group).repeat(w.shape[0], 1) if group < w.shape[1] else importance
    grid = find_grid(rows, each, form.bits, form.symmetric, ratios=_FEW)
    return grid.values(grid.codes(rows)).view_as(w)
