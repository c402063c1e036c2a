"""NVIDIA's Model Optimizer: FP8 with a scale a tensor or a block, and NVFP4.

FP8: weight e4m3 [N, K], weight_scale float32 [] (or one a block, with dimensions of 1 between). NVFP4: weight u8
[N, K/2], weight_scale e4m3 [N, K/16], weight_scale_2 float32 [], both multipliers.
"""

from collections.abc import Mapping
from typing import Any

import torch

from qrun.formats import Format, Fp8Format, NvFp4Format, QTensor, Shape, from_tensors
from qrun.readers.base import Reader, Tensors, mapping, refuse
from qrun.readers.fp8 import e4m3, e4m3_format

_ENDS = (".weight", ".weight_scale", ".weight_scale_2", ".input_scale")
_SPARE = (".k_scale", ".v_scale", ".k_proj.output_scale", ".v_proj.output_scale", ".k_bmm_quantizer._scale")
_KNOWN = ("FP8", "NVFP4", "FP8_PB_WO", "MIXED_PRECISION")


class ModelOptReader(Reader):
    """See the module."""

    def __init__(self, tensors: Tensors, config: Mapping[str, Any]) -> None:
        super().__init__(tensors, config)
        inner = mapping(config.get("quantization")) or config
        kind: object = inner.get("quant_algo")
        if str(kind).upper() not in _KNOWN:
            raise refuse(f"quant_method 'modelopt' with quant_algo {kind!r}")

    def spare(self, name: str) -> bool:
        return name.endswith(_SPARE)

    def holds(self, module: str) -> bool:
        name = module + ".weight"
        return (
            name in self.tensors
            and self.tensors.dtype(name) in (torch.float8_e4m3fn, torch.uint8)
            and module + ".weight_scale" in self.tensors
        )

    def parts(self, module: str) -> tuple[str, ...]:
        return tuple(module + end for end in _ENDS if module + end in self.tensors)

    def shared(self, module: str) -> object:
        name = module + ".weight_scale_2"
        return float(self.tensors.read(name)) if name in self.tensors else None

    def format(self, module: str, shape: Shape) -> Format:
        n, k = shape
        name = module + ".weight_scale"
        if module + ".pre_quant_scale" in self.tensors:
            raise refuse(f"{module} has a pre_quant_scale of the activations")
        if self.tensors.dtype(module + ".weight") == torch.uint8:
            if k % 16:
                raise refuse(f"{module} [{n}, {k}] has groups of 16")
            self.expect(module + ".weight", (n, k // 2), torch.uint8)
            self.expect(name, (n, k // 16), torch.float8_e4m3fn)
            self.expect(module + ".weight_scale_2", (), torch.float32)
            return NvFp4Format()
        self.expect(module + ".weight", shape, torch.float8_e4m3fn)
        found = self.tensors.shape(name)
        if len(found) == 4:
            blocks = -(-n // 128), -(-k // 128)
            self.expect(name, (blocks[0], 1, blocks[1], 1), torch.float32)
            return Fp8Format()
        return e4m3_format(self, name, shape, None)

    def read(self, module: str, shape: Shape) -> QTensor:
        form = self.format(module, shape)
        codes, scale = self.tensors.read(module + ".weight"), self.tensors.read(module + ".weight_scale")
        if isinstance(form, NvFp4Format):
            scale2 = self.tensors.read(module + ".weight_scale_2").view(1, 1)
            return from_tensors(form, shape, {"codes": codes, "scale": scale, "scale2": scale2})
        return e4m3(form, shape, codes, scale)
