"""Makes the tiny random models that the fixture scripts quantize, and writes what each tool made of one.

Knows transformers and nothing of quantization. A fixture is a model directory with `oracle.safetensors` beside it:
every quantized weight as the tool's own dequantizer expands it.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures"
KEPT = ("config.json", "hf_quant_config.json", "model.safetensors")
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 32,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 0,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
    },
}


def tiny(kind: str, dtype: torch.dtype = torch.bfloat16, **changes: int) -> PreTrainedModel:
    """A model of one small layer: weights of spread 0.05 with a few outliers, the same on every run."""
    config = AutoConfig.for_model(kind, **(SHAPE | EXPERTS.get(kind, {}) | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.config.architectures = [type(model).__name__]
    random = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=random) * 0.05
        if parameter.ndim == 1:
            values += 1
        else:
            values.view(-1)[torch.randint(values.numel(), (values.numel() // 500,), generator=random)] *= 8
        parameter.data.copy_(values)
    return model.eval()


def fixture(name: str, save: Callable[[Path], object], oracle: Callable[[Path], Mapping[str, Tensor]]) -> None:
    """Saves a quantized model with `save`, asks `oracle` for its weights, and keeps the files a reader needs."""
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch)
        save(made)
        weights = {key: value.detach().contiguous() for key, value in sorted(oracle(made).items())}
        if not weights:
            raise SystemExit(f"{name}: the tool quantized nothing")
        save_file(weights, made / "oracle.safetensors")
        at = FIXTURES / name
        shutil.rmtree(at, ignore_errors=True)
        at.mkdir(parents=True)
        for file in (*KEPT, "oracle.safetensors"):
            if (made / file).exists():
                shutil.copyfile(made / file, at / file)
    size = sum(file.stat().st_size for file in at.iterdir())
    print(json.dumps({"fixture": name, "bytes": size, "weights": len(weights)}))
