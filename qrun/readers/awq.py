"""AWQ's GEMM layout: 4-bit codes along the rows, eight to a word in an order of their own.

qweight int32 [K, N/8] and qzeros int32 [G, N/8]: nibble i of word c is that of row 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i];
scales f16 [G, N]. w = (q − z) · s. Quark's uint4 is packed in the same order.
"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from qrun.formats import AffineFormat, Format, QTensor, Shape, from_tensors
from qrun.formats.packing import pack, unpack
from qrun.readers.base import FLOATS, Reader, Tensors, refuse

_ENDS = (".qweight", ".qzeros", ".scales")
_PLACE: Final = (0, 4, 1, 5, 2, 6, 3, 7)
"""The nibble of each row of eight."""


class AWQReader(Reader):
    """See the module."""

    def __init__(self, tensors: Tensors, config: Mapping[str, Any]) -> None:
        super().__init__(tensors, config)
        version = self.setting("version", str, "gemm").lower()
        bits = config.get("bits", config.get("w_bit", 4))
        if version != "gemm" or bits != 4:
            raise refuse(f"quant_method 'awq' with version {version!r} and {bits!r} bits")
        group = config.get("group_size", config.get("q_group_size", 128))
        if not isinstance(group, int) or isinstance(group, bool):
            raise refuse(f"quant_method 'awq' with group_size {group!r}")
        self._group = group

    def holds(self, module: str) -> bool:
        return module + ".qweight" in self.tensors

    def parts(self, module: str) -> tuple[str, ...]:
        return tuple(module + end for end in _ENDS if module + end in self.tensors)

    def format(self, module: str, shape: Shape) -> Format:
        n, k = shape
        group = k if self._group == -1 else self._group
        if group < 8 or group % 8 or k % group or n % 8:
            raise refuse(f"{module} [{n}, {k}] has AWQ groups of {group}")
        self.expect(module + ".qweight", (k, n // 8), torch.int32)
        self.expect(module + ".qzeros", (k // group, n // 8), torch.int32)
        self.expect(module + ".scales", (k // group, n), *FLOATS)
        return AffineFormat(4, group, scale_dtype=self.tensors.dtype(module + ".scales"))

    def read(self, module: str, shape: Shape) -> QTensor:
        codes = pack(self._rows(module + ".qweight"), 4)
        scale = self.tensors.read(module + ".scales").t().contiguous()
        zero = self._rows(module + ".qzeros")
        return from_tensors(self.format(module, shape), shape, {"codes": codes, "scale": scale, "zero": zero})

    def _rows(self, name: str) -> Tensor:
        """u8 [N, columns] of a tensor int32 [columns, N/8]."""
        nibbles = unpack(self.tensors.read(name).contiguous().view(torch.uint8), 4)
        eights = nibbles.view(nibbles.shape[0], -1, 8)[:, :, list(_PLACE)]
        return eights.flatten(1).t().contiguous()
