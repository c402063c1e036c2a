"""Makes the torchao fixtures with transformers' TorchAoConfig; the oracle is `dequantize` of torchao's tensors.

torchao 0.18.0, transformers 5.24.0, torch 2.13.0 (CPU), in a venv of their own:

    pip install torch==2.13.0 transformers==5.24.0 torchao==0.18.0 accelerate safetensors
    python tools/fixtures_torchao.py [NAME ...]
"""

import sys
import tempfile
from pathlib import Path

import torch
from fixtures_models import fixture, tiny
from torch import Tensor
from torchao.core.config import AOBaseConfig
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerGroup,
    PerRow,
)
from torchao.utils import TorchAOBaseTensor
from transformers import AutoModelForCausalLM, PreTrainedModel, TorchAoConfig

MADE = {
    "torchao_int4wo": IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=PerGroup(32), mapping_type=MappingType.ASYMMETRIC
    ),
    "torchao_int8wo": Int8WeightOnlyConfig(granularity=PerRow()),
    "torchao_fp8": Float8WeightOnlyConfig(),
}


def save(base: PreTrainedModel, config: AOBaseConfig, to: Path) -> None:
    """Quantize a model while it loads."""
    with tempfile.TemporaryDirectory() as scratch:
        base.save_pretrained(scratch)
        options = {"device_map": "cpu", "quantization_config": TorchAoConfig(config)}
        AutoModelForCausalLM.from_pretrained(scratch, dtype=base.dtype, **options).save_pretrained(to)


def oracle(made: Path) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(made, dtype="auto", device_map="cpu")
    return {
        name: parameter.dequantize()
        for name, parameter in model.named_parameters()
        if isinstance(parameter, TorchAOBaseTensor)
    }


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:] or MADE:
        fixture(name, lambda to, name=name: save(tiny("llama", vocab_size=64), MADE[name], to), oracle)


if __name__ == "__main__":
    main()
