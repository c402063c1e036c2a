"""compressed-tensors, which llm-compressor writes: a format for each group of modules that the config's targets name.

pack-quantized       weight_packed int32 [N, ⌈K·b/32⌉] of q + 2^(b−1), a little-endian stream (once, 3, 5, 6 and 7 bits
                     did not cross words); weight_zero_point likewise, packed along N
int-, naive-, float-, mxfp8-quantized   weight int8 or e4m3 [N, K]
nvfp4-pack-quantized weight_packed u8 [N, K/2], weight_scale e4m3 [N, K/16] divided by weight_global_scale
mxfp4-pack-quantized weight_packed u8 [N, K/2], weight_scale E8M0 u8 [N, K/32]
trellis-quantized    qrun's own: weight_packed, weight_scale and weight_row_scale are those of `qrun.formats.trellis`

weight_scale is [1], [N, 1], [N, K/g] or [⌈N/bn⌉, ⌈K/bk⌉]; w = (q − zero) · scale. weight_g_idx [K] is the group of each
column where they are not in order.
"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from qrun.errors import CheckpointError
from qrun.formats import (
    AffineFormat,
    Format,
    MxFp4Format,
    NvFp4Format,
    PermutedFormat,
    QTensor,
    Shape,
    TrellisFormat,
    from_tensors,
)
from qrun.formats.packing import unpack
from qrun.readers.base import FLOATS, Reader, Tensors, mapping, matches, refuse, setting, strings
from qrun.readers.columns import column_order, fitted, signed_codes
from qrun.readers.fp8 import e4m3, e4m3_format

KNOWN: Final = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp8-quantized", "trellis-quantized", "dense",
)  # fmt: skip
_ENDS = (
    ".weight", ".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_global_scale",
    ".weight_row_scale", ".weight_g_idx", ".input_scale", ".input_zero_point", ".input_global_scale",
)  # fmt: skip
_TRELLIS: Final = {"codes": ".weight_packed", "scale": ".weight_scale", "scale2": ".weight_row_scale"}
_SPARE = (".k_scale", ".v_scale", ".q_scale", ".output_scale", ".k_zero_point", ".v_zero_point", ".output_zero_point")


class CompressedTensorsReader(Reader):
    """See the module."""

    def __init__(self, tensors: Tensors, config: Mapping[str, Any]) -> None:
        super().__init__(tensors, config)
        self._format = self.setting("format", str, "dense")
        self._groups = [mapping(group) for group in mapping(config.get("config_groups")).values()]
        sparsity: object = mapping(config.get("sparsity_config")).get("format", "dense")
        if sparsity != "dense":
            raise refuse(f"quant_method 'compressed-tensors' with the sparse format {sparsity!r}")
        if mapping(config.get("transform_config")):
            raise refuse("quant_method 'compressed-tensors' with a transform_config (rotated activations)")
        for kind in {self._format} - {"mixed-precision"} | {self._kind(group) for group in self._groups}:
            if kind not in KNOWN:
                raise refuse(f"quant_method 'compressed-tensors' with format {kind!r}")

    @property
    def activations(self) -> str:
        found = {self._activations(group) for group in self._groups}
        return found.pop() if len(found) == 1 else "16"

    @property
    def cache(self) -> str:
        """The type of the cache that the config asks for; empty if none."""
        scheme = mapping(self.config.get("kv_cache_scheme"))
        return {"float": "fp8", "int": "int8"}.get(str(scheme.get("type")), "") if scheme.get("num_bits") == 8 else ""

    def spare(self, name: str) -> bool:
        return name.endswith(_SPARE)

    def holds(self, module: str) -> bool:
        if module + ".weight_packed" in self.tensors:
            return True
        name = module + ".weight"
        quantized = name in self.tensors and self.tensors.dtype(name) in (torch.int8, torch.float8_e4m3fn)
        return quantized and module + ".weight_scale" in self.tensors

    def parts(self, module: str) -> tuple[str, ...]:
        return tuple(module + end for end in _ENDS if module + end in self.tensors)

    def shared(self, module: str) -> object:
        names = [module + end for end in (".weight_global_scale", ".weight_g_idx") if module + end in self.tensors]
        return [self.tensors.read(name).view(-1).view(torch.uint8).numpy().tobytes() for name in names]

    def format(self, module: str, shape: Shape) -> Format:
        group = self._group(module)
        kind = self._kind(group)
        if kind in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
            return self._fp4(module, shape, nvidia=kind.startswith("nvfp4"))
        if kind == "trellis-quantized":
            form = TrellisFormat()
            for name, (size, dtype) in form.layout(shape).items():
                self.expect(module + _TRELLIS[name], size, dtype)
            return form
        if module + ".weight_packed" in self.tensors:
            return self._ordered(module, self._packed(module, shape, group), shape)
        if self.tensors.dtype(module + ".weight") == torch.int8:
            return self._ordered(module, self._int8(module, shape, group), shape)
        self.expect(module + ".weight", shape, torch.float8_e4m3fn)
        return e4m3_format(self, module + ".weight_scale", shape, self._block(group))

    def read(self, module: str, shape: Shape) -> QTensor:
        form = self.format(module, shape)
        inner = form.inner if isinstance(form, PermutedFormat) else form
        if isinstance(form, TrellisFormat):
            return from_tensors(form, shape, {name: self.tensors.read(module + end) for name, end in _TRELLIS.items()})
        scale = self.tensors.read(module + ".weight_scale")
        if isinstance(inner, AffineFormat):
            return self._affine(module, shape, form, inner)
        if isinstance(inner, NvFp4Format | MxFp4Format):
            parts = {"codes": self.tensors.read(module + ".weight_packed"), "scale": scale}
            if isinstance(inner, NvFp4Format):
                parts["scale2"] = self.tensors.read(module + ".weight_global_scale").view(1, 1)
            return from_tensors(form, shape, parts)
        return e4m3(form, shape, self.tensors.read(module + ".weight"), scale)

    def _affine(self, module: str, shape: Shape, form: Format, inner: AffineFormat) -> QTensor:
        n, k = shape
        bits, name = inner.bits, module + ".weight_packed"
        order = self._order(module, shape)
        if name in self.tensors:
            codes = _codes(self.tensors.read(name), bits, k)
        else:
            codes = signed_codes(self.tensors.read(module + ".weight"), bits, module)
        if order is not None:
            codes = codes[:, order]
        groups = inner.layout(shape)["scale"][0]
        scale = self.tensors.read(module + ".weight_scale").to(inner.scale_dtype)
        parts = {"codes": fitted(codes, inner, k), "scale": scale.expand(groups).contiguous()}
        if not inner.symmetric:
            zero = self.tensors.read(module + ".weight_zero_point")
            if zero.dtype == torch.int32:
                zero = _codes(zero.t().contiguous(), bits, n).t()
            else:
                zero = signed_codes(zero, bits, module + ".weight_zero_point")
            parts["zero"] = zero.reshape(-1, zero.shape[-1]).expand(groups).contiguous()
        if order is not None:
            parts["order"] = order[None].int()
        return from_tensors(form, shape, parts)

    def _packed(self, module: str, shape: Shape, group: Mapping[str, Any]) -> AffineFormat:
        n, k = shape
        bits = setting(mapping(group.get("weights")), "num_bits", int)
        if not 2 <= bits <= 8:
            raise refuse(f"{module} has compressed-tensors codes of {bits} bits")
        self._expect_words(module + ".weight_packed", n, k, bits)
        if module + ".weight_shape" in self.tensors:
            self.expect(module + ".weight_shape", (2,), torch.int64, torch.int32)
            if tuple(map(int, self.tensors.read(module + ".weight_shape"))) != (n, k):
                raise CheckpointError(f"{module}.weight_shape is not [{n}, {k}]: fetch the model again")
        return self._integers(module, shape, bits)

    def _int8(self, module: str, shape: Shape, group: Mapping[str, Any]) -> AffineFormat:
        self.expect(module + ".weight", shape, torch.int8)
        bits = setting(mapping(group.get("weights")), "num_bits", int, 8)
        if not 2 <= bits <= 8:
            raise refuse(f"{module} has compressed-tensors codes of {bits} bits")
        return self._integers(module, shape, bits)

    def _integers(self, module: str, shape: Shape, bits: int) -> AffineFormat:
        """By the shape of the scales: one in all or a row, or one a group."""
        n, k = shape
        name, zeros = module + ".weight_scale", module + ".weight_zero_point"
        found = self.tensors.shape(name) if name in self.tensors else (n, 1)
        groups = found[1] if len(found) == 2 and found[0] == n else 1
        if found not in ((), (1,), (1, 1)):
            self.expect(name, (n, groups), *FLOATS)
        self.expect(name, found, *FLOATS)
        group = -(-k // groups)
        symmetric = bool(mapping(self._group(module).get("weights")).get("symmetric", zeros not in self.tensors))
        if group % 8 or group * groups != k:
            if groups > 1 or (not symmetric and group % 8):
                raise refuse(f"{module} [{n}, {k}] has {groups} groups")
            group = k
        if not symmetric:
            if self.tensors.dtype(zeros) == torch.int32:
                self._expect_words(zeros, groups, n, bits, turned=True)
            else:
                self.expect(zeros, (n, groups) if len(found) == 2 else found, torch.int8, torch.uint8)
        if symmetric and groups == 1:
            return AffineFormat(bits, 0, True)
        return AffineFormat(bits, group, symmetric, scale_dtype=self.tensors.dtype(name))

    def _fp4(self, module: str, shape: Shape, *, nvidia: bool) -> Format:
        n, k = shape
        form = NvFp4Format(divides=True) if nvidia else MxFp4Format()
        if k % form.group:
            raise refuse(f"{module} [{n}, {k}] has groups of {form.group}")
        self.expect(module + ".weight_packed", (n, k // 2), torch.uint8)
        self.expect(module + ".weight_scale", (n, k // form.group), form.scale_dtype)
        if nvidia:
            self.expect(module + ".weight_global_scale", (1,), torch.float32)
        return form

    def _expect_words(self, name: str, rows: int, columns: int, bits: int, *, turned: bool = False) -> None:
        """``columns`` codes a row in words, densely or without crossing them; ``turned``: a row is a column."""
        widths = -(-columns * bits // 32), -(-columns // (32 // bits))
        found = self.tensors.shape(name) if name in self.tensors else ()
        width = widths[1] if found[0 if turned else -1 :][:1] == (widths[1],) else widths[0]
        self.expect(name, (width, rows) if turned else (rows, width), torch.int32)

    def _order(self, module: str, shape: Shape) -> Tensor | None:
        name = module + ".weight_g_idx"
        if name not in self.tensors:
            return None
        self.expect(name, (shape[1],), torch.int32, torch.int64)
        groups = self.tensors.shape(module + ".weight_scale")[-1]
        return column_order(self.tensors.read(name), shape[1] // groups, name)

    def _ordered(self, module: str, inner: AffineFormat, shape: Shape) -> Format:
        return inner if self._order(module, shape) is None else PermutedFormat(inner)

    def _group(self, module: str) -> Mapping[str, Any]:
        """The config group whose targets name the module; a name or a pattern goes before the class of all modules."""
        found: Mapping[str, Any] | None = None
        for group in self._groups:
            for target in strings(group.get("targets")):
                if target == module or (target.startswith("re:") and matches(target.removeprefix("re:"), module)):
                    return group
                if target == "Linear" and found is None:
                    found = group
        if found is None:
            raise CheckpointError(f"config.json: no config_groups target names {module}, which is quantized")
        return found

    def _kind(self, group: Mapping[str, Any]) -> str:
        kind = group.get("format") or self._format
        return kind if isinstance(kind, str) else repr(kind)

    def _block(self, group: Mapping[str, Any]) -> tuple[int, int] | None:
        weights = mapping(group.get("weights"))
        if weights.get("strategy") != "block":
            return None
        sizes: list[object] = list(weights.get("block_structure") or ())
        rows, columns = (*sizes, None, None)[:2]
        if not (isinstance(rows, int) and isinstance(columns, int) and 0 < rows <= 1 << 16 and 0 < columns <= 1 << 16):
            raise refuse(f"quant_method 'compressed-tensors' with block_structure {sizes}")
        return rows, columns

    def _activations(self, group: Mapping[str, Any]) -> str:
        scheme = mapping(group.get("input_activations"))
        if scheme.get("num_bits") != 8:
            return "16"
        if scheme.get("type") == "int":
            return "int8"
        return "fp8" if self._block(group) == (128, 128) else "16"


def _codes(words: Tensor, bits: int, count: int) -> Tensor:
    """u8 [rows, count] from int32 words [rows, ·], dense or with as many codes as fit into each."""
    if words.shape[1] == -(-count * bits // 32):
        stream = words.contiguous().view(torch.uint8)
        return unpack(torch.nn.functional.pad(stream, (0, -stream.shape[1] % bits)), bits)[:, :count]
    shifts = torch.arange(0, 32 // bits * bits, bits)
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).to(torch.uint8).flatten(1)[:, :count]
