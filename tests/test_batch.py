"""Several prompts run together: the steps' logits on every backend and cache, and what streams do."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import make

import qrun
import qrun.api
import qrun.batch
from qrun.backends.base import Backend
from qrun.batch import Batch, Request, Stream
from qrun.cache import KVCache
from qrun.engine import Engine
from qrun.errors import ContextOverflowError, DoesNotFitError, UsageError
from qrun.formats import kv_format
from qrun.sampler import Sampling

IDS = [(7 * i * i + 3 * i + 1) % 97 for i in range(40)]
GREEDY = Sampling(temperature=0.0)
LENGTHS = (3, 17, 1, 30, 9)


def prompt(length: int, turn: int = 0) -> list[int]:
    return [(5 * i * i + 11 * i + 7 * length + turn) % 97 for i in range(length)]


def filled(engine: Engine, ids: list[int]) -> KVCache:
    """A cache in the engine's formats that holds ids."""
    config, recipe = engine.config, engine.recipe
    cache = KVCache(
        layers=config.layers, kv_heads=config.kv_heads, head_dim=config.head_dim, capacity=len(ids) + 4,
        k=kv_format(recipe.k), v=kv_format(recipe.v), device=engine.backend.device,
    )  # fmt: skip
    engine.decoder.forward(torch.tensor(ids), cache)
    return cache


