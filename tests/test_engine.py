"""The engine over real tiny models: prefix reuse, chunks, limits, ends, and every recipe and cache."""

import copy
import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import logits, make

import qrun
import qrun.cache
import qrun.memory
from qrun.cache import KVStore
from qrun.engine import Engine, Generation
from qrun.errors import ContextOverflowError, DoesNotFitError, RecipeError, UsageError
from qrun.formats import KVFormat, format_of, kv_format
from qrun.recipe import Recipe

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
    for count in (-1, 21):
        with pytest.raises(UsageError, match=f"logprobs is {count}"):
            engine.generate([1], logprobs=count)
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


@pytest.mark.parametrize("kv", ["int8", "int4", "fp8", "k8v4"])
def test_another_cache_is_made_of_what_the_old_one_holds(
    kv: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit what the format makes of the values, piece by piece, and the conversation goes on from there."""
    engine.set_kv("bf16")
    reply(engine, IDS[:30], 3)
    held = list(engine.cached_ids)
    before = [layer.read(0, len(held)) for layer in engine.cache.layers]
    monkeypatch.setattr(qrun.cache, "PIECE", 7)
    engine.set_kv(kv)
    assert list(engine.cached_ids) == held and engine.cache.length == len(held) == 32
    recipe = Recipe.parse("bf16", kv)
    assert engine.card.kv == recipe.kv and engine.card.kv_bytes_per_token == engine.cache.bytes_per_token
    for layer, values in zip(engine.cache.layers, before, strict=True):
        for store, x, name in zip((layer.k, layer.v), values, (recipe.k, recipe.v), strict=True):
            codes, scale = kv_format(name).encode(x)
            assert store.codes.shape[1] == engine.context and scale is not None and store.scale is not None
            assert torch.equal(store.codes[:, :32].view(torch.uint8), codes.view(torch.uint8))
            assert torch.equal(store.scale[:, :32], scale)
    again = engine.generate([*held, 5], max_tokens=4, temperature=0, logprobs=0, loop_guard=False)
    list(again)
    assert again.stats.reused_tokens == 32
    # Near what a cache says that was in this format from the beginning.
    engine.reset()
    fresh = engine.generate([*held, 5], max_tokens=1, temperature=0, logprobs=20, loop_guard=False)
    likely = dict(fresh.logprobs[0].top) if list(fresh) else {}
    assert abs(likely[again.logprobs[0].token] - again.logprobs[0].logprob) < {"int8": 0.02, "fp8": 0.2}.get(kv, 1.5)


@pytest.mark.parametrize("kv", ["bf16", "int8", "k8v4"])
def test_the_same_cache_again_changes_nothing(kv: str, engine: Engine) -> None:
    engine.set_kv(kv)
    reply(engine, IDS[:20], 3)
    after = engine.step(torch.tensor([9])).clone()
    engine.cache.truncate(len(engine.ids))
    engine.set_kv(kv)
    assert torch.equal(engine.step(torch.tensor([9])), after)


def test_there_and_back_is_near(engine: Engine) -> None:
    expected = reply(engine, IDS[:20], 3)
    after = engine.step(torch.tensor([9])).clone()
    engine.cache.truncate(len(engine.ids))
    for kv in ("bf16", "int8", "fp32"):
        engine.set_kv(kv)
    found = engine.step(torch.tensor([9]))
    assert 0 < error(found, after) < 0.03
    engine.reset()
    assert reply(engine, IDS[:20], 3) == expected


def test_only_one_layer_exists_twice_while_a_cache_is_converted(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    reply(engine, IDS[:20], 3)
    old = [weakref.ref(layer.k.codes) for layer in engine.cache.layers]
    alive: list[int] = []
    convert = KVStore.converted

    def counted(self: KVStore, kind: KVFormat, length: int) -> KVStore:
        alive.append(sum(codes() is not None for codes in old))
        return convert(self, kind, length)

    monkeypatch.setattr(KVStore, "converted", counted)
    engine.set_kv("int8")
    assert alive == [2, 2, 1, 1], "keys and values of two layers"


@pytest.mark.parametrize("cause", [MemoryError, KeyboardInterrupt])
def test_a_conversion_that_breaks_off_leaves_an_empty_cache_of_the_old_formats(
    cause: type[BaseException], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, card = reply(engine, IDS[:20]), engine.card
    convert, calls = KVStore.converted, iter(range(9))

    def breaks(self: KVStore, kind: KVFormat, length: int) -> KVStore:
        if next(calls) == 2:
            raise cause
        return convert(self, kind, length)

    monkeypatch.setattr(KVStore, "converted", breaks)
    with pytest.raises(DoesNotFitError if cause is MemoryError else cause):
        engine.set_kv("int8")
    assert engine.card is card and engine.recipe.kv == card.kv == "fp32"
    assert engine.cache.length == len(engine.ids) == 0
    assert {layer.k.format.name for layer in engine.cache.layers} == {"fp32"}
    assert reply(engine, IDS[:20]) == expected


def test_a_cache_that_cannot_fit_is_refused_before_anything_is_done(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.set_kv("int4")
    reply(engine, IDS[:20])
    held, cache = list(engine.cached_ids), engine.cache.layers[0]
    monkeypatch.setattr(qrun.memory, "available", lambda device: 1000)
    with pytest.raises(DoesNotFitError, match=r"a cache in fp32 of 64 tokens needs .* are free: use "):
        engine.set_kv("fp32")
    assert list(engine.cached_ids) == held and engine.cache.layers[0] is cache and engine.recipe.kv == "int4"


@dataclass
class Script:
    """A constraint that allows one set of tokens after another, and is complete after the last."""

    steps: Sequence[Sequence[int] | None]
    vocab: int = 131
    pushed: list[int] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return len(self.pushed) == len(self.steps)

    def allowed(self) -> torch.Tensor | None:
        step = self.steps[len(self.pushed)]
        return None if step is None else torch.isin(torch.arange(self.vocab), torch.tensor(step))

    def push(self, token: int) -> None:
        self.pushed.append(token)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_constraint_says_what_may_come_and_when_it_is_over(
    ahead: bool, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.backend, "runs_ahead", ahead)
    free = reply(engine, IDS[:10], 3)
    script = Script([[50], [7, 8, 9], None, [77]])
    held = engine.generate(IDS[:10], temperature=0, constraint=script, stop_ids=[2], loop_guard=False)
    out = list(held)
    assert out == script.pushed and out[0] == 50 and out[1] in (7, 8, 9) and out[3] == 77 and len(out) == 4
    assert held.finish_reason == "stop" and held.stats.new_tokens == 4 and free[0] != 50
    assert list(engine.cached_ids) == IDS[:10] + out[:-1] and engine.cache.length == 13
    # A stop id ends it where it is allowed, and is no part of it; so does max_tokens.
    script = Script([[50], [2], [3]])
    held = engine.generate(IDS[:10], temperature=5.0, constraint=script, stop_ids=[2])
    assert list(held) == [50] == script.pushed and held.finish_reason == "stop"
    held = engine.generate(IDS[:10], max_tokens=2, constraint=Script([[50], [60], [3]]), loop_guard=False)
    assert list(held) == [50, 60] and held.finish_reason == "length"


@pytest.mark.parametrize("ahead", [False, True])
def test_log_probabilities_are_the_models_own(ahead: bool, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before mask, penalties and temperature, and taken before a step that begins early overwrites the logits."""
    step, place = engine.step, torch.empty(1, 131)
    monkeypatch.setattr(engine, "step", lambda token: place.copy_(step(token)))
    monkeypatch.setattr(engine.backend, "runs_ahead", ahead)
    settings: dict[str, Any] = {"temperature": 3.0, "repeat_penalty": 5.0, "seed": 1, "loop_guard": False}
    made = engine.generate(IDS[:10], max_tokens=6, logprobs=4, constraint=Script([None, [50], *[None] * 9]), **settings)
    out = list(made)
    monkeypatch.undo()
    expected = engine.logits(IDS[:10] + out[:-1])[9:].log_softmax(-1)
    assert [scored.token for scored in made.logprobs] == out and out[1] == 50
    for scored, row in zip(made.logprobs, expected, strict=True):
        assert scored.logprob == pytest.approx(float(row[scored.token]), abs=1e-4)
        best = row.topk(4)
        assert [token for token, _ in scored.top] == best.indices.tolist()
        assert [value for _, value in scored.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert any(scored.top[0][0] != scored.token for scored in made.logprobs), "else nothing was told apart"


def test_log_probabilities_are_only_what_was_asked_for(engine: Engine) -> None:
    plain = engine.generate(IDS[:5], max_tokens=3, temperature=0)
    bare = engine.generate(IDS[:5], max_tokens=3, temperature=0, logprobs=0)
    out = list(plain)
    assert list(bare) == out and plain.logprobs == []
    assert [(scored.token, scored.top) for scored in bare.logprobs] == [(token, ()) for token in out]
    assert all(math.isfinite(scored.logprob) and scored.logprob < 0 for scored in bare.logprobs)


def test_how_much_of_a_prompt_has_been_read_can_be_seen(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    reply(engine, IDS[:6], 1)
    monkeypatch.setattr(engine.backend, "chunk", 10)
    seen: list[int] = []
    forward = engine.decoder.forward
    made: Generation = engine.generate(IDS, max_tokens=1, temperature=0)

    def watched(*arguments: Any, **options: Any) -> torch.Tensor:
        seen.append(made.prefilled)
        return forward(*arguments, **options)

    monkeypatch.setattr(engine.decoder, "forward", watched)
    assert made.prefilled == 0
    list(made)
    assert seen == [6, 16, 26, 36] and made.prefilled == 40
