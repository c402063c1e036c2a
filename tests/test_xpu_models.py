"""Whole models on the XPU backend, a CPU standing in for the card: transformers' logits, the CPU backend's tokens, and
what is bound to what."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_doubles import difference
from xpu_aten import aten_of_xpu
from xpu_doubles import card, without_triton

pytest.importorskip("transformers")

from oracle import logits, make
from test_readers import FIXTURES, MODELS, expanded

import qrun
import qrun.api
from qrun.backends.base import Backend
from qrun.backends.xpu import XPUBackend
from qrun.batch import Batch, Request
from qrun.cache import KVCache
from qrun.checkpoint import Checkpoint
from qrun.engine import Engine
from qrun.errors import StrictError
from qrun.gguf_tokenizer import open_tokenizer
from qrun.recipe import Recipe
from qrun.sampler import Sampling

IDS = [(7 * i * i + 3 * i + 1) % 97 for i in range(20)]
HELD_OUT = Path(qrun.__file__).parent / "spark" / "heldout.txt"
HALVES = [torch.bfloat16, torch.float16]
SLACK = {torch.bfloat16: 8, torch.float16: 1}
"""How much further apart results may be in BF16."""


@pytest.fixture(autouse=True)
def aten(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The operators that only Intel GPUs have in torch; Triton's kernels only where a test is of them."""
    if "triton" not in request.node.name:
        without_triton(monkeypatch)
    with aten_of_xpu():
        yield


def load(
    path: Path | None, *recipe: str | Recipe, half: torch.dtype = torch.bfloat16, first: Any = None, **options: Any
) -> Engine:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qrun.api, "pick", lambda *names, **others: XPUBackend(card(half), first=first))
        return qrun.load(path, *recipe, cache=False, **({"context": 64} | options))


@pytest.mark.parametrize(
    ("case", "half"),
    [
        ("ernie", torch.float16), ("ernie-odd", torch.bfloat16), ("ernie-untied-bias", torch.float16),
        ("ernie-moe", torch.float16), ("ernie-moe", torch.bfloat16), ("ernie-moe-no-shared", torch.float16),
        ("mistral-window", torch.float16), ("qwen3", torch.bfloat16),
    ],
)  # fmt: skip
def test_logits_are_transformers(tmp_path: Path, case: str, half: torch.dtype) -> None:
    """Prefill in one forward, then the last tokens one by one."""
    model = make(case, tmp_path, torch.bfloat16)
    engine = load(tmp_path, "bf16", "fp32", half=half)
    wanted = logits(model, IDS)
    assert difference(engine.logits(IDS), wanted) < 6e-3 * SLACK[half]
    with torch.inference_mode():
        engine.reset()
        found = list(engine.prefill(IDS[:17]))[-1]
        for i in range(17, 20):
            assert difference(found[0], wanted[i - 1]) < 6e-3 * SLACK[half]
            found = engine.step(torch.tensor([IDS[i]]))
    assert difference(found[0], wanted[-1]) < 6e-3 * SLACK[half]


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(
    ("recipe", "kv"),
    [
        ("wint4", "int4"), ("W4g32sym", "int8"), ("W4@channel", "k8v4"), ("wint8", "int8"), ("w8a8", "bf16"),
        ("wfp8a16", "fp8"), ("fp8", "fp8"), ("nf4", "bf16"), ("nvfp4", "int8"), ("W2g32", "int8"), ("W6", "int8"),
    ],
)  # fmt: skip
def test_spark_is_what_it_is_in_plain_torch(recipe: str, kv: str, half: torch.dtype) -> None:
    """Every recipe from end to end on text that it knows, against float32 on the same codes; then a step."""
    engine = load(None, recipe, kv, half=half, context=128)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qrun.api, "pick", lambda *names, **options: Backend())
        plain = qrun.load(None, recipe, kv, context=128, cache=False)
    ids = open_tokenizer(engine.source).encode(HELD_OUT.read_text(encoding="utf-8")[:300])[:60]
    assert divergence(engine.logits(ids), plain.logits(ids)) < 3e-3
    assert divergence(engine.step(torch.tensor([5])), plain.step(torch.tensor([5]))) < 6e-3
    # Codes of a cache or of activations that fall to the other side of a step are an error of their own.
    rounds = {"int4", "k8v4"} & {kv} or recipe in ("fp8", "w8a8")
    assert difference(engine.logits(ids), plain.logits(ids)) < (0.05 if rounds or half == torch.bfloat16 else 0.012)


