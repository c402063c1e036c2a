"""Weights whose columns another tool has put into the order in which it rounded them (GPTQ's act-order)."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qrun.formats.base import Format, Layout, QTensor, Shape


@dataclass(frozen=True)
class PermutedFormat(Format):
    """A weight of the format ``inner`` with a tensor more; column order[j] of the weight is column j of the inner one.

    order: int32 [..., 1, K], a permutation of 0 … K−1.
    """

    family: ClassVar[str] = "permuted"
    inner: Format

    @property
    def row_align(self) -> int:
        """Rows are taken in runs that begin at multiples of it."""
        return self.inner.row_align

    def __str__(self) -> str:
        return f"{self.inner} act-order"

    def layout(self, shape: Shape) -> Layout:
        return {**self.inner.layout(shape), "order": ((*shape[:-2], 1, shape[-1]), torch.int32)}

    def _rows_per(self, name: str) -> int:
        return sys.maxsize if name == "order" else self.inner._rows_per(name)

    def unordered(self, q: QTensor) -> QTensor:
        """The same codes as a weight of the inner format, for activations x[..., order]."""
        return replace(q, format=self.inner, order=None)

    def _encode(self, w: Tensor, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raise ValueError(f"{self} is read from checkpoints only; quantize to {self.inner}")

    def _decode(self, parts: Mapping[str, Tensor], k: int) -> Tensor:
        inner = self.inner._decode({name: tensor for name, tensor in parts.items() if name != "order"}, k)
        return torch.empty_like(inner).index_copy_(-1, parts["order"][0].long(), inner)
