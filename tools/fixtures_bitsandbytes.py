"""Makes the bitsandbytes fixtures by transformers, and their oracle with bitsandbytes' own dequantization.

bitsandbytes 0.50.2, transformers 5.17.0, accelerate 1.15, torch 2.13.0, in a venv of their own.
"""

import sys
from functools import partial
from pathlib import Path

import bitsandbytes as bnb
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from fixtures_models import fixture, tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel


def quantize(base: PreTrainedModel, config: BitsAndBytesConfig, to: Path) -> None:
    base.save_pretrained(to / "base")
    model = AutoModelForCausalLM.from_pretrained(to / "base", quantization_config=config, device_map="cpu")
    model.save_pretrained(to)


def dequantized(directory: Path) -> dict[str, Tensor]:
    """Every quantized weight of a saved checkpoint, once transformers has loaded it again.

    Four bits by the library's own implementation in torch: its C++ kernel for CPUs takes the scales of other blocks
    where a row is no whole number of them.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, device_map="cpu")
    out: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            absmax = state.absmax
            if state.nested:
                absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
            out[f"{name}.weight"] = _dequantize_4bit_compute(
                module.weight.data.reshape(-1), absmax.float(), state.code, state.blocksize, state.shape, state.dtype
            )
        elif isinstance(module, bnb.nn.Linear8bitLt):
            out[f"{name}.weight"] = bnb.functional.int8_vectorwise_dequant(module.weight.CB, module.weight.SCB)
    return out


def four(kind: str, dtype: torch.dtype, double: bool = False) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
    )


def main() -> None:
    torch.set_num_threads(1)
    bf16, f16 = torch.bfloat16, torch.float16
    odd = {"hidden_size": 72, "intermediate_size": 100}
    made = {
        "bnb_nf4": (tiny("llama", bf16), four("nf4", bf16)),
        "bnb_nf4_double": (tiny("llama", bf16), four("nf4", bf16, double=True)),
        "bnb_fp4": (tiny("llama", f16), four("fp4", f16)),
        "bnb_nf4_odd": (tiny("llama", bf16, **odd), four("nf4", bf16, double=True)),
        "bnb_int8": (tiny("llama", f16), BitsAndBytesConfig(load_in_8bit=True)),
    }
    for name in sys.argv[1:] or made:
        base, config = made[name]
        fixture(name, partial(quantize, base, config), dequantized)


if __name__ == "__main__":
    main()
