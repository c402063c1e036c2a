"""Number formats for weights and for the cache: values <-> codes and scales, in canonical layouts."""

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

from qrun.formats.affine import AffineFormat
from qrun.formats.base import Format, Layout, QTensor, Shape, join_rows
from qrun.formats.codebook import E2M1, NF4, CodebookFormat, MxFp4Format, NvFp4Format
from qrun.formats.fp8 import Fp8Format
from qrun.formats.kv import KVFormat, hadamard32, kv_format
from qrun.formats.permuted import PermutedFormat
from qrun.formats.plain import PlainFormat
from qrun.formats.trellis import TrellisFormat
from qrun.recipe import WeightScheme, WeightType

__all__ = [
    "AffineFormat",
    "CodebookFormat",
    "Format",
    "Fp8Format",
    "KVFormat",
    "Layout",
    "MxFp4Format",
    "NvFp4Format",
    "PermutedFormat",
    "PlainFormat",
    "QTensor",
    "Shape",
    "TrellisFormat",
    "format_of",
    "from_tensors",
    "hadamard32",
    "join_rows",
    "kv_format",
]

_FORMATS: Final[Mapping[WeightType, Callable[[WeightScheme], Format]]] = {
    "bf16": lambda scheme: PlainFormat(torch.bfloat16),
    "fp32": lambda scheme: PlainFormat(torch.float32),
    "int": lambda scheme: AffineFormat(scheme.bits, scheme.group or 0, scheme.symmetric),
    "fp8": lambda scheme: Fp8Format(),
    "nf4": lambda scheme: CodebookFormat("nf4", NF4, 64),
    "fp4": lambda scheme: CodebookFormat("fp4", E2M1, 64),
    "mxfp4": lambda scheme: MxFp4Format(),
    "nvfp4": lambda scheme: NvFp4Format(),
    "trellis": lambda scheme: TrellisFormat(),
}


def format_of(scheme: WeightScheme) -> Format:
    """The format that stores weights of ``scheme``."""
    return _FORMATS[scheme.type](scheme)


def from_tensors(format: Format, shape: Shape, tensors: Mapping[str, Tensor]) -> QTensor:
    """A weight of logical ``shape`` from tensors that were stored, such as :meth:`QTensor.tensors` gives.

    Raises:
        ValueError: a tensor is missing or superfluous, or its shape or dtype is not the layout's.
    """
    layout = format.layout(tuple(shape))
    if layout.keys() != tensors.keys():
        raise ValueError(f"{format} needs the tensors {', '.join(layout)}; found {', '.join(tensors) or 'none'}")
    for name, (size, dtype) in layout.items():
        found = tensors[name]
        if tuple(found.shape) != size or found.dtype != dtype:
            raise ValueError(f"{format} {name} must be {dtype} {size}; found {found.dtype} {tuple(found.shape)}")
    return QTensor(format=format, shape=tuple(shape), **tensors)
