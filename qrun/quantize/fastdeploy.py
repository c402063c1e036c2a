"""FastDeploy's quantization config, MixQuant's and the plainer ones, as a plan.

Facts as in FastDeploy's ``model_executor/layers/quantization``. It reads what precision each part is to have, not the
weights of a checkpoint that has it already. Head, embedding, router and norms are left alone, as there.
"""

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, cast

from qrun.errors import RecipeError, UsageError
from qrun.models.config import ModelConfig
from qrun.quantize.plan import MOST_BYTES, Plan
from qrun.quantize.rules import only
from qrun.quantize.units import Unit, units
from qrun.recipe import BF16, GROUPS, ActivationType, Recipe, WeightScheme

_KEYS: Final = (
    "quantization", "dense_quant_type", "dense_quant_granularity", "moe_quant_type", "image_moe_quant_type",
    "moe_quant_config", "kv_cache_quant_type", "modules_to_not_convert", "is_channel_wise", "has_zero_point",
    "is_permuted", "is_quantized", "is_moe_quantized", "hadamard_block_size",
)  # fmt: skip
_TYPES: Final[Mapping[str, str]] = {
    "wint8": "w8@channel", "wint4": "w4@channel", "w8a8": "w8@channela8", "w4a8": "w4@channela8",
    "w4afp8": "w4@channelafp8", "block_wise_fp8": "wfp8afp8", "wfp8afp8": "wfp8afp8", "tensor_wise_fp8": "wfp8afp8",
}  # fmt: skip
"""Their types of linear layers in our grammar. Their tensor-wise fp8 becomes the finer fp8 in blocks."""
_CACHES: Final[Mapping[str, str]] = {
    "int8": "int8", "int8_zp": "int8", "int4_zp": "int4", "float8_e4m3fn": "fp8", "float8_e4m3": "fp8",
    "float8_e4m3fn_zp": "fp8", "block_wise_fp8": "fp8",
}  # fmt: skip
_LAYERS_AT_4: Final = 6
"""The last layer whose experts are at 4 bits in their wint2, where its config does not say."""


def read_plan(path: Path, config: ModelConfig, *, tied: bool, label: str = "") -> Plan:
    """The plan of a JSON file: a quantization config by itself, or a whole ``config.json`` that has one.

    Raises:
        UsageError: the file cannot be read, or has a key that is unknown.
        RecipeError: a type is unknown.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
        content: object = json.loads(raw) if len(raw) <= MOST_BYTES else None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} is no quantization config: it must be a JSON object of at most {MOST_BYTES} bytes")
    whole = cast(dict[str, Any], content)
    inner = whole.get("quantization_config", whole)
    if not isinstance(inner, dict):
        raise UsageError(f"{path}: quantization_config must be an object")
    return plan_of(cast(dict[str, Any], inner), config, tied=tied, where=str(path), label=label)


def plan_of(value: Mapping[str, Any], config: ModelConfig, *, tied: bool, where: str, label: str = "") -> Plan:
    """The plan of a quantization config. Where dense layers and experts differ in their activations these stay 16.

    Their 2-bit code is not ours: its layers get integers of 2 bits in groups of the same size. Raises as `read_plan`.
    """
    only(value, _KEYS, f"{where}: ")
    kind = _word(value, "quantization", where)
    experts: dict[int, Recipe] = {}
    if kind == "mix_quant":
        dense, sparse = (_type(value, key, where) for key in ("dense_quant_type", "moe_quant_type"))
    elif kind == "wint2":
        dense = _type({"dense_quant_type": "wint8"} | dict(value), "dense_quant_type", where)
        sparse, experts = _two_bits(value.get("moe_quant_config", {}), config.layers, where)
    else:
        sparse = dense = _type(value, "quantization", where)
        if kind == "wint4" and config.family.startswith("ernie"):
            dense = Recipe.parse(_TYPES["wint8"])  # as FastDeploy does, silently
    every = units(config, tied=tied)
    used: list[ActivationType] = [dense.activations] if config.moe is None else [dense.activations, sparse.activations]
    activations: ActivationType = used[0] if len(set(used)) == 1 else "16"
    schemes: dict[str, WeightScheme] = {}
    skipped = _patterns(value.get("modules_to_not_convert"), where)
    for unit in every:
        scheme = _scheme(unit, dense, experts.get(unit.layer or 0, sparse))
        for module in unit.modules():
            schemes[module] = BF16 if any(fnmatchcase(module, pattern) for pattern in skipped) else scheme
    cache = _cache(value.get("kv_cache_quant_type"), where)
    try:
        return Plan(
            label=label, config=config, tied=tied, schemes=schemes, activations=activations, k=cache.k, v=cache.v
        )  # fmt: skip
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


def _scheme(unit: Unit, dense: Recipe, sparse: Recipe) -> WeightScheme:
    if unit.kind in ("lm_head", "embedding"):
        return BF16
    return sparse.experts if unit.kind == "experts" else dense.dense


def _word(value: Mapping[str, Any], key: str, where: str) -> str:
    found = value.get(key)
    if not isinstance(found, str):
        raise UsageError(f"{where}: {key} is {'missing' if found is None else repr(found)}: it must be a text")
    return found.lower()


def _type(value: Mapping[str, Any], key: str, where: str) -> Recipe:
    word = _word(value, key, where)
    if word not in _TYPES:
        possible = [*_TYPES, *(["mix_quant", "wint2"] if key == "quantization" else [])]
        raise RecipeError(f"{where}: {key} {word!r} is unknown; possible: {', '.join(possible)}")
    return Recipe.parse(_TYPES[word])


def _two_bits(value: object, layers: int, where: str) -> tuple[Recipe, dict[int, Recipe]]:
    """What experts are in their wint2, and those in the first layers, at 4 bits."""
    parts: dict[str, dict[str, Any]] = {}
    for key in ("moe_w4_quant_config", "moe_w2_quant_config"):
        part = cast(dict[str, object], value).get(key, {}) if isinstance(value, dict) else None
        if not isinstance(part, dict):
            raise UsageError(f"{where}: moe_quant_config must hold objects moe_w4_quant_config and moe_w2_quant_config")
        parts[key] = cast(dict[str, Any], part)
    four = _type({"quant_type": "wint4"} | parts["moe_w4_quant_config"], "quant_type", where)
    last = parts["moe_w4_quant_config"].get("quant_end_layer", _LAYERS_AT_4)
    if isinstance(last, bool) or not isinstance(last, int):
        raise UsageError(f"{where}: quant_end_layer is {last!r}: it must be the number of a layer")
    group = parts["moe_w2_quant_config"].get("quant_group_size", 64)
    term = f"w2g{group}" if group in GROUPS else "w2g64"
    return Recipe.parse(term), {i: four for i in range(layers) if i <= last}


def _patterns(value: object, where: str) -> list[str]:
    patterns: list[object] = cast(list[object], value) if isinstance(value, list) else [] if value is None else [None]
    texts = [pattern for pattern in patterns if isinstance(pattern, str)]
    if len(texts) != len(patterns):
        raise UsageError(f"{where}: modules_to_not_convert must be a list of texts")
    return texts


def _cache(value: object, where: str) -> Recipe:
    if value is None:
        return Recipe.parse()
    if not isinstance(value, str) or value.lower() not in _CACHES:
        raise RecipeError(f"{where}: kv_cache_quant_type {value!r} is unknown; possible: {', '.join(_CACHES)}")
    return Recipe.parse("bf16", _CACHES[value.lower()])