@torch.inference_mode()
def steps(engine: Engine, order: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [2, B, V] of two steps of conversations in an order, together and each alone."""
    found, wanted = [], []
    together, alone = ([filled(engine, prompt(LENGTHS[b])) for b in order] for _ in range(2))
    for turn in range(2):
        tokens = torch.tensor([(13 * b + turn) % 97 for b in order])
        found.append(engine.decoder.forward_many(tokens, together))
        wanted.append(torch.cat([engine.decoder.forward(t, c) for t, c in zip(tokens.split(1), alone, strict=True)]))
    assert [cache.length for cache in together] == [LENGTHS[b] + 2 for b in order]
    return torch.stack(found), torch.stack(wanted)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("case", "recipe", "kv"),
    [
        ("ernie-untied-bias", "bf16", "fp32"),
        ("ernie-odd", "wint4", "bf16"),
        ("ernie-moe", "wint4", "int8"),
        ("ernie-moe", "wint8", "fp8"),
        ("mistral-window", "wint8", "int4"),
        ("qwen3-bias", "W4A8", "k8v4"),
        ("qwen3-moe", "bf16", "int8"),
        ("llama-linear", "nf4", "bf16"),
    ],
)
def test_a_step_of_many_is_the_step_of_each(tmp_path: Path, case: str, recipe: str, kv: str) -> None:
    """In any order. A value at the edge between two codes of the cache or of 8-bit activations may fall either way."""
    make(case, tmp_path)
    engine = qrun.load(tmp_path, recipe, kv, device="cpu", context=64, threads=2)
    found, wanted = steps(engine, [0, 1, 2, 3, 4])
    assert error(found, wanted) < (1e-3 if kv in ("fp32", "bf16") and recipe != "W4A8" else 2e-2)
    order = [3, 0, 4, 2, 1]
    torch.testing.assert_close(steps(engine, order)[0], found[:, order], rtol=2e-3, atol=2e-3)


def test_long_conversations_are_attended_to_in_pieces(tmp_path: Path) -> None:
    """One of 300 positions beside one of 2, whose views must not be mixed up when another takes its place."""
    make("qwen3", tmp_path)
    engine = qrun.load(tmp_path, "fp32", "fp32", device="cpu", context=400, threads=2)
    with torch.inference_mode():
        for lengths in ((300, 2), (2, 150), (2, 150, 129)):
            caches = [filled(engine, prompt(length)) for length in lengths]
            alone = [filled(engine, prompt(length)) for length in lengths]
            tokens = torch.arange(len(lengths)) + 5
            wanted = [engine.decoder.forward(t, c) for t, c in zip(tokens.split(1), alone, strict=True)]
            assert error(engine.decoder.forward_many(tokens, caches), torch.cat(wanted)) < 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make("ernie-moe", path)
    return path


@pytest.fixture
def engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """On plain torch, where a row's arithmetic is about the same in any company."""
    monkeypatch.setattr(qrun.api, "pick", lambda *names, **options: Backend())
    yield qrun.load(folder, "fp32", "fp32", context=64)


def request(ids: list[int], **changes: Any) -> Request:
    return Request(**({"ids": ids, "max_tokens": 8, "sampling": GREEDY, "loop_guard": False} | changes))


def alone(engine: Engine, ids: list[int], **changes: Any) -> list[int]:
    settings: dict[str, Any] = {"max_tokens": 8, "sampling": GREEDY, "loop_guard": False} | changes
    engine.reset()
    made = list(engine.generate(ids, **settings))
    engine.reset()
    return made


def round_robin(streams: list[Stream]) -> list[list[int]]:
    made: list[list[int]] = [[] for _ in streams]
    going = list(range(len(streams)))
    while going:
        for i in list(going):
            token = next(streams[i], None)
            if token is None:
                going.remove(i)
            else:
                made[i].append(token)
    return made


@pytest.mark.parametrize("width", [1, 2, None])
def test_everyone_gets_what_it_would_get_alone(engine: Engine, width: int | None) -> None:
    lengths = [3, 17, 1, 30, 9]
    wanted = [alone(engine, prompt(n), max_tokens=4 + i) for i, n in enumerate(lengths)]
    requests = [request(prompt(n), max_tokens=4 + i) for i, n in enumerate(lengths)]
    assert [list(stream) for stream in Batch(engine, requests, width).streams] == wanted
    streams = list(Batch(engine, requests, width).streams)
    assert round_robin(streams) == wanted
    assert [stream.finish_reason for stream in streams] == ["length"] * 5
    assert [stream.stats.new_tokens for stream in streams] == [4, 5, 6, 7, 8]
    assert [stream.stats.prompt_tokens for stream in streams] == lengths
    assert all(stream.stats.prefill_seconds > 0 and stream.stats.decode_seconds > 0 for stream in streams)
    assert all(stream.cache is None for stream in streams), "memory goes back with the last one"


def test_a_kernel_backend_says_the_same(folder: Path) -> None:
    engine = qrun.load(folder, "wint4", "int8", device="cpu", context=64, threads=2)
    wanted = [alone(engine, prompt(n)) for n in LENGTHS]
    assert [list(stream) for stream in Batch(engine, [request(prompt(n)) for n in LENGTHS]).streams] == wanted


def test_ends(engine: Engine) -> None:
    first = alone(engine, IDS[:10])
    at = next(i for i in range(2, 8) if first[i] not in first[:i])
    stop, full, short, seeded, again = Batch(
        engine,
        [
            request(IDS[:10], stop_ids=[first[at]]),
            request(IDS[:10], max_tokens=None),
            request(IDS[:10], max_tokens=1),
            request(IDS[:5], sampling=Sampling(temperature=1.5, seed=3)),
            request(IDS[:5], sampling=Sampling(temperature=1.5, seed=3)),
        ],
    ).streams
    assert list(stop) == first[:at] and stop.finish_reason == "stop"
    assert list(full) == alone(engine, IDS[:10], max_tokens=None) and full.finish_reason == "context"
    assert full.stats.new_tokens == 64 - 10 + 1
    assert list(short) == first[:1] and short.finish_reason == "length"
    made = list(seeded)
    assert made == list(again) == alone(engine, IDS[:5], sampling=Sampling(temperature=1.5, seed=3))
    assert seeded.stats.seed == 3


def test_an_endless_loop_ends_alone(engine: Engine) -> None:
    engine = qrun.load(engine.source, "fp32", context=512)
    again = Sampling(temperature=0.0, repeat_penalty=0.01)  # a penalty below 1 rewards repetition
    requests = [request([5], max_tokens=500, sampling=again, loop_guard=guard) for guard in (True, False)]
    stuck, other = Batch(engine, requests).streams
    assert len(list(stuck)) < 500 and stuck.finish_reason == "loop"
    assert len(list(other)) == 500 and other.finish_reason == "length"


def test_a_common_beginning_is_read_once(engine: Engine) -> None:
    """From whoever runs, from the last one that ran, and from the engine's own conversation, which stays."""
    prompts = [IDS[:20] + tail for tail in ([1, 2], [3], [4, 5, 6])] + [[*IDS[:20], 1, 2]]
    wanted = [alone(engine, ids) for ids in prompts]
    for width in (None, 1):
        streams = list(Batch(engine, [request(ids) for ids in prompts], width).streams)
        assert [list(stream) for stream in streams] == wanted
        reused = [stream.stats.reused_tokens for stream in streams]
        assert reused == ([0, 20, 20, 21] if width is None else [0, 20, 20, 20])
        assert [stream.prefilled for stream in streams] == [len(ids) for ids in prompts]
    list(engine.generate(IDS[:12], max_tokens=1, sampling=GREEDY))
    (stream,) = Batch(engine, [request(prompts[0])]).streams
    assert list(stream) == wanted[0] and stream.stats.reused_tokens == 12
    assert list(engine.cached_ids) == IDS[:12] and engine.cache.length == 12


def test_at_most_width_run_and_requests_are_read_as_there_is_room(engine: Engine, monkeypatch: Any) -> None:
    read: list[int] = []

    def requests() -> Iterator[Request]:
        for i, count in enumerate((3, 9, 3, 3)):
            read.append(i)
            yield request(prompt(4, i), max_tokens=count)

    widths: list[int] = []
    many = engine.decoder.forward_many
    monkeypatch.setattr(engine.decoder, "forward_many", lambda t, c: (widths.append(len(c)), many(t, c))[1])
    streams = Batch(engine, requests(), width=2).streams
    assert read == []
    first = next(streams)
    assert read == [0]
    next(first)
    assert read == [0, 1]
    assert list(first) == alone(engine, prompt(4, 0), max_tokens=3)[1:]
    second = next(streams)
    assert list(second) == alone(engine, prompt(4, 1), max_tokens=9)
    assert read == [0, 1, 2, 3], "one begins when one ends"
    assert [list(stream) for stream in streams] == [alone(engine, prompt(4, i), max_tokens=3) for i in (2, 3)]
    assert widths and set(widths) == {2}


def test_closing_ends_one_and_lets_the_next_in(engine: Engine) -> None:
    a, b, c = Batch(engine, [request(prompt(n), max_tokens=20) for n in (3, 5, 7)], width=2).streams
    got = [next(a), next(b)]
    list(b)  # a's tokens wait meanwhile
    a.close()
    assert a.finish_reason == "cancelled" and next(a, None) is None and a.stats.new_tokens == 1
    assert len(list(c)) == 20 and c.finish_reason == "length"
    assert got == [alone(engine, prompt(n))[0] for n in (3, 5)]
    c.close()
    assert c.finish_reason == "length", "closing after the end changes nothing"
    waiting = list(Batch(engine, [request(prompt(n)) for n in (3, 5)], width=1).streams)
    waiting[0].close()
    assert list(waiting[1]) == alone(engine, prompt(5))


def test_a_bad_request_fails_alone(engine: Engine) -> None:
    good, long, wrong, other = Batch(
        engine, [request(prompt(3)), request([1] * 65), request([500]), request(prompt(5))]
    ).streams
    with pytest.raises(ContextOverflowError, match="65 tokens and the context 64"):
        next(long)
    with pytest.raises(UsageError, match="vocabulary"):
        next(wrong)
    assert next(long, None) is None
    assert list(good) == alone(engine, prompt(3)) and list(other) == alone(engine, prompt(5))
    for width in (0, 65):
        with pytest.raises(UsageError, match="1 to 64"):
            Batch(engine, [], width)
    assert list(Batch(engine, []).streams) == []


def test_memory_decides_how_many_run(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    each = engine.cache.bytes_per_token * (4 + 8)
    widths: list[int] = []
    many = engine.decoder.forward_many
    monkeypatch.setattr(engine.decoder, "forward_many", lambda t, c: (widths.append(len(c)), many(t, c))[1])
    for room, most in ((2.5, 2), (0.1, 1)):
        widths.clear()
        monkeypatch.setattr(qrun.batch.memory, "available", lambda device, room=room: room * each / qrun.batch.SHARE)
        streams = Batch(engine, [request(prompt(4, i)) for i in range(4)]).streams
        assert [list(stream) for stream in streams] == [alone(engine, prompt(4, i)) for i in range(4)]
        assert max(widths, default=1) == most


def test_memory_that_runs_out(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt waits for those that run; a step that does not fit ends those it was for, and no others."""
    wanted = [alone(engine, prompt(n)) for n in (3, 5, 7)]
    forward, many = engine.decoder.forward, engine.decoder.forward_many
    failing = True

    def scarce(ids: torch.Tensor, cache: KVCache, **options: Any) -> torch.Tensor:
        if failing and len(ids) == 5:
            raise MemoryError
        return forward(ids, cache, **options)

    monkeypatch.setattr(engine.decoder, "forward", scarce)
    streams = list(Batch(engine, [request(prompt(n)) for n in (3, 5, 7)]).streams)
    made = [next(streams[0])]
    failing = False
    assert made + list(streams[0]) == wanted[0]
    assert [list(stream) for stream in streams[1:]] == wanted[1:]

    def none(tokens: torch.Tensor, caches: list[KVCache]) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine.decoder, "forward_many", none)
    a, b, c = Batch(engine, [request(prompt(n)) for n in (3, 5, 7)], width=2).streams
    assert next(a) == wanted[0][0]
    for stream in (a, b):
        with pytest.raises(DoesNotFitError, match="memory ran out"):
            list(stream)
    monkeypatch.setattr(engine.decoder, "forward_many", many)
    assert list(c) == wanted[2]
    assert alone(engine, prompt(3)) == wanted[0]


def test_an_interrupt_leaves_a_batch_that_goes_on(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it comes: in a prompt, in a step before or after it wrote the caches, in the choice of a token."""
    wanted = [alone(engine, prompt(n)) for n in (3, 5)]
    calls = 0

    def interrupted(function: Any, *, after: bool) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls % 3 == 0 and not after:
                raise KeyboardInterrupt
            made = function(*arguments, **options)
            if calls % 3 == 0:
                raise KeyboardInterrupt
            return made

        return call

    for after in (False, True):
        for place, name in ((engine.decoder, "forward"), (engine.decoder, "forward_many"), (Stream, "choose")):
            with monkeypatch.context() as patch:
                patch.setattr(place, name, interrupted(getattr(place, name), after=after))
                streams = list(Batch(engine, [request(prompt(n)) for n in (3, 5)]).streams)
                made: list[list[int]] = [[], []]
                calls = interrupts = 0
                for i, stream in enumerate(streams):
                    while True:
                        try:
                            made[i].append(next(stream))
                        except KeyboardInterrupt:
                            interrupts += 1
                        except StopIteration:
                            break
                assert made == wanted and (interrupts > 0 or name == "forward")


class Fixed:
    """A constraint: these tokens, one after another."""

    def __init__(self, tokens: list[int], vocab: int) -> None:
        self.left = list(tokens)
        self.vocab = vocab

    @property
    def complete(self) -> bool:
        return not self.left

    def allowed(self) -> torch.Tensor:
        mask = torch.zeros(self.vocab, dtype=torch.bool)
        mask[self.left[0]] = True
        return mask

    def push(self, token: int) -> None:
        assert token == self.left.pop(0)


def test_constraints_and_logprobs_are_each_ones_own(engine: Engine) -> None:
    vocab = engine.config.vocab
    held, free, plain = Batch(
        engine,
        [
            request(prompt(3), constraint=Fixed([9, 8, 7], vocab)),
            request(prompt(5), logprobs=2),
            request(prompt(7)),
        ],
    ).streams
    assert list(held) == [9, 8, 7] and held.finish_reason == "stop"
    assert free.logprobs == [], "one for each token that was taken"
    engine.reset()
    reference = engine.generate(prompt(5), max_tokens=8, sampling=GREEDY, loop_guard=False, logprobs=2)
    assert list(free) == list(reference)
    for ours, theirs in zip(free.logprobs, reference.logprobs, strict=True):
        assert ours.token == theirs.token and ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]
    assert len(list(plain)) == 8 and plain.logprobs == []
