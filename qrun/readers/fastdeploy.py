"""FastDeploy's WINT2 experts (CCQ), as ``quantization: wint2`` has them.

quant_weight u8 [K/4, N], weight_scale u8 [K/128, N] (two 4-bit scales a byte), super_scales [N] in the model's dtype,
code_scale and code_zp f32 [N]. An expert's gate_proj and up_proj lie side by side in up_gate_proj, the gate first. What
each number means is in `qrun.formats.ccq`. The other weights of FastDeploy's own checkpoints are in the order of its
GPU kernels, which nothing documents: they are refused.
"""

from typing import Any, Final

import torch
from torch import Tensor

from qrun.errors import CheckpointError
from qrun.formats import Format, QTensor, Shape, from_tensors
from qrun.formats.ccq import CcqFormat
from qrun.readers.base import FLOATS, Reader, mapping, refuse

_GROUP: Final = 64
_CODES: Final = ".quant_weight"
_SCALE: Final = ".weight_scale"
_SUPER: Final = ".super_scales"
_LINE: Final = (".code_scale", ".code_zp")
_ENDS: Final = (_CODES, _SCALE, _SUPER, *_LINE)
_FUSED: Final = {
    "gate_proj": ("up_gate_proj", 0, 2),
    "up_proj": ("up_gate_proj", 1, 2),
    "q_proj": ("qkv_proj", 0, 0),
    "k_proj": ("qkv_proj", 0, 0),
    "v_proj": ("qkv_proj", 0, 0),
}
"""A layer's name -> that of the one it is a part of, which part, and of how many (0: of unequal ones)."""


class FastDeployReader(Reader):
    """See the module."""

    def __init__(self, tensors: Any, config: Any) -> None:
        super().__init__(tensors, config)
        kind = self.setting("quantization", str)
        if kind != "wint2":
            raise refuse(f"config.json: quantization_config has quantization {kind!r}")
        w2 = mapping(mapping(config.get("moe_quant_config")).get("moe_w2_quant_config"))
        if w2.get("quant_type", "wint2") != "wint2" or w2.get("quant_group_size", _GROUP) not in (0, _GROUP):
            raise refuse(f"config.json: quantization_config has moe_w2_quant_config {dict(w2)!r}")

    def holds(self, module: str) -> bool:
        return self._place(module)[0] + _CODES in self.tensors

    def parts(self, module: str) -> tuple[str, ...]:
        stored = self._place(module)[0]
        return tuple(stored + end for end in _ENDS if stored + end in self.tensors)

    def format(self, module: str, shape: Shape) -> Format:
        n, k = shape
        stored, _, count = self._place(module)
        if stored + _LINE[0] not in self.tensors or count == 0:
            raise refuse(f"{stored} is quantized for FastDeploy's GPU kernels, not as WINT2")
        if k % (2 * _GROUP):
            raise refuse(f"{module} [{n}, {k}] is WINT2 whose {k} inputs are no multiple of {2 * _GROUP}")
        self.expect(stored + _CODES, (k // 4, n * count), torch.uint8)
        self.expect(stored + _SCALE, (k // (2 * _GROUP), n * count), torch.uint8)
        self.expect(stored + _SUPER, (n * count,), *FLOATS)
        for end in _LINE:
            self.expect(stored + end, (n * count,), torch.float32)
        return CcqFormat(self.tensors.dtype(stored + _SUPER))

    def read(self, module: str, shape: Shape) -> QTensor:
        form = self.format(module, shape)
        stored, part, _ = self._place(module)
        columns = slice(part * shape[0], (part + 1) * shape[0])
        tensors = {
            "codes": self.tensors.read(stored + _CODES)[:, columns].t(),
            "scale": self.tensors.read(stored + _SCALE)[:, columns].t(),
            "scale2": self.tensors.read(stored + _SUPER)[columns, None],
            "zero": torch.stack([self.tensors.read(stored + end)[columns] for end in _LINE], 1),
        }
        for name in ("scale2", "zero"):
            _finite(tensors[name], module)
        return from_tensors(form, shape, {name: tensor.contiguous() for name, tensor in tensors.items()})

    def _place(self, module: str) -> tuple[str, int, int]:
        """Where a layer is stored: under which name, as which part, of how many as large."""
        prefix, _, name = module.rpartition(".")
        fused, part, count = _FUSED.get(name, ("", 0, 1))
        if fused and f"{prefix}.{fused}{_CODES}" in self.tensors:
            return f"{prefix}.{fused}", part, count
        return module, 0, 1


def _finite(tensor: Tensor, module: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(
            f"{module} has scales that are NaN or infinite: the checkpoint is damaged; fetch it again"
        )
