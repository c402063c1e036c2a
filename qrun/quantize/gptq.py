"""Rounding that makes up for itself: GPTQ (Frantar et al. 2022) over one matrix and what its inputs looked like.

Columns are rounded one after another, and the error of each is spread over those that follow, as the inputs correlate.
Knows neither layers nor files.
"""

from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor

from qrun.errors import CheckpointError
from qrun.formats import AffineFormat, QTensor, from_tensors
from qrun.formats.packing import pack
from qrun.quantize.grid import Grid, find_grid

DAMP: Final = 0.01
"""What is added to the Hessian's diagonal, of its mean."""
_MOST_DAMP: Final = 100.0
_BLOCK: Final = 128


@dataclass
class Hessian:
    """Σ x xᵀ [K, K] of a matrix's inputs, float32, and how many there were."""

    sum: Tensor
    count: int = 0

    @classmethod
    def zeros(cls, k: int, device: torch.device | str = "cpu") -> "Hessian":
        return cls(torch.zeros(k, k, device=device))

    def add(self, x: Tensor) -> None:
        """Account for inputs x [S, K]."""
        x = x.float()
        self.sum.addmm_(x.t(), x)
        self.count += x.shape[0]

    @property
    def importance(self) -> Tensor:
        """The mean square of each input [K]; ones where nothing was seen."""
        found = self.sum.diagonal() / max(1, self.count)
        return found + DAMP * found.mean() if bool(found.any()) else torch.ones_like(found)

    def error(self, delta: Tensor) -> float:
        """Σ |delta · x|² over the inputs, for a change delta [N, K] of the weights."""
        return float((delta @ self.sum).mul_(delta).sum())


@dataclass
class Codes:
    """A rounded matrix: codes [N, K] in 0 … 2^bits − 1, scale and zero [N, G], all float32, and the format's."""

    form: AffineFormat
    codes: Tensor
    scale: Tensor
    zero: Tensor

    def rows(self, start: int, stop: int) -> "Codes":
        """Some rows of the matrix."""
        return Codes(self.form, self.codes[start:stop], self.scale[start:stop], self.zero[start:stop])

    def values(self) -> Tensor:
        """The weights they stand for, float32 [N, K]."""
        n, k = self.codes.shape
        grouped = self.codes.reshape(n, self.scale.shape[1], -1)
        return ((grouped - self.zero[..., None]) * self.scale[..., None]).view(n, k)

    def packed(self) -> QTensor:
        """The same as the format stores it."""
        form, (n, k) = self.form, self.codes.shape
        middle = 2 ** (form.bits - 1)
        codes = torch.nn.functional.pad(self.codes, (0, form.padded(k) - k), value=float(middle))
        stored = (codes - middle).to(torch.int8) if form.signed else pack(codes.to(torch.uint8), form.bits)
        dtype = form.layout((n, k))["scale"][1]
        tensors = {"codes": stored, "scale": self.scale.to(dtype)}
        if not form.symmetric:
            tensors["zero"] = self.zero.to(torch.uint8)
        return from_tensors(form, (n, k), tensors)


def nearest(w: Tensor, importance: Tensor, form: AffineFormat) -> Codes:
    """w [N, K] float32 rounded to nearest, in the grids that cost least by the importance [K] of its inputs."""
    n, k = w.shape
    group = form.group or k
    rows = w.reshape(-1, group)
    each = importance.view(-1, group).repeat(n, 1) if group < k else importance
    grid = find_grid(rows, each, form.bits, form.symmetric)
    return Codes(form, grid.codes(rows).view(n, k), grid.scale.view(n, -1), grid.zero.view(n, -1))


def gptq(w: Tensor, hessian: Hessian, form: AffineFormat, *, act_order: bool = False) -> Codes:
    """w [N, K] float32 in ``form``, the error of its outputs on the observed inputs made small.

    The group must divide K. ``act_order`` rounds the columns with the largest inputs first, within groups that stay
    where they are, so that nothing of the order has to be stored.
    """
    n, k = w.shape
    if hessian.count == 0 or not bool(hessian.sum.any()):
        return nearest(w, torch.ones(k, device=w.device), form)
    importance = hessian.importance
    group = form.group or k
    fixed = nearest(w, importance, form) if act_order or group == k else None
    order = torch.argsort(importance, descending=True) if act_order else torch.arange(k, device=w.device)
    inverse = _inverse_root_in_place(hessian.sum[order[:, None], order])
    work = w[:, order].clone()
    codes = torch.empty_like(work)
    scale = torch.empty(n, k // group, device=w.device) if fixed is None else fixed.scale
    zero = torch.empty_like(scale) if fixed is None else fixed.zero
    place = cast(list[int], (order // group).tolist())  # pyright: ignore[reportUnknownMemberType]
    block = max(_BLOCK // group, 1) * group if group < k else _BLOCK
    for start in range(0, k, block):
        stop = min(start + block, k)
        here = work[:, start:stop]
        errors = torch.empty_like(here)
        for j in range(start, stop):
            g = place[j]
            if fixed is None and j % group == 0:
                grid = find_grid(
                    here[:, j - start : j - start + group], importance[j : j + group], form.bits, form.symmetric
                )
                scale[:, g : g + 1], zero[:, g : g + 1] = grid.scale, grid.zero
            grid = Grid(form.bits, scale[:, g : g + 1], zero[:, g : g + 1])
            column = here[:, j - start : j - start + 1]
            chosen = grid.codes(column)
            codes[:, j : j + 1] = chosen
            error = (column - grid.values(chosen)) / inverse[j, j]
            here[:, j - start :].addmm_(error, inverse[j : j + 1, j:stop], alpha=-1)
            errors[:, j - start : j - start + 1] = error
        work[:, stop:].addmm_(errors, inverse[start:stop, stop:], alpha=-1)
    out = torch.empty_like(codes)
    out[:, order] = codes
    return Codes(form, out, scale, zero)


def inverse_root(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse."""
    return _inverse_root_in_place(hessian.clone())


def _inverse_root_in_place(hessian: Tensor) -> Tensor:
    """The same, the Hessian overwritten: of a wide layer it is the largest tensor there is."""
    diagonal = hessian.diagonal().clone()
    damp = DAMP
    while damp <= _MOST_DAMP:
        hessian.diagonal().copy_(diagonal + damp * diagonal.mean())
        factor = _cholesky(hessian)
        if factor is not None:
            inverse = torch.cholesky_inverse(factor)
            del factor
            root = _cholesky(inverse, upper=True)
            if root is not None:
                return root
        damp *= 10
    raise CheckpointError("the activations on the calibration text are not finite: the checkpoint is damaged")


def _cholesky(a: Tensor, *, upper: bool = False) -> Tensor | None:
    """The factor of a symmetric matrix; none if it is not positive."""
    factor, failed = cast(tuple[Tensor, Tensor], cast(Any, torch.linalg).cholesky_ex(a, upper=upper))
    return None if int(failed) else factor
