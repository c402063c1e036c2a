"""Makes the fixtures of two layouts that compressed-tensors no longer writes: `weight_g_idx`, and padded 3-bit words.

llmcompressor 0.8.1, compressed-tensors 0.12.2, transformers 4.56.2, torch 2.13.0, in a venv of their own: torch first,
then `pip install --no-deps llmcompressor==0.8.1` and what it names. Names given as arguments make those alone.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from datasets import Dataset
from fixtures_models import fixture, tiny
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, set_seed


def quantize(base: PreTrainedModel, recipe: Modifier, to: Path) -> None:
    """Runs llmcompressor over a copy of `base` on disk, with eight random sequences, and saves the checkpoint."""
    base.save_pretrained(to / "base")
    ids = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(7))
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>")))
    words.pad_token = "<unk>"
    data = {"dataset": rows, "processor": words, "pipeline": "sequential", "shuffle_calibration_samples": False}
    set_seed(0)  # it shuffles them
    model = oneshot(model=str(to / "base"), recipe=recipe, **data)
    model.save_pretrained(to, save_compressed=True, quantization_format="pack-quantized")
    reset_session()


def decompressed(directory: Path) -> dict[str, Tensor]:
    """Every quantized weight by the decompressor of that version; one scheme holds for all of them."""
    stored = load_file(directory / "model.safetensors")
    config = QuantizationConfig.model_validate(
        json.loads((directory / "config.json").read_text())["quantization_config"]
    )
    [scheme] = config.config_groups.values()
    out: dict[str, Tensor] = {}
    for module in sorted(name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")):
        parts = {name.removeprefix(f"{module}."): t for name, t in stored.items() if name.rpartition(".")[0] == module}
        out[f"{module}.weight"] = PackedQuantizationCompressor().decompress_weight(parts, scheme.weights)
    return out


def recipes() -> dict[str, Modifier]:
    weights = {"type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    ordered = {"targets": ["Linear"], "weights": weights | {"num_bits": 4, "actorder": "group"}}
    three = {"targets": ["Linear"], "weights": weights | {"num_bits": 3}}
    return {
        "ct_w4a16_actorder": GPTQModifier(config_groups={"group_0": ordered}, ignore=["lm_head"], block_size=32),
        "ct_w3a16_padded": QuantizationModifier(config_groups={"group_0": three}, ignore=["lm_head"]),
    }


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:] or recipes():
        fixture(name, partial(quantize, tiny("llama"), recipes()[name]), decompressed)


if __name__ == "__main__":
    main()
