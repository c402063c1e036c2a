"""Speed and memory of a model, as numbers: prompt processing and token generation, per recipe and cache format.

The tests are llama-bench's: `pp512` reads 512 tokens, `tg128` makes 128 one by one, `@ d4096` starts behind 4096 that
are already in the cache. Token ids are random, sampling is greedy. What is compared takes turns, so that whatever
else the machine does meanwhile falls on all of it alike. It prints nothing.
"""

import re
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, Self

import torch

from qrun.bandwidth import GPU_SIZE, read_bandwidth
from qrun.contender import Contender, fit_beside
from qrun.engine import Engine
from qrun.errors import UsageError
from qrun.eval import evaluate
from qrun.loader import Progress
from qrun.memory import available
from qrun.recipe import Recipe
from qrun.sampler import Sampling

NOISE: Final = 0.05
"""A test whose runs vary or drift by more was disturbed."""
QUALITY_TOKENS: Final = 2048
"""Tokens that the quality beside the speed is measured on: a first impression, where `qrun.eval` takes a whole text."""
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
    device: str
    threads: int | None
    """The CPU's; none where another device computes."""
    recipe: str
    kv: str
    test: str
    mean: float
    std: float
    median: float
    samples: tuple[float, ...]
    """In the order of the runs."""
    variation: float
    """``std`` over ``mean``."""
    drift: float
    """By how much the second half of the samples is faster than the first, in medians; 0 for fewer than 4."""
    noisy: bool
    """Either is over 5 %: other programs ran, or the clock changed."""
    in_turns: bool
    """Whether the whole sweep was loaded and all recipes took turns; else only the tests of each did."""
    first_token_seconds: float | None
    """Median seconds from the prompt to its first token; none for tg, whose prompt is one token."""
    load_seconds: float
    quantize_seconds: float | None
    """Those of them in which weights were read and quantized; none where none had to be."""
    from_store: bool
    """The quantized weights were on disk, from an earlier load."""
    peak_memory: int
    """Most bytes of the GPU, or resident ones of this process, while this recipe was loaded and run. Of engines loaded
    together each is counted as if it were alone (where the system cannot count anew: since the process began)."""
    bandwidth: float
    """Measured bytes per second that the device reads; 0 where it was not measured."""
    bandwidth_share: float | None
    """Bytes a token must read, times tokens per second, over ``bandwidth``; none for pp, which reads weights once."""
    text: str | None = None
    """What the quality was measured on, as `qrun.eval` names it; none, like the next two, where it was not."""
    kl_mean: float | None = None
    top1: float | None = None


DEFAULT_TESTS: Final = (Test("pp", 512), Test("tg", 128))


