"""Makes the GPTQ fixtures, and an AWQ one, with gptqmodel; the oracles are its torch kernel's dequantizers.

gptqmodel 7.7.0, transformers 5.24.0, torch 2.13.0 (CPU), in a venv of their own:

    pip install torch==2.13.0 transformers==5.24.0 torchao==0.18.0 accelerate datasets numpy setuptools wheel ninja
    pip install threadpoolctl device-smi protobuf requests pypcre tokenicer logbar defuser
    pip install --no-deps --no-build-isolation gptqmodel==7.7.0
    GPTQMODEL_CPU_WORKERS=2 python tools/fixtures_gptq.py [NAME ...]
"""

import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from fixtures_models import fixture, tiny
from fixtures_words import save_words, sequences
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

DYNAMIC = {
    r"+:.*\.mlp\.(gate|up)_proj$": {"bits": 8, "group_size": -1},
    r".*\.self_attn\.[kv]_proj$": {"bits": 2, "group_size": 16, "sym": False},
    r"-:.*\.down_proj$": {},
}
"""Three ways to name modules: 8 bits by channel, 2 bits without a leading plus, and left alone."""


def save(base: PreTrainedModel, options: dict[str, object], to: Path) -> None:
    """Quantize a model; options are those of gptqmodel's QuantizeConfig."""
    with tempfile.TemporaryDirectory() as scratch:
        base.save_pretrained(scratch)
        save_words(Path(scratch), base.config.vocab_size)
        config = QuantizeConfig(offload_to_disk=False, **options)
        model = GPTQModel.load(scratch, config, device="cpu", dtype=base.dtype)
        tokens = sequences(vocab=base.config.vocab_size)
        rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens]
        model.quantize(rows, batch_size=1)
        model.save(str(to))


def oracle(made: Path) -> dict[str, Tensor]:
    """The weights as gptqmodel's torch kernel expands them: uncompiled, and in float16, as scales are stored.

    Left to itself it takes bfloat16 on a CPU, and rounds the scales to that first.
    """
    model = GPTQModel.load(str(made), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16)
    return {
        f"{name}.weight": TorchLinear.dequantize_weight(module).T
        for name, module in model.model.named_modules()
        if isinstance(module, TorchLinear)
    }


def awq_oracle(group: int, made: Path) -> dict[str, Tensor]:
    """The weights of an AWQ checkpoint by gptqmodel's unpacking of that layout."""
    stored = load_file(made / "model.safetensors")
    parts = {
        name: [stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")]
        for name in (key.removesuffix(".qweight") for key in stored if key.endswith(".qweight"))
    }
    return {f"{name}.weight": dequantize_gemm(*tensors, 4, group).T for name, tensors in parts.items()}


def main() -> None:
    torch.set_num_threads(1)
    by_32 = {"bits": 4, "group_size": 32, "desc_act": False}
    ordered = {"bits": 4, "group_size": 32, "desc_act": True, "sym": False}
    by_channel = {"bits": 8, "group_size": -1, "act_group_aware": False}
    awq = {"quant_method": "awq", "format": "gemm", "bits": 4, "group_size": 32}
    f16, bf16 = torch.float16, torch.bfloat16
    few = {"num_experts": 2, "num_key_value_heads": 4, "moe_intermediate_size": 64, "vocab_size": 64}
    made = {
        "gptq_w4g32": (tiny("llama", f16), by_32, oracle),
        "gptq_w4g32_actorder": (tiny("llama", f16), ordered, oracle),
        "gptq_w3g32": (tiny("llama", f16), by_32 | {"bits": 3, "sym": False}, oracle),
        "gptq_w2g32": (tiny("llama", bf16), by_32 | {"bits": 2}, oracle),
        "gptq_w8": (tiny("llama", f16, vocab_size=64), by_channel | {"desc_act": False}, oracle),
        "gptq_w4_v2": (tiny("qwen3", f16), {"bits": 4, "group_size": 32, "format": "gptq_v2", "sym": False}, oracle),
        "gptq_dynamic": (tiny("llama", f16), by_32 | {"act_group_aware": False, "dynamic": DYNAMIC}, oracle),
        "gptq_qwen3moe": (tiny("qwen3_moe", f16, vocab_size=32), by_32, oracle),
        "gptq_ernie": (tiny("ernie4_5", bf16), ordered, oracle),
        "awq_qwen3moe": (tiny("qwen3_moe", f16, **few), awq, partial(awq_oracle, 32)),
    }
    for name in sys.argv[1:] or made:
        base, options, expand = made[name]
        fixture(name, partial(save, base, options), expand)


if __name__ == "__main__":
    main()
