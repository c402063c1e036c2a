"""bitsandbytes: NF4 and FP4 in blocks of the flattened weight, and int8 with a scale a row.

Four bits: weight u8 [N·K/2, 1], the first of two codes in the high nibble; absmax float32 per block, or u8 codes of it
(double quantization: nested_quant_map[code] · nested_absmax + offset); quant_map float32 [16]. w = map[q] · absmax.
Eight bits: weight int8 [N, K], SCB float32 [N], w = q · SCB · 7.874015718698502e-3.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from qrun.errors import CheckpointError
from qrun.formats import AffineFormat, CodebookFormat, Format, PlainFormat, QTensor, Shape, from_tensors
from qrun.formats.packing import unpack
from qrun.readers.base import Reader, Tensors

INT8_STEP: Final = 7.874015718698502e-3
STATE: Final = ".weight.quant_state.bitsandbytes__"
_BESIDE = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")


class BitsAndBytesReader(Reader):
    """See the module."""

    def __init__(self, tensors: Tensors, config: Mapping[str, Any]) -> None:
        super().__init__(tensors, config)
        self._states: dict[str, Mapping[str, Any]] = {}

    def holds(self, module: str) -> bool:
        return module + ".SCB" in self.tensors or self._kind(module) is not None

    def parts(self, module: str) -> tuple[str, ...]:
        kind = self._kind(module)
        if kind is None:
            return tuple(module + end for end in (".weight", ".SCB", ".weight_format") if module + end in self.tensors)
        names = [module + ".weight", module + STATE + kind]
        return (*names, *(f"{module}.weight{end}" for end in _BESIDE if f"{module}.weight{end}" in self.tensors))

    def _kind(self, module: str) -> str | None:
        return next((kind for kind in ("nf4", "fp4") if module + STATE + kind in self.tensors), None)

    def format(self, module: str, shape: Shape) -> Format:
        n, k = shape
        kind = self._kind(module)
        if kind is None:
            self.expect(module + ".weight", shape, torch.int8)
            self.expect(module + ".SCB", (n,), torch.float32)
            return AffineFormat(8, 0, True)
        state = self._state(module, kind)
        block = state.get("blocksize")
        if list(state.get("shape", ())) != [n, k] or block not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
            raise CheckpointError(f"{module}: its quant_state is of another weight than [{n}, {k}]: fetch it again")
        self.expect(module + ".weight", (-(-n * k // 2), 1), torch.uint8)
        self.expect(module + ".weight.quant_map", (16,), torch.float32)
        blocks = -(-n * k // block)
        self.expect(module + ".weight.absmax", (blocks,), torch.float32, torch.uint8)
        if self.tensors.dtype(module + ".weight.absmax") == torch.uint8:
            size = state.get("nested_blocksize")
            if not isinstance(size, int) or not 0 < size <= 1 << 20 or not _is_number(state.get("nested_offset")):
                raise CheckpointError(f"{module}: its quant_state has no nested_blocksize: fetch it again")
            self.expect(module + ".weight.nested_absmax", (-(-blocks // size),), torch.float32)
            self.expect(module + ".weight.nested_quant_map", (256,), torch.float32)
        if k % block:
            return PlainFormat(torch.float32)  # blocks run over the ends of rows
        values = tuple(float(value) for value in self.tensors.read(module + ".weight.quant_map"))
        if not all(map(math.isfinite, values)):
            raise CheckpointError(f"{module}: its quant_map holds NaN or infinity: fetch it again")
        return CodebookFormat(kind, values, block, scale_dtype=torch.float32)

    def read(self, module: str, shape: Shape) -> QTensor:
        form = self.format(module, shape)
        if isinstance(form, AffineFormat):
            scale = self.tensors.read(module + ".SCB")[:, None] * INT8_STEP
            codes = torch.nn.functional.pad(
                self.tensors.read(module + ".weight"), (0, form.padded(shape[1]) - shape[1])
            )
            return from_tensors(form, shape, {"codes": codes, "scale": scale})
        packed = self.tensors.read(module + ".weight").view(-1)
        packed = packed << 4 | packed >> 4
        scale = self._absmax(module)
        if isinstance(form, CodebookFormat):
            n, k = shape
            return from_tensors(form, shape, {"codes": packed.view(n, k // 2), "scale": scale.view(n, -1)})
        values = self.tensors.read(module + ".weight.quant_map")
        count = math.prod(shape)
        flat = values[unpack(packed, 4).int()][:count]
        block = self._states[module]["blocksize"]
        flat *= scale.repeat_interleave(block)[:count]
        return from_tensors(form, shape, {"codes": flat.view(shape)})

    def _absmax(self, module: str) -> Tensor:
        stored = self.tensors.read(module + ".weight.absmax")
        if stored.dtype == torch.float32:
            return stored
        state = self._states[module]
        values = self.tensors.read(module + ".weight.nested_quant_map")[stored.int()]
        nested = self.tensors.read(module + ".weight.nested_absmax")
        values *= nested.repeat_interleave(state["nested_blocksize"])[: len(values)]
        return values + torch.tensor(float(state["nested_offset"]))

    def _state(self, module: str, kind: str) -> Mapping[str, Any]:
        """What the tool wrote as JSON into a tensor of bytes."""
        if module not in self._states:
            name = module + STATE + kind
            size = self.tensors.shape(name)
            if self.tensors.dtype(name) != torch.uint8 or len(size) != 1 or size[0] > 1 << 16:
                raise CheckpointError(f"{name} is no short JSON text: fetch the model again")
            try:
                found: object = json.loads(self.tensors.read(name).numpy().tobytes())
            except (ValueError, RecursionError):
                found = None
            if not isinstance(found, dict):
                raise CheckpointError(f"{name} is no JSON object: fetch the model again")
            self._states[module] = found
        return self._states[module]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
