"""Weights in e4m3 as Hugging Face's ``fp8`` method and DeepSeek write them: a multiplier per block, row or tensor.

weight float8_e4m3fn [N, K]; weight_scale_inv (or weight_scale) float32 [⌈N/bn⌉, ⌈K/bk⌉], w = q · scale. With
``scale_fmt`` ue8m0 the scales are powers of two, stored as such floats or as their exponents.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from qrun.formats import Format, Fp8Format, QTensor, Shape, from_tensors
from qrun.readers.base import FLOATS, Reader, Tensors, refuse

_SCALES = (".weight_scale_inv", ".weight_scale")
_BESIDE = (".input_scale", ".activation_scale", ".weight_scale_inv", ".weight_scale")


class Fp8Reader(Reader):
    """See the module."""

    def __init__(self, tensors: Tensors, config: Mapping[str, Any]) -> None:
        super().__init__(tensors, config)
        block: object = config.get("weight_block_size")
        kind = config.get("fmt", "e4m3")
        if kind not in ("e4m3", "float8_e4m3fn"):
            raise refuse(f"quant_method 'fp8' with fmt {kind!r}")
        self._block: tuple[int, int] | None = None
        if block is not None:
            sizes = cast(list[object], block) if isinstance(block, list) else []
            if len(sizes) != 2 or not all(type(size) is int and 0 < size <= 1 << 16 for size in sizes):
                raise refuse(f"quant_method 'fp8' with weight_block_size {block!r}")
            self._block = cast(tuple[int, int], tuple(sizes))

    @property
    def activations(self) -> str:
        return "fp8" if self.config.get("activation_scheme") is not None else "16"

    def holds(self, module: str) -> bool:
        name = module + ".weight"
        return name in self.tensors and self.tensors.dtype(name) == torch.float8_e4m3fn

    def parts(self, module: str) -> tuple[str, ...]:
        return (module + ".weight", *(module + end for end in _BESIDE if module + end in self.tensors))

    def format(self, module: str, shape: Shape) -> Format:
        self.expect(module + ".weight", shape, torch.float8_e4m3fn)
        return e4m3_format(self, module + self._scale(module), shape, self._block)

    def read(self, module: str, shape: Shape) -> QTensor:
        form = self.format(module, shape)
        scale = self.tensors.read(module + self._scale(module))
        return e4m3(form, shape, self.tensors.read(module + ".weight"), scale)

    def _scale(self, module: str) -> str:
        return next((end for end in _SCALES if module + end in self.tensors), _SCALES[0])


def e4m3_format(reader: Reader, name: str, shape: Shape, block: tuple[int, int] | None) -> Fp8Format:
    """The format of e4m3 codes whose scales are the tensor ``name``: one in all, one a row, or one a block."""
    n, k = shape
    types = (*FLOATS, torch.uint8, torch.float8_e8m0fnu)
    if block is not None:
        reader.expect(name, (-(-n // block[0]), -(-k // block[1])), *types)
        return Fp8Format(*block)
    found = reader.tensors.shape(name) if name in reader.tensors else (1,)
    if len(found) == 2 and found[0] == n and 1 < found[1] < k and k % found[1] == 0:
        reader.expect(name, found, *types)
        return Fp8Format(1, k // found[1])
    if found not in ((), (1,), (1, 1), (n,), (n, 1)):
        reader.expect(name, (n, 1), *types)
    reader.expect(name, found, *types)
    return Fp8Format(1, 0)


def e4m3(form: Format, shape: Shape, codes: Tensor, scale: Tensor) -> QTensor:
    """The weight of codes and their multipliers, which may be exponents of two."""
    exponents = scale.dtype == torch.uint8
    scale = torch.ldexp(torch.ones(scale.shape), scale.float() - 127) if exponents else scale.float()
    size = form.layout(shape)["scale"][0]
    scale = scale.expand(size).contiguous() if scale.numel() == 1 else scale.reshape(size)
    return from_tensors(form, shape, {"codes": codes, "scale": scale})
