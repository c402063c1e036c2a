"""Whole GGUF models, as llama.cpp's converter writes them, against transformers' and llama.cpp's own logits."""

import array
import math
import struct
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf_doubles import changed, encode, tensors
from safetensors.torch import load_file

import qrun
from qrun.assign import by_checkpoint, by_recipe
from qrun.backends import pick
from qrun.cache import KVCache
from qrun.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from qrun.formats import AffineFormat
from qrun.formats.kv import kv_format
from qrun.gguf_checkpoint import GgufCheckpoint, open_checkpoint
from qrun.gguf_file import CODES, GgufFile
from qrun.gguf_tokenizer import open_tokenizer
from qrun.loader import Loader
from qrun.models import describe
from qrun.recipe import Recipe

FIXTURES = Path(__file__).parent / "fixtures"
MODELS = ["llama", "llama_spm", "qwen2", "qwen3", "qwen3_moe", "ernie", "ernie_moe"]


def file_of(name: str) -> Path:
    return FIXTURES / f"gguf_{name}" / "model.gguf"


def logits(checkpoint: GgufCheckpoint, ids: torch.Tensor, quant: str = "fp32") -> torch.Tensor:
    config, recipe, backend = describe(checkpoint.config), Recipe.parse(quant), pick("cpu")
    formats = by_checkpoint(checkpoint, recipe) if recipe.own else by_recipe(recipe)
    decoder = Loader(checkpoint, config, recipe, backend, formats=formats).load()
    backend.prepare()
    cache = KVCache(
        layers=config.layers, kv_heads=config.kv_heads, head_dim=config.head_dim, capacity=64, k=kv_format("fp32"),
        v=kv_format("fp32"), device=backend.device,
    )  # fmt: skip
    return decoder.forward(ids, cache)


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    error = (ours - theirs).norm() / theirs.norm()
    assert error < tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_model_that_was_converted(name: str) -> None:
    oracle = load_file(file_of(name).with_name("oracle.safetensors"))
    ours = logits(GgufCheckpoint.open(file_of(name)), oracle["ids"])
    close(ours, oracle["transformers"], 2e-5)
    close(ours, oracle["llama_cpp"].float(), 5e-3)  # whose activations and cache are FP16


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3_moe", "ernie_moe"])
def test_quantized_weights_run_on_their_codes(name: str, tmp_path: Path) -> None:
    file = GgufFile(file_of(name))
    held = tensors(file)
    for tensor, (code, shape, _) in held.items():
        if code != CODES["F16"]:
            continue
        values = file.read(tensor).view(torch.float16).view(shape).float().numpy()
        kind = gguf.GGMLQuantizationType.Q8_0
        held[tensor] = (int(kind), shape, gguf.quants.quantize(values, kind).tobytes())
    path = tmp_path / "q8.gguf"
    path.write_bytes(encode(file.metadata, held))
    checkpoint = GgufCheckpoint.open(path)
    form = checkpoint.format("model.embed_tokens.weight", checkpoint.shape("model.embed_tokens.weight"))
    assert form == AffineFormat(8, 32, True, scale_dtype=torch.float16)
    oracle = load_file(file_of(name).with_name("oracle.safetensors"))
    expanded = logits(checkpoint, oracle["ids"])
    close(logits(checkpoint, oracle["ids"], "auto"), expanded, 2e-3)
    close(expanded, oracle["transformers"], 5e-2)


def test_the_config_of_the_file_is_the_models_own() -> None:
    rope = GgufCheckpoint.open(file_of("llama")).config["rope_parameters"]
    assert rope == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    moe = describe(GgufCheckpoint.open(file_of("ernie_moe")).config).moe
    assert moe is not None
    assert (moe.experts, moe.top_k, moe.width, moe.shared_width, moe.sparse) == (4, 2, 32, 64, (False, True))
    assert describe(GgufCheckpoint.open(file_of("qwen2")).config).tied
    assert not describe(GgufCheckpoint.open(file_of("llama")).config).tied


