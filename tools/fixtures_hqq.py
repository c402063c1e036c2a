"""Makes the HQQ fixtures with transformers' HqqConfig; the oracle is the `dequantize` of hqq's own layer.

hqq 0.2.8.post1, transformers 4.56.2 (5.24.0 neither makes nor reads HQQ), torch 2.13.0 (CPU), in a venv of their own:

    pip install torch==2.13.0 transformers==4.56.2 accelerate safetensors setuptools wheel einops termcolor
    pip install --no-deps --no-build-isolation hqq==0.2.8.post1
    python -W ignore tools/fixtures_hqq.py [NAME ...]
"""

import sys
import tempfile
from collections.abc import Mapping

import torch
from fixtures_models import fixture, tiny
from hqq.core.quantize import HQQLinear
from torch import Tensor
from transformers import AutoModelForCausalLM, HqqConfig, PreTrainedModel

MADE = {
    "hqq_w4": (torch.float16, {"nbits": 4, "group_size": 32}),
    "hqq_w3": (torch.float16, {"nbits": 3, "group_size": 32}),
    "hqq_w8": (torch.bfloat16, {"nbits": 8, "group_size": 32, "skip_modules": ["lm_head", "down_proj"]}),
}


def quantized(base: PreTrainedModel, options: Mapping[str, object]) -> PreTrainedModel:
    """A model that transformers quantizes while it loads."""
    with tempfile.TemporaryDirectory() as scratch:
        base.save_pretrained(scratch)
        return AutoModelForCausalLM.from_pretrained(
            scratch, dtype=base.dtype, device_map="cpu", quantization_config=HqqConfig(**options)
        )


def oracle(model: PreTrainedModel) -> dict[str, Tensor]:
    return {f"{n}.weight": m.dequantize() for n, m in model.named_modules() if isinstance(m, HQQLinear)}


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:] or MADE:
        dtype, options = MADE[name]
        model = quantized(tiny("llama", dtype, vocab_size=64), options)
        fixture(name, model.save_pretrained, lambda _made, model=model: oracle(model))


if __name__ == "__main__":
    main()
