"""Every family against transformers' logits: float32 tightly, BF16 as far as BF16 goes, odd shapes among them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import CASES, logits, make

import qrun
from qrun.errors import CheckpointError, UnsupportedModelError
from qrun.models import describe

IDS = [(7 * i * i + 3 * i + 1) % 97 for i in range(37)]


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    error = (ours - theirs).norm() / theirs.norm()
    assert error < tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("case", CASES)
def test_logits_in_float32(case: str, tmp_path: Path) -> None:
    model = make(case, tmp_path)
    engine = qrun.load(tmp_path, "fp32")
    close(engine.logits(IDS), logits(model, IDS), 2e-5)


@pytest.mark.parametrize("case", CASES)
def test_logits_in_bf16(case: str, tmp_path: Path) -> None:
    model = make(case, tmp_path, torch.bfloat16)
    engine = qrun.load(tmp_path, "bf16", kv="fp32")
    expected = logits(model, IDS)
    close(engine.logits(IDS), expected, 5e-4)
    engine.set_kv("bf16")
    close(engine.logits(IDS), expected, 2e-2)


@pytest.mark.parametrize("case", ["ernie", "ernie-odd", "ernie-moe", "llama", "mistral-window", "qwen3", "qwen3-moe"])
def test_decoding_token_by_token_equals_one_pass(case: str, tmp_path: Path) -> None:
    model = make(case, tmp_path)
    engine = qrun.load(tmp_path, "fp32")
    expected = logits(model, IDS)
    reply = engine.generate(IDS[:5], max_tokens=1, temperature=0)
    first = next(reply)
    assert first == int(expected[4].argmax())
    for i in range(5, len(IDS)):
        close(engine.step(torch.tensor(IDS[i : i + 1]))[0], expected[i], 5e-5)


def test_greedy_generation_is_transformers_own(tmp_path: Path) -> None:
    model = make("ernie-moe", tmp_path)
    expected = model.generate(
        torch.tensor([IDS[:9]]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, 9:].tolist()
    engine = qrun.load(tmp_path, "fp32")
    assert list(engine.generate(IDS[:9], max_tokens=20, temperature=0, loop_guard=False)) == expected


def edit(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"model_type": "ernie4_5_moe_vl"}, "ernie4_5_moe_vl"),
        ({"model_type": None}, "model_type"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
        ({"rope_parameters": "fast"}, "rope_parameters"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"head_dim": 7}, "head_dim"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"use_bias": "no"}, "use_bias"),
    ],
)
def test_unsupported_config_values_are_refused_by_name(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    make("ernie", tmp_path)
    edit(tmp_path, **change)
    with pytest.raises(UnsupportedModelError, match=named):
        qrun.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"hidden_size": 128}, "shape"),
        ({"num_hidden_layers": 3}, "layers.2"),
        ({"vocab_size": 10**6}, "shape"),
        ({"num_hidden_layers": 1}, "layers.1"),
        ({"use_bias": True}, "bias"),
        ({"tie_word_embeddings": False}, "lm_head"),
    ],
)
def test_a_config_that_lies_is_caught_before_anything_is_allocated(
    change: dict[str, Any], error: str, tmp_path: Path
) -> None:
    make("ernie", tmp_path)
    edit(tmp_path, **change)
    with pytest.raises(CheckpointError, match=error):
        qrun.load(tmp_path)


def test_a_tensor_the_decoder_would_ignore_is_refused(tmp_path: Path) -> None:
    make("qwen3", tmp_path)
    edit(tmp_path, model_type="llama")
    with pytest.raises(UnsupportedModelError, match="k_norm"):
        qrun.load(tmp_path)


def test_both_ways_to_write_rope_theta_mean_the_same() -> None:
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 8}
    shape |= {"vocab_size": 9, "max_position_embeddings": 16}
    old = describe({"model_type": "ernie4_5", "rope_theta": 1234.0, **shape})
    new = describe(
        {"model_type": "ernie4_5", "rope_parameters": {"rope_theta": 1234.0, "rope_type": "default"}, **shape}
    )
    assert old == new and old.rope.theta == 1234.0


def test_next_token_prediction_heads_are_skipped(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = make("ernie", tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(
        load_file(file) | {"model.mtp_block.0.x.weight": torch.ones(3), "mtp_emb_norm.0.weight": torch.ones(3)}, file
    )
    close(qrun.load(tmp_path, "fp32").logits(IDS), logits(model, IDS), 2e-5)


def test_nan_weights_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for name in ("model.layers.1.mlp.down_proj.weight", "model.norm.weight"):
        make("ernie", tmp_path)
        file = tmp_path / "model.safetensors"
        tensors = load_file(file)
        tensors[name].view(-1)[5] = float("nan")
        save_file(tensors, file)
        with pytest.raises(CheckpointError, match=name):
            qrun.load(tmp_path)
