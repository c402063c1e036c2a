"""AWQ's GEMM layout: 4-bit codes along the rows, eight to a word in an order of their own.

qweight int32 [K, N/8] and qzeros int32 [G, N/8]: nibble i of word c is that of row 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i];
scales f16 [G, N]. w = (q − z) · s.
"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from qrun.formats import AffineFormat, Format, QTensor, Shape, from_tensors
from qrun.readers.base import FLOATS, Reader, Tensors, refuse

_ENDS = (".qweight", ".qzeros", ".scales")
_PLACE: Final = (0, 4, 1, 5, 2, 6, 3, 7)
"""The nibble of each row of eight."""
_ROWS: Final = ([0, 4, 1, 5], [2, 6, 3, 7])
"""The rows at the places 0, 2, 4, 6, and those at 1, 3, 5, 7."""
_LOW: Final = 0x0F0F0F0F


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
        form = self.format(module, shape)
        scale = self.tensors.read(module + ".scales").t().contiguous()
        parts = {
            "codes": packed_rows(self.tensors.read(module + ".qweight")),
            "scale": scale,
            "zero": unpacked_rows(self.tensors.read(module + ".qzeros")),
        }
        return from_tensors(form, shape, parts)


def packed_rows(words: Tensor) -> Tensor:
    """u8 [N, K/2], even k in the low nibble, from int32 words [K, N/8]."""
    words = words.t().contiguous()
    even, odd = words[:, ::2], words[:, 1::2]
    # Of each pair of columns, the nibbles at even places and those at odd ones: four bytes each, the rows of _ROWS.
    halves = (even & _LOW) | (odd & _LOW) << 4, (even >> 4) & _LOW | (odd & ~_LOW)
    out = torch.empty(words.shape[0], 8, even.shape[1], dtype=torch.uint8)
    for half, rows in zip(halves, _ROWS, strict=True):
        out[:, rows] = half.contiguous().view(torch.uint8).view(*half.shape, 4).transpose(1, 2)
    return out.flatten(0, 1)


def unpacked_rows(words: Tensor) -> Tensor:
    """u8 [N, G] from int32 words [G, N/8]."""
    words = words.t()
    return torch.stack([(words >> (4 * place)) & 15 for place in _PLACE], 1).to(torch.uint8).flatten(0, 1)
