"""Makes the AWQ fixtures with autoawq's whole pipeline; the oracle is its `dequantize_gemm`.

autoawq 0.2.9, transformers 4.56.2 (it runs with none that is newer), torch 2.13.0 (CPU), in a venv of their own:

    pip install torch==2.13.0 transformers==4.56.2 accelerate safetensors datasets zstandard setuptools wheel
    pip install --no-deps --no-build-isolation autoawq==0.2.9
    python -W ignore tools/fixtures_awq.py [NAME ...]
"""

import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from awq import AutoAWQForCausalLM
from awq.utils.packing_utils import dequantize_gemm
from fixtures_models import fixture, tiny
from fixtures_words import save_words, sequences
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

BITS = 4
SHAPE = {"intermediate_size": 128, "num_key_value_heads": 4, "vocab_size": 64}
"""Its search for the best clip wants multiples of 64 rows."""


def save(base: PreTrainedModel, group: int, kept: list[str], to: Path) -> None:
    """Quantize a model by groups of `group` columns; modules named by `kept` are left alone."""
    config = {"zero_point": True, "q_group_size": group, "w_bit": BITS, "version": "GEMM"}
    with tempfile.TemporaryDirectory() as scratch:
        base.save_pretrained(scratch)
        save_words(Path(scratch), base.config.vocab_size)
        model = AutoAWQForCausalLM.from_pretrained(scratch, device_map="cpu", torch_dtype=base.dtype)
        rows = sequences(vocab=base.config.vocab_size)
        model.quantize(
            AutoTokenizer.from_pretrained(scratch),
            quant_config=config | ({"modules_to_not_convert": kept} if kept else {}),
            calib_data=rows,
            max_calib_samples=len(rows),
            max_calib_seq_len=len(rows[0]),
        )
        model.save_quantized(str(to))


def oracle(group: int, made: Path) -> dict[str, Tensor]:
    """The weights as autoawq expands them."""
    stored = load_file(made / "model.safetensors")
    modules = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    return {
        f"{name}.weight": dequantize_gemm(
            stored[f"{name}.qweight"], stored[f"{name}.qzeros"], stored[f"{name}.scales"], BITS, group
        ).T
        for name in modules
    }


def main() -> None:
    torch.set_num_threads(1)
    made = {
        "awq_w4g32": (tiny("llama", torch.float16, **SHAPE), 32, []),
        "awq_w4g64": (tiny("llama", torch.float16, **SHAPE), 64, ["up_proj"]),
    }
    for name in sys.argv[1:] or made:
        base, group, kept = made[name]
        fixture(name, partial(save, base, group, kept), partial(oracle, group))


if __name__ == "__main__":
    main()
