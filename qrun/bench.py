"""Speed and memory of a model, as numbers: prompt processing and token generation, per recipe and cache format.

The tests are llama-bench's: `pp512` reads 512 tokens, `tg128` makes 128 one by one, `@ d4096` starts behind 4096 that
are already in the cache. Token ids are random, sampling is greedy. It prints nothing.
"""

import gc
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self

import torch

from qrun.api import load
from qrun.bandwidth import GPU_SIZE, read_bandwidth
from qrun.engine import Engine
from qrun.errors import UsageError
from qrun.loader import Progress
from qrun.memory import available
from qrun.recipe import Recipe
from qrun.resident import peak, reset_peak
from qrun.sampler import Sampling

_TEST: Final = re.compile(r"(pp|tg)(\d+)(?:\s*@\s*d(\d+))?")


@dataclass(frozen=True)
class Test:
    """One thing to time: ``tokens`` read (pp) or made (tg), ``depth`` tokens into the context."""

    kind: Literal["pp", "tg"]
    tokens: int
    depth: int = 0

    __test__ = False  # no test case, whatever pytest takes it for

    @classmethod
    def parse(cls, text: str) -> Self:
        """``pp512``, ``tg128`` or ``pp512@d4096``. Raises UsageError."""
        match = _TEST.fullmatch(text.strip().lower())
        if match is None or not int(match[2]):
            raise UsageError(f"test {text!r} is unknown: give pp512, tg128 or, at a depth, pp512@d4096")
        return cls("pp" if match[1] == "pp" else "tg", int(match[2]), int(match[3] or 0))

    def __str__(self) -> str:
        return f"{self.kind}{self.tokens}" + (f" @ d{self.depth}" if self.depth else "")

    @property
    def context(self) -> int:
        """Positions of the cache that the test needs."""
        return self.depth + self.tokens + 1


@dataclass(frozen=True)
class Sample:
    """One timed run: the seconds of the test, and those from the call to the first token."""

    seconds: float
    first_token: float


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One line of the table. Sizes in bytes, speeds in tokens per second."""

    model: str
    size: int
    parameters: int
    backend: str
    threads: int | None
    """The CPU's; none where another device computes."""
    recipe: str
    kv: str
    test: str
    mean: float
    std: float
    median: float
    samples: tuple[float, ...]
    first_token_seconds: float | None
    """Median seconds from the prompt to its first token; none for tg, whose prompt is one token."""
    load_seconds: float
    peak_memory: int
    """Most bytes of the GPU, or resident ones of this process, while this recipe was loaded and run (where the system
    cannot count anew: since the process began)."""
    bandwidth: float
    """Measured bytes per second that the device reads; 0 where it was not measured."""
    bandwidth_share: float | None
    """Bytes a token must read, times tokens per second, over ``bandwidth``; none for pp, which reads weights once."""


DEFAULT_TESTS: Final = (Test("pp", 512), Test("tg", 128))


def run(
    model: str | Path | None = None,
    *,
    quants: Sequence[str | Recipe] = ("bf16",),
    kvs: Sequence[str | None] = (None,),
    tests: Sequence[Test] = DEFAULT_TESTS,
    repeats: int = 5,
    progress: Progress | None = None,
    **options: Any,
) -> Iterator[BenchRow]:
    """Time every test at every recipe and cache format; each row comes as soon as it is measured.

    ``kvs`` of None is the recipe's own. Every test runs once unmeasured, then ``repeats`` times. ``options`` go to
    `qrun.load` (device, threads, cache, offline …); the context is what the tests need unless given there. ``progress``
    is called as the loader's is: with what is done, how much of it, and of how much (0: unknown).

    Raises:
        QrunError: whatever loading raises; UsageError for an empty sweep.
    """
    if repeats < 1 or not tests or not quants or not kvs:
        raise UsageError("nothing to measure: give at least one recipe, one test and one repetition")
    say: Progress = progress or (lambda what, done, total: None)
    options.setdefault("context", max(test.context for test in tests))
    bandwidth: float | None = None
    recipes = [quant if isinstance(quant, Recipe) else Recipe.parse(quant) for quant in quants]
    for recipe in recipes:
        reset_peak()
        engine = load(model, quant=recipe, progress=progress, **options)
        if bandwidth is None:
            say("measuring how fast this machine reads memory", 0, 0)
            bandwidth = _bandwidth(engine)
            reset_peak(engine.backend.device.type)  # of loading the card knows
        for kv in kvs:
            engine.set_kv(f"k{recipe.k}v{recipe.v}" if kv is None else kv)
            for test in tests:
                samples: list[Sample] = []
                for turn in range(repeats + 1):
                    say(f"{recipe.name}, kv {engine.card.kv}: {test}", turn, repeats)
                    samples.append(measure(engine, test, turn=turn))
                yield _row(engine, test, samples[1:], bandwidth)
        del engine
        gc.collect()  # the next one needs its memory


