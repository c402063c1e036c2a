"""torchao's tensors as transformers saves them: ``module._weight_qdata``, ``_scale`` and ``_zero_point``.

The file's metadata names each weight's class: Int8Tensor and IntxUnpackedToInt8Tensor have codes int8 [N, K] of 8 or
fewer bits and a scale (and zero) a row or a group; Float8Tensor has e4m3 codes. Packed int4 is laid out for one GPU's
kernels and is not read.
"""

from collections.abc import Mapping
from typing import Any, Final

import torch

from qrun.errors import CheckpointError
from qrun.formats import AffineFormat, Format, QTensor, Shape, from_tensors
from qrun.readers.base import FLOATS, Reader, Tensors, mapping, refuse
from qrun.readers.columns import fitted, signed_codes
from qrun.readers.fp8 import e4m3, e4m3_format
from qrun.tensorfile import load_json

_ENDS = ("._weight_qdata", "._weight_scale", "._weight_zero_point")
_INTEGERS: Final = ("Int8Tensor", "IntxUnpackedToInt8Tensor")


class TorchAOReader(Reader):
    """See the module."""

    def __init__(self, tensors: Tensors, config: Mapping[str, Any]) -> None:
        super().__init__(tensors, config)
        self._notes: dict[str, Mapping[str, Any]] = {}

    def holds(self, module: str) -> bool:
        return module + "._weight_qdata" in self.tensors

    def parts(self, module: str) -> tuple[str, ...]:
        return tuple(module + end for end in _ENDS if module + end in self.tensors)

    def format(self, module: str, shape: Shape) -> Format:
        n, k = shape
        kind, data = self._described(module)
        block = data.get("block_size")
        if kind == "Float8Tensor":
            self.expect(module + "._weight_qdata", shape, torch.float8_e4m3fn)
            rows, columns = self._block(module, block)
            sized = None if columns == k and rows in (1, n) else (rows, columns)
            return e4m3_format(self, module + "._weight_scale", shape, sized)
        if kind not in _INTEGERS:
            raise refuse(f"{module} is a torchao {kind or 'tensor of no known class'}")
        bits = self._bits(module, data)
        rows, group = self._block(module, block)
        if rows != 1 or k % group or (group != k and group % 8):
            raise refuse(f"{module} [{n}, {k}] has torchao blocks of [{rows}, {group}]")
        self.expect(module + "._weight_qdata", shape, torch.int8)
        self.expect(module + "._weight_scale", (n, k // group), *FLOATS)
        zeros = module + "._weight_zero_point"
        symmetric = zeros not in self.tensors
        if not symmetric:
            self.expect(zeros, (n, k // group), torch.int8)
            symmetric = not bool(self.tensors.read(zeros).any())
        if symmetric and group == k:
            return AffineFormat(bits, 0, True)
        if group % 8:
            raise refuse(f"{module} [{n}, {k}] has torchao groups of {group}")
        return AffineFormat(bits, group, symmetric, scale_dtype=self.tensors.dtype(module + "._weight_scale"))

    def read(self, module: str, shape: Shape) -> QTensor:
        form = self.format(module, shape)
        codes, scale = (self.tensors.read(module + end) for end in _ENDS[:2])
        if not isinstance(form, AffineFormat):
            return e4m3(form, shape, codes, scale)
        parts = {
            "codes": fitted(signed_codes(codes, form.bits, module), form, shape[1]),
            "scale": scale.to(form.scale_dtype),
        }
        if not form.symmetric:
            zero = self.tensors.read(module + "._weight_zero_point")
            parts["zero"] = signed_codes(zero, form.bits, module)
        return from_tensors(form, shape, parts)

    def _described(self, module: str) -> tuple[str, Mapping[str, Any]]:
        """The class of the weight and its attributes, from the file's metadata."""
        if module not in self._notes:
            text = self.tensors.metadata(module + "._weight_qdata").get(module + ".weight", "{}")
            if len(text) > 1 << 16:
                raise CheckpointError(f"{module} has metadata of {len(text)} characters: fetch the model again")
            self._notes[module] = load_json(text.encode(), f"the metadata of {module}")
        found = self._notes[module]
        kind = found.get("_type")
        return (kind if isinstance(kind, str) else ""), mapping(found.get("_data"))

    def _bits(self, module: str, data: Mapping[str, Any]) -> int:
        target = mapping(data.get("target_dtype")).get("_data", "int8")
        bits = str(target).removeprefix("int")
        if bits not in ("2", "3", "4", "5", "6", "7", "8"):
            raise refuse(f"{module} has torchao codes of type {target!r}")
        return int(bits)

    def _block(self, module: str, block: object) -> tuple[int, int]:
        match block:
            case [int(rows), int(columns)] if 0 < rows <= 1 << 24 and 0 < columns <= 1 << 24:
                return rows, columns
            case _:
                raise refuse(f"{module} has a torchao block_size {block!r}")