def divergence(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Mean KL divergence in nats."""
    here, there = (torch.log_softmax(logits.float(), -1) for logits in (found, wanted))
    return float((there.exp() * (there - here)).sum(-1).mean())


@pytest.mark.parametrize("first", ["native", "triton", "torch"])
def test_a_tier_goes_first(tmp_path: Path, first: str) -> None:
    if first == "triton":
        pytest.importorskip("triton")
    make("ernie", tmp_path, torch.bfloat16, num_hidden_layers=1)
    engine = load(tmp_path, "wint4", "int8", first=first, half=torch.float16)
    kernels = {binding.op: binding.kernel for binding in engine.card.bindings}
    word = {"native": "aten", "triton": "triton", "torch": "torch"}[first]
    assert kernels["qkv"].startswith(word), kernels
    assert kernels["down"].startswith(word), kernels


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_of_other_tools(name: str, tmp_path: Path) -> None:
    """On the codes that a real tool wrote, against float32 on its own values."""
    full = expanded(name, tmp_path / "full")
    vocab = Checkpoint.open(full).shape("model.embed_tokens.weight")[0]
    ids = [i % vocab for i in (3, 77, 14, 120, 55, 9, 81, 2, 5)]
    wanted = qrun.load(full, "fp32", device="cpu", context=64).logits(ids)
    engine = load(FIXTURES / name, Recipe.parse("auto", "fp32"), half=torch.float16)
    assert difference(engine.logits(ids), wanted) < (8e-3 if engine.card.activations == "16" else 0.1)


def test_strict_refuses_an_expanding_tier() -> None:
    with pytest.raises(StrictError, match="qkv in int4"):
        load(None, "wint4", first="torch", strict=True)
    load(None, "wint4", strict=True)


def test_32_bits_are_32_bits(tmp_path: Path) -> None:
    model = make("ernie", tmp_path, torch.float32)
    engine = load(tmp_path, "fp32", "fp32")
    assert difference(engine.logits(IDS), logits(model, IDS)) < 2e-5


def test_a_reply_is_the_same_twice(tmp_path: Path) -> None:
    make("ernie-moe", tmp_path, torch.bfloat16)
    engine = load(tmp_path, "wint4", "int8")
    settings: dict[str, Any] = {"max_tokens": 5, "temperature": 1.0, "top_k": 20, "seed": 3, "loop_guard": False}
    first = list(engine.generate(IDS[:5], **settings))
    engine.reset()  # else the last token of the prompt is read alone, by another product that rounds otherwise
    assert list(engine.generate(IDS[:5], **settings)) == first
    engine.reset()
    assert list(engine.generate(IDS[:5], **(settings | {"seed": 4}))) != first


@pytest.mark.parametrize(
    ("case", "recipe", "kv"), [("ernie-odd", "wint4", "int8"), ("ernie-moe-no-shared", "wint8", "fp32")]
)
def test_prompts_run_together(tmp_path: Path, case: str, recipe: str, kv: str) -> None:
    """The logits of a step of three conversations are those of each alone; and a batch comes to its ends."""
    make(case, tmp_path, torch.bfloat16, num_hidden_layers=1)
    engine = load(tmp_path, recipe, kv, half=torch.float16)
    prompts = [IDS[3:4], IDS[:9], IDS[:9] + IDS[11:14]]
    wanted: list[torch.Tensor] = []
    beside: list[KVCache] = []
    for ids in prompts:
        engine.logits(ids)
        wanted.append(engine.step(torch.tensor([5])).clone())
        engine.reset()
        other = engine.beside(kv)
        other.logits(ids)
        beside.append(other.cache)
    with torch.inference_mode():
        found = engine.decoder.forward_many(torch.tensor([5, 5, 5]), beside)
    assert difference(found, torch.cat(wanted)) < 6e-3
    settings: dict[str, Any] = {"max_tokens": 2, "loop_guard": False, "sampling": Sampling(top_k=20, seed=3)}
    streams = list(Batch(engine, [Request(ids=ids, **settings) for ids in prompts], width=2).streams)
    assert [len(list(stream)) for stream in streams] == [2, 2, 2]
