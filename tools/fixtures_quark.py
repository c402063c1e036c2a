"""Makes the Quark fixtures; the oracle is what AMD's own import dequantizes.

amd-quark 0.13, transformers 5.24.0, torch 2.13.0 (CPU), in a venv of their own:

    pip install torch==2.13.0 transformers==5.24.0 accelerate safetensors datasets evaluate joblib ninja pandas plotly
    pip install protobuf psutil pydantic rich scipy sentencepiece tqdm zstandard onnx onnxslim onnxscript
    pip install --no-deps amd-quark==0.13
    python tools/fixtures_quark.py [NAME ...]
"""

import sys
from functools import partial
from pathlib import Path

import torch
from fixtures_models import fixture, tiny
from fixtures_words import sequences
from quark.torch import ModelQuantizer, export_safetensors, import_model_from_safetensors
from quark.torch.export.nn.modules.qparamslinear import QParamsLinear
from quark.torch.quantization.config.config import (
    FP8E4M3PerTensorSpec,
    Int4PerGroupSpec,
    Int8PerChannelSpec,
    QConfig,
    QLayerConfig,
    Uint4PerGroupSpec,
)
from torch import Tensor

PER_CHANNEL = {"symmetric": True, "scale_type": "float", "round_method": "half_even", "is_dynamic": False}
SPECS = {
    "uint4": Uint4PerGroupSpec(ch_axis=-1, group_size=32),
    "int4": Int4PerGroupSpec(ch_axis=-1, group_size=32),
    "int8": Int8PerChannelSpec(ch_axis=0, **PER_CHANNEL),
    "fp8": FP8E4M3PerTensorSpec(observer_method="min_max", is_dynamic=False),
}
SHAPE = {"intermediate_size": 64, "vocab_size": 32}
"""Small, because Quark expands to float32."""
MADE = {
    "quark_uint4": ("uint4", {}),
    "quark_mixed": ("int4", {"*down_proj": "int8", "*gate_proj": "fp8"}),
}


def save(spec: str, layers: dict[str, str], to: Path) -> None:
    """Quantize a model by one specification, and layers whose names match a pattern by another."""
    made = {name: QLayerConfig(weight=value.to_quantization_spec()) for name, value in SPECS.items()}
    config = QConfig(
        global_quant_config=made[spec],
        layer_quant_config={pattern: made[name] for pattern, name in layers.items()},
        exclude=["lm_head"],
    )
    rows = [torch.tensor([row]) for row in sequences(4, vocab=SHAPE["vocab_size"])]
    model = ModelQuantizer(config).quantize_model(tiny("llama", **SHAPE), rows)
    with torch.no_grad():
        export_safetensors(ModelQuantizer.freeze(model), to)


def oracle(made: Path) -> dict[str, Tensor]:
    model = import_model_from_safetensors(tiny("llama", **SHAPE), str(made))
    return {f"{n}.weight": m._get_qweight(m.weight) for n, m in model.named_modules() if isinstance(m, QParamsLinear)}


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:] or MADE:
        spec, layers = MADE[name]
        fixture(name, partial(save, spec, layers), oracle)


if __name__ == "__main__":
    main()
