"""Makes the auto-round fixtures; the oracle is what its own torch layer does to the unit matrix.

auto-round 0.16.1, transformers 5.24.0, torch 2.13.0 (CPU), in a venv of their own:

    pip install torch==2.13.0 transformers==5.24.0 accelerate datasets safetensors py-cpuinfo pydantic
    pip install --no-deps auto-round==0.16.1
    python tools/fixtures_autoround.py [NAME ...]

A product with the unit matrix is exact: every sum has one term that is not zero.
"""

import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from auto_round import AutoRound
from fixtures_models import fixture, tiny
from fixtures_words import save_words, sequences
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoRoundConfig, PreTrainedModel

MIXED = {"down_proj": {"bits": 8, "group_size": 96}, "k_proj": {"bits": 2}, "up_proj": {"bits": 16}}
MADE = {
    "autoround_w4g32": ("auto_gptq", {}),
    "autoround_mixed": ("auto_round", {"layer_config": MIXED}),
    "autoround_asym": ("auto_round", {"sym": False}),
}


def save(base: PreTrainedModel, form: str, options: dict[str, object], to: Path) -> None:
    """Quantize a model to 4 bits by groups of 32, but for what the options say, in one of the tool's forms."""
    with tempfile.TemporaryDirectory() as scratch:
        base.save_pretrained(scratch)
        save_words(Path(scratch))
        rows = [torch.tensor([row]) for row in sequences()]
        tool = AutoRound(
            scratch,
            **({"bits": 4, "group_size": 32, "sym": True} | options),
            iters=4,
            dataset=rows,
            nsamples=len(rows),
            seqlen=rows[0].shape[1],
            batch_size=4,
            device_map="cpu",
            enable_torch_compile=False,
        )
        tool.quantize_and_save(output_dir=f"{scratch}/out", format=form)
        for file in Path(scratch, "out").rglob("*.*"):
            shutil.copy(file, to)


def oracle(base: PreTrainedModel, made: Path) -> dict[str, Tensor]:
    """The weights as the layers multiply with them that the tool chooses for a CPU."""
    model = AutoModelForCausalLM.from_pretrained(
        made, dtype=torch.float16, device_map="cpu", quantization_config=AutoRoundConfig(backend="torch")
    )
    weights: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if any(key == "qweight" for key, _ in layer.named_buffers(recurse=False)):
            unit = torch.eye(base.get_submodule(name).in_features, dtype=torch.float16)
            weights[f"{name}.weight"] = layer(unit).detach().T
    return weights


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:] or MADE:
        form, options = MADE[name]
        base = tiny("llama")
        fixture(name, partial(save, base, form, options), partial(oracle, base))


if __name__ == "__main__":
    main()
