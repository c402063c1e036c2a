"""Makes the compressed-tensors fixtures with llmcompressor, and their oracle with its own decompressors.

llmcompressor 0.14.0.1, compressed-tensors 0.19.0, transformers 5.17.0, torch 2.13.0, in a venv of their own:
`pip install torch==2.13.0 && pip install llmcompressor==0.14.0.1`. Names given as arguments make those alone.
"""

import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match
from fixtures_models import fixture, tiny
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from llmcompressor.modifiers.modifier import Modifier
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerFast


def weights(bits: int, kind: str = "int", **others: object) -> dict[str, object]:
    """The `weights` part of a scheme."""
    return {"num_bits": bits, "type": kind, "symmetric": True, "dynamic": False} | others


def group(weights: Mapping[str, object], *targets: str, **others: object) -> dict[str, object]:
    """One entry of `config_groups`."""
    return {"weights": dict(weights), "targets": list(targets or ("Linear",))} | others


def rtn(*groups: dict[str, object], **others: object) -> Modifier:
    """Rounding to nearest by these groups; lm_head and the router are left alone."""
    named = {f"group_{i}": entry for i, entry in enumerate(groups)}
    return QuantizationModifier(config_groups=named, ignore=["lm_head", "re:.*mlp.gate$"], **others)


def preset(scheme: str) -> Modifier:
    return QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])


def tokens() -> DataLoader[dict[str, Tensor]]:
    """Eight random sequences: enough to give static scales and Hessians a value."""
    ids = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(7))
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
    return DataLoader(rows, batch_size=None)


def quantize(base: PreTrainedModel, recipe: Modifier, to: Path, *, calibrated: bool) -> None:
    """Runs llmcompressor over a copy of `base` on disk, as it wants it, and saves the compressed checkpoint."""
    base.save_pretrained(to / "base")
    data: dict[str, object] = {}
    if calibrated:  # the tokenizer is asked for, and not used
        words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>")))
        data = {"dataset": tokens(), "num_calibration_samples": 8, "pipeline": "basic", "processor": words}
    model = oneshot(model=str(to / "base"), recipe=recipe, **data)
    model.save_pretrained(to, save_compressed=True)
    reset_session()


def decompressed(directory: Path) -> dict[str, Tensor]:
    """Every quantized weight of a saved checkpoint, by compressed-tensors' decompressor for its format."""
    stored = load_file(directory / "model.safetensors")
    said = json.loads((directory / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(said)
    out: dict[str, Tensor] = {}
    linear = torch.nn.Linear(1, 1)
    for module in sorted({name.rpartition(".")[0] for name in stored if name.endswith(".weight_scale")}):
        [scheme] = [s for s in config.config_groups.values() if is_match(module, linear, s.targets, config.ignore)]
        parts = {name.removeprefix(f"{module}."): t for name, t in stored.items() if name.rpartition(".")[0] == module}
        compressor = BaseCompressor.get_value_from_registry(scheme.format or config.format)
        out[f"{module}.weight"] = compressor.decompress(parts, scheme)["weight"]
    return out


W4 = weights(4, strategy="group", group_size=32)
FP8 = weights(8, "float", strategy="channel")
TOKEN8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
INT_TOKEN8 = TOKEN8 | {"type": "int"}
BLOCK8 = weights(8, "float", strategy="block", block_structure=[128, 128])
TOKEN_BLOCK8 = TOKEN8 | {"strategy": "group", "group_size": 128}
STATIC8 = TOKEN8 | {"strategy": "tensor", "dynamic": False}
ATTENTION, MLP = r"re:.*self_attn.*proj$", r"re:.*mlp.*proj$"


def recipes() -> dict[str, tuple[str, Modifier, bool]]:
    """By fixture: the base model, what to do to it, and whether that needs calibration."""
    mixed = rtn(group(FP8, ATTENTION, input_activations=TOKEN8), group(W4, MLP))
    ordered = group(W4 | {"symmetric": False, "actorder": "weight"})
    gptq = GPTQModifier(config_groups={"group_0": ordered}, ignore=["lm_head"], block_size=32)
    return {
        "ct_w4a16_g32": ("llama", rtn(group(W4)), False),
        "ct_w4a16_asym": ("llama", gptq, True),
        "ct_w8a16_channel": ("llama", rtn(group(weights(8, strategy="channel"))), False),
        "ct_w3a16": ("llama", rtn(group(weights(3, strategy="group", group_size=32))), False),
        "ct_w8a8_int": ("llama", rtn(group(weights(8, strategy="channel"), input_activations=INT_TOKEN8)), False),
        "ct_fp8_dynamic": ("llama", rtn(group(FP8, input_activations=TOKEN8)), False),
        "ct_fp8_static": ("llama", preset("FP8"), True),
        "ct_fp8_block": ("llama", rtn(group(BLOCK8, input_activations=TOKEN_BLOCK8)), False),
        "ct_nvfp4a16": ("llama", preset("NVFP4A16"), False),
        "ct_nvfp4": ("llama", preset("NVFP4"), True),
        "ct_mxfp4": ("llama", preset("MXFP4A16"), False),
        "ct_mxfp8": ("llama", preset("MXFP8A16"), False),
        "ct_w4afp8": ("llama", rtn(group(W4, input_activations=TOKEN8)), False),
        "ct_fp8_naive": ("llama", QuantizationModifier(config_groups={"group_0": group(FP8)}), False),  # and lm_head
        "ct_mixed": ("qwen3", mixed, False),
        "ct_moe": ("qwen3_moe", rtn(group(W4)), False),
        "ct_moe_ernie": ("ernie4_5_moe", rtn(group(W4)), False),
        "ct_kv_fp8": ("llama", rtn(group(W4), kv_cache_scheme=STATIC8), True),
        "ct_ernie": ("ernie4_5", rtn(group(W4)), False),
    }


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:] or recipes():
        kind, recipe, calibrated = recipes()[name]
        changes = {"intermediate_size": 160} if name == "ct_fp8_block" else {}  # one whole block and a part
        fixture(name, partial(quantize, tiny(kind, **changes), recipe, calibrated=calibrated), decompressed)


if __name__ == "__main__":
    main()