def _bandwidth(engine: Engine) -> float:
    """Of the memory the engine computes in; 0 where it leaves no room to measure."""
    device = engine.backend.device.type
    if device == "cpu":
        return read_bandwidth()
    room = min(GPU_SIZE, available(device) // 4)
    found = read_bandwidth(device=device, size=room) if room > GPU_SIZE // 8 else 0.0
    torch.get_device_module(device).empty_cache()
    return found


def measure(engine: Engine, test: Test, *, turn: int = 0) -> Sample:
    """Run a test once. ``turn`` changes the tokens, so that repeated runs cannot reuse each other's.

    Raises:
        ContextOverflowError: the engine's context is shorter than the test.
    """
    greedy = Sampling(temperature=0.0)
    vocab = engine.config.vocab
    noise: Any = torch.randint(vocab, (test.depth + test.tokens,), generator=torch.Generator().manual_seed(0))
    ids: list[int] = noise.tolist()
    history, prompt = ids[: test.depth], ids[test.depth :]
    prompt[0] = (prompt[0] + turn) % vocab
    if not history:
        engine.reset()
    elif list(engine.cached_ids[: test.depth]) != history:
        list(engine.generate(history, max_tokens=1, sampling=greedy, loop_guard=False))
    prompt = prompt if test.kind == "pp" else prompt[:1]
    new = 1 if test.kind == "pp" else test.tokens + 1
    begun = time.perf_counter()
    tokens = engine.generate(history + prompt, max_tokens=new, sampling=greedy, loop_guard=False)
    next(tokens)
    first = time.perf_counter()
    made = sum(1 for _ in tokens)
    end = time.perf_counter()
    if made != new - 1:
        raise UsageError(f"{test} needs a context of {test.context} tokens, not {engine.context}: give it with -c")
    return Sample(first - begun if test.kind == "pp" else end - first, first - begun)


def bytes_per_token(engine: Engine, position: int = 0) -> float:
    """Bytes that one decode step at ``position`` must read: the weights that a token uses, and the cache so far."""
    moe = engine.config.moe
    share = {"embedding": 0.0, "experts": moe.top_k / moe.experts if moe else 1.0}
    weights = sum(line.bytes * share.get(line.role, 1.0) for line in engine.card.roles)
    return weights + position * engine.card.kv_bytes_per_token


def _row(engine: Engine, test: Test, samples: Sequence[Sample], bandwidth: float) -> BenchRow:
    card, device = engine.card, engine.backend.device.type
    speeds = tuple(test.tokens / sample.seconds for sample in samples)
    median = statistics.median(speeds)
    decoding = test.kind == "tg"
    read = bytes_per_token(engine, test.depth + test.tokens // 2)
    return BenchRow(
        model=card.model,
        size=card.weight_bytes,
        parameters=card.parameters,
        backend=card.backend,
        threads=torch.get_num_threads() if device == "cpu" else None,
        recipe=card.recipe,
        kv=card.kv,
        test=str(test),
        mean=statistics.fmean(speeds),
        std=statistics.stdev(speeds) if len(speeds) > 1 else 0.0,
        median=median,
        samples=speeds,
        first_token_seconds=None if decoding else statistics.median(sample.first_token for sample in samples),
        load_seconds=card.load_seconds,
        peak_memory=max(card.measured_peak, peak(device)),
        bandwidth=bandwidth,
        bandwidth_share=median * read / bandwidth if decoding and bandwidth else None,
    )
