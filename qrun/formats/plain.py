"""Unquantized storage: BF16 or FP32 values as they are."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qrun.formats.base import Format, Layout, QTensor, Shape


@dataclass(frozen=True)
class PlainFormat(Format):
    """codes: the values themselves, ``dtype`` [..., N, K]."""

    family: ClassVar[str] = "bf16"
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return {torch.bfloat16: "bf16", torch.float32: "fp32"}.get(self.dtype, str(self.dtype))

    def layout(self, shape: Shape) -> Layout:
        return {"codes": (shape, self.dtype)}

    def dequantize(self, q: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values in ``dtype``; the stored tensor itself where that is its dtype."""
        return q.codes.to(dtype)

    def _shared(self, amax: Tensor) -> dict[str, Tensor]:
        if not bool(torch.isfinite(amax.to(self.dtype))):
            raise ValueError(f"non-finite weights: {amax.item():g} is more than {self} can hold")
        return {}

    def _encode(self, w: Tensor, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"codes": w}

    def _decode(self, parts: Mapping[str, Tensor], k: int) -> Tensor:
        return parts["codes"].float()
