"""GPTQ's layout, which gptqmodel, AutoGPTQ and auto-round write: codes of 2, 3, 4 or 8 bits down the columns.

qweight int32 [K·b/32, N] and qzeros int32 [G, N·b/32] are little-endian bit streams along K and N; scales are f16
[G, N]; g_idx int32 [K] is the group of each column. w = (q − z) · s. The first version of the layout stores z − 1.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from qrun.formats import AffineFormat, Format, PermutedFormat, QTensor, Shape, from_tensors
from qrun.formats.packing import pack, unpack
from qrun.readers.base import FLOATS, Reader, Tensors, mapping, matches, refuse, setting
from qrun.readers.columns import column_order, fitted

_ENDS = (".qweight", ".qzeros", ".scales", ".g_idx")


class GPTQReader(Reader):
    """See the module."""

    def __init__(self, tensors: Tensors, config: Mapping[str, Any]) -> None:
        super().__init__(tensors, config)
        kind = self.setting("checkpoint_format", str, "gptq").lower()
        if kind not in ("gptq", "gptq_v2"):
            raise refuse(f"quant_method 'gptq' with checkpoint_format {kind!r}")
        self._add = 1 if kind == "gptq" else 0
        # gptqmodel takes one off whole words, with a borrow from field to field, but for 3 bits.
        self._by_words = self._add == 1 and "gptqmodel" in repr(mapping(config.get("meta")).get("quantizer"))
        self._dynamic = mapping(self.config.get("dynamic"))
        self._extra = mapping(self.config.get("extra_config"))
        packing = self.setting("packing_format", str, "auto_gptq")
        if packing.removeprefix("auto_round:") not in ("auto_gptq", "auto_round"):
            raise refuse(f"quant_method {config.get('quant_method')!r} with packing_format {packing!r}")

    def holds(self, module: str) -> bool:
        return module + ".qweight" in self.tensors

    def parts(self, module: str) -> tuple[str, ...]:
        return tuple(module + end for end in _ENDS if module + end in self.tensors)

    def shared(self, module: str) -> object:
        name = module + ".g_idx"
        return self.tensors.read(name).numpy().tobytes() if name in self.tensors else None

    def format(self, module: str, shape: Shape) -> Format:
        inner, order = self._described(module, shape)
        return inner if order is None else PermutedFormat(inner)

    def read(self, module: str, shape: Shape) -> QTensor:
        inner, order = self._described(module, shape)
        bits = inner.bits
        codes = self.tensors.read(module + ".qweight").t().contiguous().view(torch.uint8)  # [N, K·b/8], the same stream
        if order is not None or inner.signed:
            codes = unpack(codes, bits)
            codes = fitted(codes if order is None else codes[:, order], inner, shape[1])
        scale = self.tensors.read(module + ".scales").t().contiguous()
        parts = {"codes": codes, "scale": scale.to(cast(torch.dtype, inner.scale_dtype))}
        if not inner.symmetric:
            parts["zero"] = self._zeros(module, bits)
        if order is not None:
            parts["order"] = order[None].int()
        return from_tensors(inner if order is None else PermutedFormat(inner), shape, parts)

    def _described(self, module: str, shape: Shape) -> tuple[AffineFormat, Tensor | None]:
        """The format of the codes, and the order of the columns if it is not their own."""
        n, k = shape
        bits, group = self._settings(module)
        group = k if group == -1 else group
        if bits not in (2, 3, 4, 8):
            raise refuse(f"{module} has GPTQ codes of {bits} bits")
        if group < 8 or group % 8 or k % group or (k * bits) % 32 or (n * bits) % 32:
            raise refuse(f"{module} [{n}, {k}] has GPTQ groups of {group}")
        self.expect(module + ".qweight", (k * bits // 32, n), torch.int32)
        self.expect(module + ".qzeros", (k // group, n * bits // 32), torch.int32)
        self.expect(module + ".scales", (k // group, n), *FLOATS)
        middle = bool((self._zeros(module, bits) == 1 << (bits - 1)).all())
        if middle and group == k:
            form = AffineFormat(bits, 0, True)
        else:
            form = AffineFormat(bits, group, middle, scale_dtype=self.tensors.dtype(module + ".scales"))
        return form, self._order(module, k, group)

    def _settings(self, module: str) -> tuple[int, int]:
        """Bits and group size; ``dynamic`` and ``extra_config`` have others for modules that they name or match."""
        bits, group = self.setting("bits", int), self.setting("group_size", int, -1)
        other = self._extra.get(module) or next((v for p, v in self._extra.items() if matches(p, module)), None)
        if other is not None:
            return setting(mapping(other), "bits", int, bits), setting(mapping(other), "group_size", int, group)
        for pattern, values in self._dynamic.items():
            if not pattern.startswith("-:") and matches(pattern.removeprefix("+:"), module):
                other = mapping(values)
                return setting(other, "bits", int, bits), setting(other, "group_size", int, group)
        return bits, group

    def _zeros(self, module: str, bits: int) -> Tensor:
        """u8 [N, G]."""
        words = self.tensors.read(module + ".qzeros").contiguous()
        if self._by_words and bits != 3:
            ones = pack(torch.ones(words.shape[1] * 32 // bits, dtype=torch.uint8), bits).view(torch.int32)
            return unpack((words + ones).view(torch.uint8), bits).t().contiguous()
        stored = unpack(words.view(torch.uint8), bits)
        return stored.add_(self._add).bitwise_and_((1 << bits) - 1).t().contiguous()

    def _order(self, module: str, k: int, group: int) -> Tensor | None:
        """Columns in the order of their groups, int64 [K]; none where they are in it."""
        name = module + ".g_idx"
        if name not in self.tensors:
            return None
        self.expect(name, (k,), torch.int32, torch.int64)
        return column_order(self.tensors.read(name), group, name)
