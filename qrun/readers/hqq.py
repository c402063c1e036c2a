"""HQQ: groups one under another, packed by halves of them, with a scale and a float zero each.

W_q is [N·K/g, g] with 8 bits; u8 [·/2, g] with 4, the first half of the groups in the high nibbles; u8 [·/4, g] with 2,
quarters from the high bits down; int32 [⌈·/10⌉, g] with 3, tenths from the high bits down. scale and zero [N·K/g, 1];
w = (q − zero) · scale, which HQQ rounds twice in its own type. Its .pt files are pickles and are not read.
"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from qrun.errors import CheckpointError
from qrun.formats import AffineFormat, Format, QTensor, Shape, from_tensors
from qrun.readers.base import FLOATS, Reader, Tensors, mapping, refuse
from qrun.readers.columns import fitted

_FIELDS: Final = {8: 1, 4: 2, 3: 10, 2: 4}
"""Bits -> groups that share a word."""
_ENDS = (
    "W_q", "scale", "zero", "shape", "axis", "group_size", "nbits", "channel_wise", "compute_dtype",
    "encoded_state_dict", "offload_meta", "optimize", "packing", "quant_scale", "quant_zero", "round_zero",
    "stores_quant_config", "unpack_view_dtype", "view_as_float",
)  # fmt: skip


class HQQReader(Reader):
    """See the module."""

    def __init__(self, tensors: Tensors, config: Mapping[str, Any]) -> None:
        super().__init__(tensors, config)
        settings = mapping(config.get("quant_config"))
        for each in (settings, *(mapping(value) for value in settings.values())):
            if each.get("scale_quant_params") or each.get("zero_quant_params") or each.get("view_as_float"):
                raise refuse("quant_method 'hqq' with quantized scales or codes stored as floats")

    def holds(self, module: str) -> bool:
        return module + ".W_q" in self.tensors

    def parts(self, module: str) -> tuple[str, ...]:
        return tuple(f"{module}.{end}" for end in _ENDS if f"{module}.{end}" in self.tensors)

    def format(self, module: str, shape: Shape) -> Format:
        n, k = shape
        bits, group, axis = (self._number(module, name) for name in ("nbits", "group_size", "axis"))
        if axis != 1 or bits not in _FIELDS or group < 8 or group % 8 or k % group:
            raise refuse(f"{module} [{n}, {k}] has HQQ groups of {group} along axis {axis} with {bits} bits")
        rows, fields = n * k // group, _FIELDS[bits]
        if rows % fields and bits != 3:
            raise refuse(f"{module} [{n}, {k}] has {rows} HQQ groups, which do not fill their words")
        kind = torch.int32 if bits == 3 else torch.uint8
        self.expect(module + ".W_q", (-(-rows // fields), group), kind)
        self.expect(module + ".scale", (rows, 1), *FLOATS)
        dtype = self.tensors.dtype(module + ".scale")
        self.expect(module + ".zero", (rows, 1), dtype)
        return AffineFormat(bits, group, scale_dtype=dtype, zero_dtype=dtype)

    def read(self, module: str, shape: Shape) -> QTensor:
        n, k = shape
        form = self.format(module, shape)
        assert isinstance(form, AffineFormat)
        words = self.tensors.read(module + ".W_q")
        scale = self.tensors.read(module + ".scale").view(n, -1)
        zero = self.tensors.read(module + ".zero").view(n, -1)
        codes = _groups(words, form.bits)[: n * k // form.group].view(n, k)
        return from_tensors(form, shape, {"codes": fitted(codes, form, k), "scale": scale, "zero": zero})

    def _number(self, module: str, name: str) -> int:
        full = f"{module}.{name}"
        self.expect(full, (), torch.int32, torch.int64)
        value = int(self.tensors.read(full))
        if not 0 <= value <= 1 << 20:
            raise CheckpointError(f"{full} is {value}: fetch the model again")
        return value


def _groups(words: Tensor, bits: int) -> Tensor:
    """u8 [groups, g] from words of groups far apart, the first in the high bits."""
    fields = _FIELDS[bits]
    shifts = torch.arange(fields - 1, -1, -1) * bits
    return ((words[None] >> shifts[:, None, None]) & ((1 << bits) - 1)).to(torch.uint8).flatten(0, 1)