def rope_file(tmp_path: Path, factors: list[float], **metadata: Any) -> Path:
    file = GgufFile(file_of("llama"))
    held = tensors(file)
    held["rope_freqs.weight"] = (0, (len(factors),), struct.pack(f"<{len(factors)}f", *factors))
    path = tmp_path / "m.gguf"
    path.write_bytes(encode({**file.metadata, **{k.replace("__", "."): v for k, v in metadata.items()}}, held))
    return path


@pytest.mark.parametrize(
    ("factor", "high", "original", "base"),
    [(32.0, 4.0, 8192, 5e5), (8.0, 4.0, 64, 1e4), (4.0, 5.0, 100, 1e4)],
)
def test_llama3_parameters_are_found_from_their_factors(
    factor: float, high: float, original: int, base: float, tmp_path: Path
) -> None:
    made: list[float] = []
    for i in range(16):
        turns = base ** (-i / 16) / (2 * math.pi)
        blend = min(max((original * turns - 1) / (high - 1), 0), 1)
        made.append(1 / ((1 - blend) / factor + blend))
    rope = GgufCheckpoint.open(rope_file(tmp_path, made, llama__rope__freq_base=base)).config["rope_parameters"]
    assert (rope["factor"], rope["original_max_position_embeddings"]) == (factor, original)
    assert rope["high_freq_factor"] == pytest.approx(high, rel=1e-3)


def test_factors_of_no_llama3_rope_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="rope_freqs"):
        GgufCheckpoint.open(rope_file(tmp_path, [1.0 + i % 3 for i in range(16)]))
    with pytest.raises(UnsupportedModelError, match="rope_freqs"):
        GgufCheckpoint.open(rope_file(tmp_path, [float("nan")] * 16))
    with pytest.raises(UnsupportedModelError, match="rope_freqs"):
        GgufCheckpoint.open(rope_file(tmp_path, [1.0] * 8))


@pytest.mark.parametrize(
    ("key", "item", "named"),
    [
        ("general__architecture", "gemma3", "gemma3"),
        ("llama__block_count", None, "block_count is None"),
        ("llama__block_count", 0, "block_count is 0"),
        ("llama__attention__head_count", array.array("I", [1, 2]), "head_count"),
        ("llama__attention__causal", False, "attention.causal"),
        ("llama__rope__dimension_count", 16, "rope.dimension_count"),
        ("llama__rope__scaling__type", "yarn", "yarn"),
        ("llama__expert_count", 8, "expert_count"),
        ("llama__attention__layer_norm_rms_epsilon", "small", "layer_norm_rms_epsilon"),
    ],
)
def test_what_would_change_the_mathematics_is_refused_by_name(key: str, item: Any, named: str, tmp_path: Path) -> None:
    path = changed(file_of("llama"), tmp_path / "m.gguf", **{key: item})
    with pytest.raises(UnsupportedModelError, match=named):
        GgufCheckpoint.open(path)


def test_a_tensor_too_few_or_too_many_or_of_another_shape_is_refused(tmp_path: Path) -> None:
    ids = torch.tensor([1, 2])
    less = GgufCheckpoint.open(changed(file_of("ernie_moe"), tmp_path / "a.gguf", drop=("blk.1.exp_probs_b.bias",)))
    with pytest.raises(CheckpointError, match="e_score_correction_bias"):
        logits(less, ids)
    file = GgufFile(file_of("qwen3"))
    more = {**tensors(file), "blk.0.attn_qkv.weight": (0, (1,), bytes(4))}
    (tmp_path / "b.gguf").write_bytes(encode(file.metadata, more))
    with pytest.raises(UnsupportedModelError, match="attn_qkv"):
        logits(GgufCheckpoint.open(tmp_path / "b.gguf"), ids)
    other = changed(file_of("qwen3"), tmp_path / "c.gguf", qwen3__feed_forward_length=96)
    with pytest.raises(CheckpointError, match=r"ffn_gate.*96"):
        logits(GgufCheckpoint.open(other), ids)
    experts = changed(file_of("qwen3_moe"), tmp_path / "d.gguf", qwen3moe__expert_count=5)
    with pytest.raises(CheckpointError, match="not of 5 experts"):
        GgufCheckpoint.open(experts)


