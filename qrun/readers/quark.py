"""AMD's Quark, as it exports to Hugging Face: ``weight``, ``weight_scale`` and ``weight_zero_point`` of a module.

uint4 and int4: weight int32 [K, N/8] and zeros [G, N/8] in AWQ's order of nibbles, int4's in two's complement; scale
[G, N]. int8: weight int8 [N, K], scale and zero [N]. fp8_e4m3: a scale in all, or one a row. w = (q − z) · scale.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from qrun.formats import AffineFormat, Format, QTensor, Shape, from_tensors
from qrun.readers.awq import packed_rows, unpacked_rows
from qrun.readers.base import FLOATS, Reader, Tensors, mapping, refuse, setting
from qrun.readers.columns import fitted, signed_codes
from qrun.readers.fp8 import e4m3, e4m3_format

_ENDS = (".weight", ".weight_scale", ".weight_zero_point", ".input_scale", ".input_zero_point")
_TYPES = (torch.int32, torch.int8, torch.float8_e4m3fn)


class QuarkReader(Reader):
    """See the module."""

    def __init__(self, tensors: Tensors, config: Mapping[str, Any]) -> None:
        super().__init__(tensors, config)
        method: object = mapping(config.get("export")).get("pack_method", "reorder")
        if method != "reorder":
            raise refuse(f"quant_method 'quark' with pack_method {method!r}")
        self._layers = mapping(config.get("layer_quant_config"))

    def holds(self, module: str) -> bool:
        name = module + ".weight"
        return name in self.tensors and self.tensors.dtype(name) in _TYPES and module + ".weight_scale" in self.tensors

    def parts(self, module: str) -> tuple[str, ...]:
        return tuple(module + end for end in _ENDS if module + end in self.tensors)

    def format(self, module: str, shape: Shape) -> Format:
        n, k = shape
        spec = self._spec(module)
        kind, name = spec.get("dtype"), module + ".weight"
        if kind in ("uint4", "int4"):
            group = setting(spec, "group_size", int)
            if group < 8 or group % 8 or k % group or n % 8:
                raise refuse(f"{module} [{n}, {k}] has Quark groups of {group}")
            self.expect(name, (k, n // 8), torch.int32)
            self.expect(name + "_scale", (k // group, n), *FLOATS)
            self.expect(name + "_zero_point", (k // group, n // 8), torch.int32)
            symmetric = kind == "int4" and not bool(self.tensors.read(name + "_zero_point").any())
            return AffineFormat(4, group, symmetric, scale_dtype=self.tensors.dtype(name + "_scale"))
        if kind == "int8":
            self.expect(name, shape, torch.int8)
            self.expect(name + "_scale", (n,), *FLOATS)
            zeros = name + "_zero_point"
            if zeros in self.tensors or spec.get("symmetric") is not True:
                self.expect(zeros, (n,), torch.int8)
            if (zeros not in self.tensors and spec.get("symmetric") is True) or not bool(
                self.tensors.read(zeros).any()
            ):
                return AffineFormat(8, 0, True)
            if k % 8:
                raise refuse(f"{module} [{n}, {k}] has zero points and rows of no whole words")
            return AffineFormat(8, k, scale_dtype=self.tensors.dtype(name + "_scale"))
        if kind != "fp8_e4m3":
            raise refuse(f"{module} has Quark weights of type {kind!r}")
        self.expect(name, shape, torch.float8_e4m3fn)
        return e4m3_format(self, name + "_scale", shape, None)

    def read(self, module: str, shape: Shape) -> QTensor:
        form = self.format(module, shape)
        codes, scale = self.tensors.read(module + ".weight"), self.tensors.read(module + ".weight_scale")
        if not isinstance(form, AffineFormat):
            return e4m3(form, shape, codes, scale)
        zero: Tensor | None = None if form.symmetric else self.tensors.read(module + ".weight_zero_point")
        if form.bits == 4:
            flip = self._spec(module).get("dtype") == "int4"  # two's complement, counted from the middle instead
            parts = {"codes": packed_rows(codes) ^ (0x88 * flip), "scale": scale.t().contiguous()}
            zero = None if zero is None else unpacked_rows(zero) ^ (8 * flip)
        else:
            parts = {
                "codes": fitted(signed_codes(codes, 8, module), form, shape[1]),
                "scale": scale.view(-1, 1).to(form.scale_dtype),
            }
            zero = None if zero is None else signed_codes(zero, 8, module).view(-1, 1)
        return from_tensors(form, shape, parts if zero is None else {**parts, "zero": zero})

    def _spec(self, module: str) -> Mapping[str, Any]:
        """The settings of a module's weight: those of the first pattern that names it, or the global ones."""
        found = next((spec for pattern, spec in self._layers.items() if fnmatchcase(module, pattern)), None)
        return mapping(mapping(found or self.config.get("global_quant_config")).get("weight"))