def run(
    model: str | Path | None = None,
    *,
    quants: Sequence[str | Recipe] = ("bf16",),
    kvs: Sequence[str | None] = (None,),
    tests: Sequence[Test] = DEFAULT_TESTS,
    repeats: int = 5,
    quality: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Iterator[BenchRow]:
    """Time every test at every recipe and cache format; the rows of a format and depth come together.

    Every recipe is loaded before the first test if memory is enough for all of them, and the recipes take turns; else
    they come one after another, and only the tests of each take turns.

    Args:
        kvs: cache formats for every recipe; None is the recipe's own.
        repeats: measured runs a test, after one to warm up.
        quality: measure KL divergence and top-1 agreement with BF16 too, beforehand.
        progress: called as the loader's is: with what is done, how much of it, and of how much (0: unknown).
        options: go to `qrun.load` (device, threads, cache, offline …); the context is what the tests need unless given.

    Raises:
        QrunError: whatever loading raises; UsageError for an empty sweep.
    """
    if repeats < 1 or not tests or not quants or not kvs:
        raise UsageError("nothing to measure: give at least one recipe, one test and one repetition")
    say: Progress = progress or (lambda what, done, total: None)
    recipes = [quant if isinstance(quant, Recipe) else Recipe.parse(quant) for quant in quants]
    measured = evaluate(model, recipes, kvs, max_tokens=QUALITY_TOKENS, progress=progress, **options) if quality else []
    judged = {(row.recipe, row.kv): {"text": row.text, "kl_mean": row.kl_mean, "top1": row.top1} for row in measured}
    options.setdefault("context", max(test.context for test in tests))
    contenders: list[Contender] = []
    bandwidth, in_turns = 0.0, True
    for i, recipe in enumerate(recipes):
        contenders.append(Contender.load(model, recipe, beside=contenders, progress=progress, **options))
        if i == 0:
            say("measuring how fast this machine reads memory", 0, 0)
            bandwidth = _bandwidth(contenders[0].engine)
            in_turns = len(recipes) == 1 or fit_beside(contenders[0].engine, recipes, kvs)
        if in_turns and i < len(recipes) - 1:
            continue
        for row in _rounds(contenders, kvs, tests, repeats, bandwidth, say):
            found: dict[str, Any] = judged.get((row.recipe, row.kv), {})
            yield replace(row, in_turns=in_turns, **found)
        contenders.clear()  # the next one needs its memory


def _rounds(
    contenders: Sequence[Contender], kvs: Sequence[str | None], tests: Sequence[Test], repeats: int, bandwidth: float,
    say: Progress,
) -> Iterator[BenchRow]:  # fmt: skip
    """Let everything at one cache format and depth run once and unmeasured, then ``repeats`` times; then its rows."""
    for kv in kvs:
        for contender in contenders:
            contender.set_kv(kv)
        for depth in dict.fromkeys(test.depth for test in tests):  # apart, since the tokens up to there are kept
            pairs = [(contender, test) for contender in contenders for test in tests if test.depth == depth]
            samples: list[list[Sample]] = [[] for _ in pairs]
            for done in range((repeats + 1) * len(pairs)):
                round_, i = divmod(done, len(pairs))
                contender, test = pairs[i]
                card = contender.engine.card
                say(f"{card.recipe}, kv {card.kv}: {test}", done, (repeats + 1) * len(pairs))
                with contender.turn() as engine:
                    samples[i].append(measure(engine, test, turn=round_))
            for (contender, test), found in zip(pairs, samples, strict=True):
                yield _row(contender, test, found[1:], bandwidth)


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


def _row(contender: Contender, test: Test, samples: Sequence[Sample], bandwidth: float) -> BenchRow:
    engine, card = contender.engine, contender.engine.card
    speeds = tuple(test.tokens / sample.seconds for sample in samples)
    mean, median = statistics.fmean(speeds), statistics.median(speeds)
    std = statistics.stdev(speeds) if len(speeds) > 1 else 0.0
    half = len(speeds) // 2
    drift = statistics.median(speeds[-half:]) / statistics.median(speeds[:half]) - 1 if half > 1 else 0.0
    decoding = test.kind == "tg"
    read = bytes_per_token(engine, test.depth + test.tokens // 2)
    quantizes = any(line.scheme not in ("bf16", "fp32") for line in card.roles)
    return BenchRow(
        model=card.model,
        size=card.weight_bytes,
        parameters=card.parameters,
        backend=card.backend,
        device=card.device,
        threads=torch.get_num_threads() if contender.device == "cpu" else None,
        recipe=card.recipe,
        kv=card.kv,
        test=str(test),
        mean=mean,
        std=std,
        median=median,
        samples=speeds,
        variation=std / mean,
        drift=drift,
        noisy=max(std / mean, abs(drift)) > NOISE,
        in_turns=False,
        first_token_seconds=None if decoding else statistics.median(sample.first_token for sample in samples),
        load_seconds=card.load_seconds,
        quantize_seconds=card.quantize_seconds if quantizes and not card.from_store else None,
        from_store=card.from_store,
        peak_memory=contender.peak,
        bandwidth=bandwidth,
        bandwidth_share=median * read / bandwidth if decoding and bandwidth else None,
    )
