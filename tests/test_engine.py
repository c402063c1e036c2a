"""The engine over real tiny models: prefix reuse, chunks, limits, ends, and every recipe and cache."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import logits, make

import qrun
import qrun.engine
from qrun.engine import Engine
from qrun.errors import ContextOverflowError, RecipeError, UsageError
from qrun.formats import format_of

IDS = [(7 * i * i + 3 * i + 1) % 97 for i in range(40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make("ernie-moe", path)
    return path


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    yield qrun.load(folder, "fp32", context=64)


def reply(engine: Engine, ids: list[int], count: int = 8, **settings: float) -> list[int]:
    return list(engine.generate(ids, max_tokens=count, loop_guard=False, **({"temperature": 0} | settings)))


def test_a_shared_prefix_is_reused_and_changes_nothing(engine: Engine) -> None:
    fresh = reply(engine, IDS[:20])
    engine.reset()
    reply(engine, IDS[:12])
    again = engine.generate(IDS[:20], max_tokens=8, temperature=0, loop_guard=False)
    assert list(again) == fresh
    assert again.stats.reused_tokens == 12 and again.stats.prompt_tokens == 20
    # The same prompt once more: all but the last token, which is run again for its logits.
    again = engine.generate(IDS[:20], max_tokens=8, temperature=0, loop_guard=False)
    assert list(again) == fresh and again.stats.reused_tokens == 19


def test_chunks_do_not_change_the_logits(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = engine.logits(IDS)
    monkeypatch.setattr(engine.backend, "chunk", 7)
    torch.testing.assert_close(engine.logits(IDS), whole, rtol=1e-4, atol=1e-4)


def test_a_reply_that_is_stopped_leaves_a_conversation_that_goes_on(engine: Engine) -> None:
    expected = reply(engine, IDS[:10], 6)
    engine.reset()
    started = engine.generate(IDS[:10], temperature=0)
    got = [next(started), next(started), next(started)]
    started.close()
    assert got == expected[:3] and started.finish_reason == "cancelled"
    assert list(engine.cached_ids) == IDS[:10] + got[:2]
    assert reply(engine, IDS[:10] + got, 3) == expected[3:]


def test_ends(engine: Engine) -> None:
    first = reply(engine, IDS[:10])
    stopped = engine.generate(IDS[:10], temperature=0, stop_ids=[first[2]], loop_guard=False)
    assert list(stopped) == first[: first.index(first[2])] and stopped.finish_reason == "stop"
    short = engine.generate(IDS[:10], temperature=0, max_tokens=2)
    assert len(list(short)) == 2 and short.finish_reason == "length" and short.stats.new_tokens == 2
    full = engine.generate(IDS[:10], temperature=0, loop_guard=False)
    assert len(list(full)) == 64 - 10 + 1 and full.finish_reason == "context"


def test_an_endless_loop_is_found(engine: Engine) -> None:
    engine_loop = qrun.load(engine.source, "fp32", context=512)
    stuck = engine_loop.generate([5], temperature=0, repeat_penalty=0.01)  # a penalty below 1 rewards repetition
    assert len(list(stuck)) < 500 and stuck.finish_reason == "loop"


def test_seeds_repeat(engine: Engine) -> None:
    a, b = (engine.generate(IDS[:5], max_tokens=12, temperature=1.5, seed=s) for s in (3, 3))
    assert list(a) == list(b) and a.stats.seed == 3
    c = engine.generate(IDS[:5], max_tokens=12, temperature=1.5)
    first = list(c)
    assert first == list(engine.generate(IDS[:5], max_tokens=12, temperature=1.5, seed=c.stats.seed))


def test_impossible_requests(engine: Engine) -> None:
    with pytest.raises(UsageError, match="empty"):
        engine.generate([])
    with pytest.raises(UsageError, match="vocabulary"):
        engine.generate([131])
    with pytest.raises(UsageError, match="max_tokens"):
        engine.generate([1], max_tokens=0)
    with pytest.raises(UsageError, match="warmth"):
        engine.generate([1], warmth=3)
    with pytest.raises(ContextOverflowError, match="65 tokens and the context 64"):
        engine.generate([1] * 65)
    with pytest.raises(UsageError, match="512"):
        qrun.load(engine.source, context=513)
    with pytest.raises(RecipeError, match="int5"):
        engine.set_kv("int5")


@pytest.mark.parametrize("kv", ["bf16", "int8", "fp8", "int4", "k8v4"])
def test_every_cache_keeps_the_logits_close(kv: str, engine: Engine, folder: Path) -> None:
    exact = engine.logits(IDS)
    engine.set_kv(kv)
    assert error(engine.logits(IDS), exact) < {"bf16": 0.01, "int8": 0.02, "fp8": 0.08, "int4": 0.5, "k8v4": 0.4}[kv]
    assert engine.card.kv_bytes_per_token == engine.cache.bytes_per_token


# Recipes whose weights transformers can run too, once they are dequantized row by row: the logits must be the same.
# (fp8's and nvfp4's scales span rows, so that fused weights have other scales than their parts.)
EXACT = [
    "wint8", "W8g64", "wint4", "W4g32", "W4g128sym", "W4@channel", "W8@channel", "nf4", "fp4", "mxfp4", "wint2", "W6",
    "W5", "W3", "mix:experts=w4,dense=w8,lm_head=bf16",
]  # fmt: skip
# Those that also round activations or the cache, or that have such scales: relative error against the same without.
NEAR = {
    "fp8": 0.2, "Wfp8A16": 0.15, "nvfp4": 0.6, "w8a8": 0.15, "W4A8": 0.15, "W8Afp8": 0.3, "W4A16C8": 0.1,
    "WNF4A8C8": 0.2, "W4A8C4": 0.6, "W16A8": 0.15,
}  # fmt: skip


@pytest.fixture(scope="module", params=["ernie-moe", "ernie-odd"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("pair")
    return path, make(request.param, path)


def rounded(model: Any, recipe: qrun.Recipe) -> Any:
    """The model with every weight replaced by what its role's format makes of it."""
    model = copy.deepcopy(model)
    schemes = recipe.schemes()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim < 2 or "e_score" in name or name.endswith("mlp.gate.weight"):
                continue
            tied = model.config.tie_word_embeddings
            role = "embedding" if "embed_tokens" in name and not tied else "dense"
            role = "lm_head" if "lm_head" in name or ("embed_tokens" in name and tied) else role
            form = format_of(schemes["experts" if ".experts." in name else role])
            weight.copy_(form.quantize(weight.detach()).dequantize())
    return model


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def decoded(engine: Engine, count: int) -> torch.Tensor:
    """Logits of IDS after the first count, by decode steps."""
    engine.reset()
    list(engine.generate(IDS[:count], max_tokens=1, temperature=0))
    return torch.cat([engine.step(torch.tensor([i])) for i in IDS[count:]])


