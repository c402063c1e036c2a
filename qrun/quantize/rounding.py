"""One weight after another into its format: which format that is, how it is rounded, and what it cost.

Knows modules by Hugging Face's names and what calibration saw of their inputs; knows neither files nor a forward.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from qrun.errors import CheckpointError
from qrun.formats import (
    AffineFormat,
    CodebookFormat,
    Format,
    NvFp4Format,
    PlainFormat,
    QTensor,
    TrellisFormat,
    format_of,
    from_tensors,
)
from qrun.quantize.gptq import Codes, Hessian, gptq, nearest
from qrun.quantize.trellis import trellis_gptq
from qrun.recipe import WeightScheme

Method: TypeAlias = Literal["rtn", "gptq", "awq", "awq+gptq"]
METHODS: Final[tuple[Method, ...]] = get_args(Method)
LEAST_GROUP: Final = 32
"""The smallest group that serving engines have kernels for."""


@dataclass(frozen=True, kw_only=True)
class ModuleReport:
    """What became of one weight. Errors are relative: of the weights, and of the outputs on what calibration saw."""

    module: str
    scheme: str
    weight_error: float
    output_error: float | None
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """One weight: as stored, or none where it stays as it is, and the values that this stands for, float32 [N, K]."""

    stored: QTensor | None
    values: Tensor
    report: ModuleReport


def written_format(scheme: WeightScheme, columns: int) -> Format:
    """The format that ``scheme`` has in a directory for serving engines, which read less than qrun does.

    Integers are symmetric. A group of them that does not divide the columns is halved down to LEAST_GROUP, and where
    no group divides them the weight is int8 per channel.
    """
    if scheme.type != "int":
        form = format_of(scheme)
        if isinstance(form, CodebookFormat) and columns % form.group:
            return AffineFormat(8, 0, True)
        return replace(form, divides=True) if isinstance(form, NvFp4Format) else form
    group = scheme.group or 0
    if group == 0:
        return AffineFormat(scheme.bits, 0, True)
    while group >= LEAST_GROUP:
        if columns % group == 0:
            return AffineFormat(scheme.bits, group, True)
        group //= 2
    return AffineFormat(8, 0, True)


@dataclass(frozen=True)
class Rounder:
    """Rounds weights by module, each to its format; what stays as it is has a plain one.

    ``dtype`` holds the weights without loss, and their scales.
    """

    formats: Mapping[str, Format]
    method: Method
    dtype: torch.dtype

    def round(self, weights: Mapping[str, Tensor], hessian: Hessian | None) -> dict[str, Rounded]:
        """Weights [N, K] float32 that all read the same inputs, by module.

        Raises CheckpointError for values that no format holds.
        """
        forms = {module: self.formats[module] for module in weights}
        found: dict[str, Rounded] = {}
        for form in dict.fromkeys(forms.values()):
            names = [module for module in weights if forms[module] == form]
            found |= self._alike({name: weights[name] for name in names}, form, hessian)
        return {module: found[module] for module in weights}

    def _alike(self, weights: Mapping[str, Tensor], form: Format, hessian: Hessian | None) -> dict[str, Rounded]:
        """Weights of one format, rounded together: their rows do not know of each other."""
        stored: dict[str, QTensor | None]
        if isinstance(form, PlainFormat):
            stored, values = dict.fromkeys(weights), dict(weights)
        elif isinstance(form, TrellisFormat) and hessian is not None and "gptq" in self.method:
            stored = {module: trellis_gptq(w, hessian) for module, w in weights.items()}
            values = {module: q.dequantize() for module, q in stored.items() if q is not None}
        elif not isinstance(form, AffineFormat) or (hessian is None and form.group == 0):
            stored = dict(self._by_itself(weights, form))
            values = {module: q.dequantize() for module, q in stored.items() if q is not None}
        else:
            together = self._codes(torch.cat(list(weights.values())), form, hessian)
            stored, values, row = {}, {}, 0
            for module, w in weights.items():
                codes = together.rows(row, row + w.shape[0])
                stored[module], values[module] = codes.packed(), codes.values()
                row += w.shape[0]
        return {
            module: Rounded(
                stored=stored[module],
                values=values[module],
                report=_report(module, form, w, values[module], hessian),
            )
            for module, w in weights.items()
        }

    def _by_itself(self, weights: Mapping[str, Tensor], form: Format) -> Iterator[tuple[str, QTensor]]:
        try:
            if not isinstance(form, NvFp4Format):
                yield from ((module, form.quantize(w.to(self.dtype))) for module, w in weights.items())
                return
            # One global scale, for engines that make one matrix of them; a divisor, as it is stored.
            whole = replace(form, divides=False).quantize(torch.cat(list(weights.values())))
        except ValueError as error:
            raise CheckpointError(f"{next(iter(weights))}: {error}; the checkpoint is damaged") from error
        assert whole.scale is not None and whole.scale2 is not None, "the format has both"
        row = 0
        for module, w in weights.items():
            rows = slice(row, row + w.shape[0])
            parts = {"codes": whole.codes[rows], "scale": whole.scale[rows], "scale2": 1 / whole.scale2}
            yield module, from_tensors(form, tuple(w.shape), parts)
            row += w.shape[0]

    def _codes(self, w: Tensor, form: AffineFormat, hessian: Hessian | None) -> Codes:
        if hessian is None:
            return nearest(w, torch.ones(w.shape[1], device=w.device), form)
        if self.method in ("gptq", "awq+gptq"):
            # Few bits and small groups gain more from scales that follow the errors than from an order.
            return gptq(w, hessian, form, act_order=form.bits > 2 and (form.group == 0 or form.group > LEAST_GROUP))
        return nearest(w, hessian.importance, form)


def _report(module: str, form: Format, w: Tensor, values: Tensor, hessian: Hessian | None) -> ModuleReport:
    delta = values - w
    output: float | None = None
    if hessian is not None and hessian.count:
        whole = hessian.error(w)
        output = math.sqrt(max(0.0, hessian.error(delta)) / whole) if whole > 0 else 0.0
    norm = float(w.square().sum())
    return ModuleReport(
        module=module,
        scheme=str(form),
        weight_error=math.sqrt(float(delta.square().sum()) / norm) if norm > 0 else 0.0,
        output_error=output,
        tokens=0 if hessian is None else hessian.count,
    )
