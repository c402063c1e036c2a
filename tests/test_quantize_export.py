"""What is written, against the tools that read it: compressed-tensors' own decompressor, and transformers' logits.

    pip install compressed-tensors

Elsewhere, as where continuous integration runs, the tests are skipped.
"""

import json
from pathlib import Path

import pytest
import torch
import transformers
from oracle import logits, make
from test_quantize_run import IDS, run

from qrun.checkpoint import Checkpoint
from qrun.quantize.rounding import Method
from qrun.tensorfile import TensorWriter

compressors = pytest.importorskip("compressed_tensors.compressors")
pytestmark = pytest.mark.filterwarnings("ignore")


def decompressed(directory: Path, module: str) -> torch.Tensor:
    """A module's weight as compressed-tensors expands it."""
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
    from compressed_tensors.utils import match_name

    checkpoint = Checkpoint.open(directory)
    config = QuantizationConfig.model_validate(
        json.loads((directory / "config.json").read_text())["quantization_config"]
    )
    found = [
        group
        for group in config.config_groups.values()
        if isinstance(group, QuantizationScheme) and any(t == "Linear" or match_name(module, t) for t in group.targets)
    ]
    assert len(found) == 1, module
    parts = {
        name.removeprefix(module + "."): checkpoint.read(name)
        for name in checkpoint.names()
        if name.startswith(module + ".")
    }
    compressor = compressors.BaseCompressor.get_value_from_registry(found[0].format)
    return compressor.decompress(parts, found[0])["weight"]


@pytest.mark.parametrize(
    ("case", "quant"),
    [
        ("llama", "W4g32"), ("qwen3", "W3g32"), ("ernie", "W2g32"), ("llama", "W8"), ("llama", "W5@channel"),
        ("ernie-odd", "W4g64"), ("ernie-moe", "W4g128"), ("qwen3-moe", "w8a8"), ("ernie", "fp8"), ("llama", "mxfp4"),
        ("qwen3", "nvfp4"), ("ernie-moe", "mix:experts=w2g32,dense=w4g32,act=8"),
    ],
)  # fmt: skip
def test_every_weight_is_what_compressed_tensors_reads(case: str, quant: str, tmp_path: Path) -> None:
    make(case, tmp_path / "m", torch.bfloat16)
    run(tmp_path / "m", tmp_path / "q", quant, "gptq")
    ours, original = Checkpoint.open(tmp_path / "q"), Checkpoint.open(tmp_path / "m")
    modules = [name.removesuffix(".weight") for name in original.names() if name.endswith("_proj.weight")]
    assert len(modules) > 6
    for module in modules:
        theirs = decompressed(tmp_path / "q", module)
        mine = ours.weight(module + ".weight", original.shape(module + ".weight")).float()
        assert torch.equal(mine.to(theirs.dtype), theirs), module


@pytest.mark.parametrize(
    ("case", "quant", "method"),
    [
        ("llama", "W4g32", "gptq"), ("qwen3", "W3g32", "awq+gptq"), ("ernie", "W2g32", "awq"),
        ("ernie-odd", "W4", "rtn"), ("llama-tied-bias", "W8", "awq"),
        ("ernie-moe", "W4g32", "gptq"), ("qwen3-moe", "W4", "gptq"),
    ],
)  # fmt: skip
def test_transformers_computes_the_same_logits(case: str, quant: str, method: Method, tmp_path: Path) -> None:
    make(case, tmp_path / "m", torch.bfloat16)
    run(tmp_path / "m", tmp_path / "q", quant, method, folds="awq" in method)
    ours, original = Checkpoint.open(tmp_path / "q"), Checkpoint.open(tmp_path / "m")
    (tmp_path / "plain").mkdir()
    settings = json.loads((tmp_path / "q" / "config.json").read_text())
    del settings["quantization_config"]
    (tmp_path / "plain" / "config.json").write_text(json.dumps(settings))
    with TensorWriter(tmp_path / "plain" / "model.safetensors") as writer:
        writer.metadata["format"] = "pt"
        for name in original.names():
            weight = ours.weight(name, original.shape(name)).float()
            # transformers expands experts in the type of their scales.
            writer.add(name, weight.bfloat16().float() if ".experts." in name else weight)

    def read(directory: str) -> torch.Tensor:
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / directory, dtype=torch.float32).eval()
        for parameter in model.parameters():  # experts
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()
        return logits(model, IDS)

    expected, found = read("plain"), read("q")
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    before = read("m")
    assert float((found - before).norm() / before.norm()) > 1e-3, "something was quantized"
