"""Makes the NVIDIA ModelOpt fixtures with its unified export, and their oracle with its own quantized tensors.

nvidia-modelopt 0.47.0, transformers 5.17.0, torch 2.13.0, in a venv of their own:
`pip install torch==2.13.0 transformers==5.17.0 accelerate nvidia-modelopt==0.47.0 requests`. FP8 is expanded in
float32: ModelOpt's dequantization to bfloat16 rounds the scale to bfloat16 first, which no runtime does.
"""

import sys
from functools import partial
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from fixtures_models import fixture, tiny
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel


def quantize(base: PreTrainedModel, config: dict[str, object], to: Path) -> None:
    """Calibrates `base` on eight random sequences and exports it."""
    ids = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(7))
    model = mtq.quantize(base, config, lambda model: model(ids))
    with torch.inference_mode():
        export_hf_checkpoint(model, export_dir=to)


def dequantized(directory: Path) -> dict[str, Tensor]:
    """Every quantized weight by the class that holds it: U8 is NVFP4, E4M3 is FP8."""
    stored = load_file(directory / "model.safetensors")
    out: dict[str, Tensor] = {}
    for name in (name for name in stored if f"{name}_scale" in stored):
        weight, scale = stored[name], stored[f"{name}_scale"]
        if weight.dtype == torch.uint8:
            shape = torch.Size((weight.shape[0], weight.shape[1] * 2))
            held = NVFP4QTensor(shape, torch.bfloat16, weight)
            out[name] = held.dequantize(scale=scale, double_scale=stored[f"{name}_scale_2"], block_sizes={-1: 16})
        elif scale.ndim == 4:
            held, scale = FP8QTensor(weight.shape, torch.float32, weight), scale[:, 0, :, 0]
            out[name] = held.dequantize(scale=scale, block_sizes={-1: 128, -2: 128})
        else:
            out[name] = FP8QTensor(weight.shape, torch.float32, weight).dequantize(scale=scale)
    return out


def main() -> None:
    torch.set_num_threads(1)
    with_kv = mtq.update_quant_cfg_with_kv_cache_quant(mtq.NVFP4_DEFAULT_CFG, mtq.FP8_KV_CFG["quant_cfg"])
    made = {
        "modelopt_fp8": ("llama", {}, mtq.FP8_DEFAULT_CFG),
        "modelopt_nvfp4": ("llama", {}, with_kv),
        "modelopt_fp8_block": ("llama", {"intermediate_size": 160}, mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG),
    }
    for name in sys.argv[1:] or made:
        kind, changes, config = made[name]
        fixture(name, partial(quantize, tiny(kind, **changes), config), dequantized)


if __name__ == "__main__":
    main()