def test_a_model_in_shards_is_one_model(tmp_path: Path) -> None:
    file = GgufFile(file_of("qwen3"))
    held = list(tensors(file).items())
    parts = [dict(held[:7]), dict(held[7:])]
    paths = [tmp_path / f"m-0000{i + 1}-of-00002.gguf" for i in range(2)]
    for i, path in enumerate(paths):
        split: dict[str, Any] = {"split.no": i, "split.count": 2}
        path.write_bytes(encode({**(file.metadata if i == 0 else {}), **split}, parts[i]))
    oracle = load_file(file_of("qwen3").with_name("oracle.safetensors"))
    close(logits(GgufCheckpoint.open(paths[0]), oracle["ids"]), oracle["transformers"], 2e-5)
    with pytest.raises(CheckpointError, match="give the first"):
        GgufCheckpoint.open(paths[1])
    paths[1].write_bytes(paths[0].read_bytes())
    with pytest.raises(CheckpointError, match="not shard 2 of 2"):
        GgufCheckpoint.open(paths[0])
    paths[1].unlink()
    with pytest.raises(CheckpointError, match="m-00002-of-00002"):
        GgufCheckpoint.open(paths[0])


def test_a_path_means_its_file_the_one_in_it_or_safetensors(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(file_of("qwen2").read_bytes())
    assert isinstance(open_checkpoint(file), GgufCheckpoint)
    (tmp_path / "mmproj-m.gguf").touch()
    (tmp_path / "x-00002-of-00003.gguf").touch()
    assert open_checkpoint(tmp_path).path == file
    assert open_tokenizer(tmp_path).directory == file
    (tmp_path / "n.gguf").touch()
    with pytest.raises(CheckpointError, match=r"several models: give one of m\.gguf, n\.gguf"):
        open_checkpoint(tmp_path)
    spark = Path(qrun.__file__).parent / "spark"
    assert open_checkpoint(spark).path == spark
    assert open_tokenizer(spark).encode("hi")


def test_the_checkpoints_other_answers(tmp_path: Path) -> None:
    checkpoint = GgufCheckpoint.open(file_of("ernie_moe"))
    expert = "model.layers.1.mlp.experts.3.down_proj.weight"
    assert expert in checkpoint
    assert "model.layers.0.mlp.experts.0.down_proj.weight" not in checkpoint
    assert checkpoint.shape(expert) == (32, 32)
    assert checkpoint.dtype(expert) == torch.float16
    assert checkpoint.nbytes(expert) == 32 * 32 * 2
    assert checkpoint.format(expert, (32, 32)) is None
    stack = GgufFile(file_of("ernie_moe")).read("blk.1.ffn_down_exps.weight").view(torch.float16).view(4, 32, 32)
    assert torch.equal(checkpoint.weight(expert, (32, 32)), stack[3])
    ends = GgufFile(file_of("ernie_moe")).metadata["tokenizer.ggml.eos_token_id"]
    assert checkpoint.generation_config == {"eos_token_id": [ends]}
    copy = changed(file_of("ernie_moe"), tmp_path / "m.gguf", general__sampling__temp=0.5)
    assert GgufCheckpoint.open(copy).generation_config["temperature"] == 0.5
    assert GgufCheckpoint.open(copy).identity != checkpoint.identity
    with pytest.raises(ModelNotFoundError, match=r"none\.gguf"):
        GgufCheckpoint.open(tmp_path / "none.gguf")
