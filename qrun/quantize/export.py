"""A quantized weight as compressed-tensors stores it, and the config that says so.

The layout that vLLM, SGLang and transformers read alike; names are Hugging Face's. Knows no checkpoint and no files.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from qrun.errors import UsageError
from qrun.formats import AffineFormat, Format, Fp8Format, MxFp4Format, NvFp4Format, PlainFormat, QTensor, TrellisFormat
from qrun.formats.packing import pack, unpack
from qrun.formats.trellis import GROUP as TRELLIS_GROUP
from qrun.recipe import ActivationType

_WRITTEN: Final = (AffineFormat, Fp8Format, MxFp4Format, NvFp4Format, PlainFormat, TrellisFormat)
KV_FP8: Final = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}


def module_tensors(module: str, weight: QTensor, activations: ActivationType, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one quantized module [N, K] by their names on disk; scales of integers in ``dtype``."""
    form, (n, k) = weight.format, weight.shape
    assert weight.scale is not None, f"{form} has scales"
    if isinstance(form, Fp8Format):
        return {f"{module}.weight": weight.codes, f"{module}.weight_scale": weight.scale}
    if isinstance(form, MxFp4Format | NvFp4Format):
        found = {f"{module}.weight_packed": weight.codes, f"{module}.weight_scale": weight.scale}
        return found if weight.scale2 is None else found | {f"{module}.weight_global_scale": weight.scale2.view(1)}
    if isinstance(form, TrellisFormat):
        assert weight.scale2 is not None, f"{form} has scales of rows"
        found = {f"{module}.weight_packed": weight.codes, f"{module}.weight_scale": weight.scale}
        return found | {f"{module}.weight_row_scale": weight.scale2}
    assert isinstance(form, AffineFormat), "`check` refuses every other format"
    scale = weight.scale.to(dtype)
    if _plain_int8(form, activations):
        return {f"{module}.weight": weight.codes[:, :k].contiguous(), f"{module}.weight_scale": scale}
    codes = weight.codes.to(torch.int16) + 128 if form.signed else unpack(weight.codes, form.bits)
    found = {
        f"{module}.weight_packed": _words(codes[:, :k].to(torch.uint8), form.bits),
        f"{module}.weight_scale": scale,
        f"{module}.weight_shape": torch.tensor([n, k]),
    }
    if weight.zero is not None:
        found[f"{module}.weight_zero_point"] = _words(weight.zero.t(), form.bits).t().contiguous()
    return found


def check(formats: Mapping[str, Format], activations: ActivationType) -> None:
    """Raise UsageError, naming it, for a format that compressed-tensors has no place for."""
    for module, form in formats.items():
        if not isinstance(form, _WRITTEN):
            raise UsageError(
                f"{form} of {module} cannot be written for other engines: choose int2 to int8, fp8, mxfp4, "
                "nvfp4 or trellis (which qrun alone reads), or let qrun quantize to it while it loads"
            )
    if activations == "32":
        raise UsageError("activations of 32 bits cannot be written for other engines: leave the A part out")


def quantization_config(
    formats: Mapping[str, Format], activations: ActivationType, *, kv_fp8: bool, routers: bool
) -> dict[str, Any]:
    """``quantization_config`` of a model whose linear modules have these formats; plain ones are left alone."""
    groups: dict[Format, list[str]] = {}
    plain = ["lm_head"] if "lm_head" not in formats else []
    for module, form in formats.items():
        if isinstance(form, PlainFormat):
            plain.append(module)
        else:
            groups.setdefault(form, []).append(module)
    ignore = ["lm_head"] if "lm_head" in plain else []
    ignore += patterns([module for module in plain if module != "lm_head"], formats)
    if routers:
        ignore.append(r"re:.*\.mlp\.gate$")
    config_groups: dict[str, Any] = {}
    for i, (form, modules) in enumerate(groups.items()):
        targets = ["Linear"] if len(groups) == 1 else patterns(modules, formats)
        config_groups[f"group_{i}"] = {"targets": targets} | _scheme(form, activations)
    kinds = {group["format"] for group in config_groups.values()}
    found: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": ignore,
        "config_groups": config_groups,
    }
    return found | ({"kv_cache_scheme": KV_FP8} if kv_fp8 else {})


def patterns(modules: list[str], formats: Mapping[str, Format]) -> list[str]:
    """Regular expressions that match exactly ``modules`` among those of ``formats``, a line a kind where possible."""
    left = dict.fromkeys(modules)
    found: list[str] = []
    for shape in (_anywhere, _any_expert):
        kinds: dict[str, list[str]] = {}
        for module in formats:
            kinds.setdefault(shape(module), []).append(module)
        for kind, members in kinds.items():
            if len(members) > 1 and all(member in left for member in members):
                found.append("re:^" + kind + "$")
                for member in members:
                    del left[member]
    return found + list(left)


def _anywhere(module: str) -> str:
    """The module in any layer, and of any expert."""
    return re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(module))


def _any_expert(module: str) -> str:
    """The module of any expert in its layer."""
    return re.sub(r"experts\\\.\d+\\\.", r"experts\\.\\d+\\.", re.escape(module))


def _plain_int8(form: AffineFormat, activations: ActivationType) -> bool:
    return form.signed and activations == "int8"


def _scheme(form: Format, activations: ActivationType) -> dict[str, Any]:
    """The format, weights and activations of one group."""
    if isinstance(form, Fp8Format):
        seen = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "group", "group_size": 128}
        return {
            "format": "float-quantized",
            "weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "block"}
            | {"block_structure": [128, 128]},
            "input_activations": seen | {"dynamic": True},
        }
    if isinstance(form, MxFp4Format | NvFp4Format):
        nvidia = isinstance(form, NvFp4Format)
        weights = {"num_bits": 4, "type": "float", "symmetric": True, "group_size": form.group}
        how = {"strategy": "tensor_group" if nvidia else "group"}
        how |= {"scale_dtype": f"torch.{'float8_e4m3fn' if nvidia else 'uint8'}"}
        return {"format": f"{form.name}-pack-quantized", "weights": weights | how}
    if isinstance(form, TrellisFormat):  # which other engines refuse by this name
        weights = {"num_bits": 2, "type": "int", "symmetric": True, "strategy": "group", "group_size": TRELLIS_GROUP}
        return {"format": "trellis-quantized", "weights": weights}
    assert isinstance(form, AffineFormat), "`check` refuses every other format"
    spread: dict[str, Any] = {"strategy": "group", "group_size": form.group} if form.group else {"strategy": "channel"}
    found: dict[str, Any] = {
        "format": "int-quantized" if _plain_int8(form, activations) else "pack-quantized",
        "weights": {"num_bits": form.bits, "type": "int", "symmetric": form.symmetric} | spread,
    }
    if activations == "int8":
        found["input_activations"] = {
            "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
        }  # fmt: skip
    return found


def _words(codes: Tensor, bits: int) -> Tensor:
    """u8 codes [n, K] as one little-endian bit stream a row, in int32 words [n, ⌈K·bits/32⌉]."""
    padded = pack(F.pad(codes, (0, -codes.shape[1] % 32)), bits).contiguous().view(torch.int32)
    return padded[:, : -(-codes.shape[1] * bits // 32)].contiguous()
