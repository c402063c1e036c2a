"""Makes the block-FP8 fixtures with transformers' own conversions, and the ragged one with compressed-tensors'.

transformers 5.17.0, compressed-tensors 0.19.0, torch 2.13.0, in a venv of their own. transformers' quantizer wants a
GPU, so its conversion of single tensors is called; it leaves blocks that do not fill out unquantized, and
compressed-tensors does not. The oracle is the tool's dequantizer: for transformers that of a load on a CPU.
"""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer import FP8BlockDequantizer
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, maybe_pad_tensor_for_block_quant
from fixtures_models import fixture, tiny
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, PreTrainedModel
from transformers.integrations.finegrained_fp8 import Fp8Quantize

BLOCK = 128


def _chosen(name: str, kept: list[str]) -> bool:
    return name.endswith("_proj.weight") and not any(part in name for part in kept)


def _save(base: PreTrainedModel, config: FineGrainedFP8Config, state: dict[str, Tensor], to: Path) -> None:
    base.config.quantization_config = config
    base.config.save_pretrained(to)
    save_file(state, to / "model.safetensors", metadata={"format": "pt"})


def by_transformers(base: PreTrainedModel, config: FineGrainedFP8Config, to: Path) -> None:
    convert = Fp8Quantize(SimpleNamespace(quantization_config=config))
    state: dict[str, Tensor] = {}
    for name, weight in base.state_dict().items():
        state |= convert.convert({name: weight}) if _chosen(name, config.modules_to_not_convert) else {name: weight}
    _save(base, config, state, to)


def by_compressed_tensors(base: PreTrainedModel, config: FineGrainedFP8Config, to: Path) -> None:
    args = QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[BLOCK, BLOCK])
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("float-quantized")
    state: dict[str, Tensor] = {}
    for name, weight in base.state_dict().items():
        if not _chosen(name, config.modules_to_not_convert):
            state[name] = weight
            continue
        padded = maybe_pad_tensor_for_block_quant(weight.float(), (BLOCK, BLOCK))
        blocks = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
        scale, _ = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), args)
        made = compressor.compress({"weight": weight.float(), "weight_scale": scale}, scheme)
        state |= {name: made["weight"].contiguous(), f"{name}_scale_inv": scale.float()}
    _save(base, config, state, to)


def loaded(directory: Path) -> dict[str, Tensor]:
    """The weights as transformers dequantizes them on a CPU."""
    stored = load_file(directory / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    return {name: value for name, value in model.state_dict().items() if f"{name}_scale_inv" in stored}


def dequantized(directory: Path) -> dict[str, Tensor]:
    """The weights by compressed-tensors' converter for checkpoints with `weight_scale_inv`."""
    stored = load_file(directory / "model.safetensors")
    chosen = {name for name in stored if f"{name}_scale_inv" in stored}
    out = FP8BlockDequantizer(targets=["re:.*_proj$"], weight_block_size=(BLOCK, BLOCK)).process(dict(stored))
    return {name: out[name] for name in chosen}


def main() -> None:
    torch.set_num_threads(1)
    attention = {"modules_to_not_convert": ["lm_head", "self_attn"]}
    even = tiny("llama", hidden_size=128, intermediate_size=256, num_attention_heads=2, vocab_size=32)
    made = {
        "fp8_block": (by_transformers, even, FineGrainedFP8Config(**attention), loaded),
        "fp8_block_ragged": (
            by_compressed_tensors,
            tiny("llama", intermediate_size=160),
            FineGrainedFP8Config(modules_to_not_convert=["lm_head"]),
            dequantized,
        ),
        "fp8_tensor": (
            by_transformers,
            tiny("llama"),
            FineGrainedFP8Config(weight_block_size=None, modules_to_not_convert=["lm_head"]),
            loaded,
        ),
        "fp8_ue8m0": (
            by_transformers,
            tiny("llama"),
            FineGrainedFP8Config(weight_block_size=(32, 32), scale_fmt="ue8m0", modules_to_not_convert=["lm_head"]),
            loaded,
        ),
    }
    for name in sys.argv[1:] or made:
        save, base, config, oracle = made[name]
        fixture(name, partial(save, base, config), oracle)


if __name__ == "__main__":
    main()