@pytest.mark.parametrize("quant", EXACT)
def test_quantized_weights_give_transformers_logits(quant: str, pair: tuple[Path, Any]) -> None:
    path, model = pair
    engine = qrun.load(path, quant, kv="fp32")
    expected = logits(rounded(model, engine.recipe), IDS)
    assert error(engine.logits(IDS), expected) < 1e-3
    assert error(decoded(engine, 30), expected[30:]) < 1e-3  # other kernels than prefill's


@pytest.mark.parametrize("quant", NEAR)
def test_rounded_activations_and_caches_stay_close(quant: str, pair: tuple[Path, Any]) -> None:
    path, model = pair
    engine = qrun.load(path, quant)
    recipe = engine.recipe
    expected = logits(rounded(model, recipe), IDS)
    prefill = engine.logits(IDS)
    assert error(prefill, expected) < NEAR[quant]
    assert error(decoded(engine, 30), prefill[30:]) < 0.05


def test_a_rehearsal_leaves_nothing_behind(engine: Engine) -> None:
    fresh = reply(engine, IDS[:9])
    engine.reset()
    engine.rehearse()
    assert not engine.ids and engine.cache.length == 0
    assert reply(engine, IDS[:9]) == fresh


def test_a_step_ahead_that_does_not_count_is_forgotten(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that does not wait begins the next step before a token is known to end the reply."""
    expected = reply(engine, IDS[:10], 6)
    engine.reset()
    monkeypatch.setattr(engine.backend, "runs_ahead", True)
    assert reply(engine, IDS[:10], 6) == expected
    assert engine.cache.length == len(engine.ids)
    engine.reset()
    stopped = list(engine.generate(IDS[:10], temperature=0, stop_ids=[expected[3]], loop_guard=False))
    assert stopped == expected[: expected.index(expected[3])]
    assert engine.cache.length == len(engine.ids) == 10 + len(stopped)
