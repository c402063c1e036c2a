"""Tokens a second of models with random weights, per recipe, cache format and depth; and where a step's time goes.

A test at a depth starts behind that many positions of noise in the cache, which are not read token by token first.
"""

import gc
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

import torch

from qrun.aliases import ALIASES
from qrun.backends import pick
from qrun.backends.base import Backend
from qrun.bench import Test, bytes_per_token, measure
from qrun.engine import Engine
from qrun.recipe import Recipe
from tools.gpu_check_job import Job, Record
from tools.gpu_check_random import RandomCheckpoint, build, fill

MODELS: Final = {"Llama-3.1-8B": "llama3.1:8b", "ERNIE-4.5-21B-A3B": "ernie:21b", "ERNIE-4.5-0.3B": "ernie:0.3b"}
RECIPES: Final = ("wint4", "bf16", "fp8", "wint8", "w8a8")
NEAR: Final = 1024
FAR: Final = 32_000


@dataclass(frozen=True)
class Case:
    """One test of a loaded model at a cache format."""

    kv: str
    test: Test


def cases(recipe: str, *, quick: bool) -> Iterator[Case]:
    """What is timed at a recipe: everything at wint4, elsewhere the cache in BF16 near the start."""
    yield Case("bf16", Test("tg", 128, NEAR))
    yield Case("bf16", Test("pp", 2048))
    if recipe == "wint4" and not quick:
        yield Case("bf16", Test("tg", 64, FAR))
        yield Case("bf16", Test("pp", 1024, FAR))
        for kv in ("int8", "int4"):
            yield Case(kv, Test("tg", 128, NEAR))
            yield Case(kv, Test("tg", 64, FAR))


def cuda() -> Backend:
    """A backend for one model."""
    return pick("cuda")


def measure_models(
    job: Job,
    *,
    models: Mapping[str, Mapping[str, Any]] | None = None,
    backend: Callable[[], Backend] = cuda,
    wanted: Callable[[str], Sequence[Case]] | None = None,
) -> None:
    """Every recipe of every model, the most important recipe of all models first."""
    shapes = models or {name: ALIASES[alias].config for name, alias in MODELS.items()}
    checkpoints = {name: RandomCheckpoint.of(config, job.device) for name, config in shapes.items()}
    for recipe in RECIPES[:2] if job.quick else RECIPES:
        for name, checkpoint in checkpoints.items():
            chosen = list(cases(recipe, quick=job.quick)) if wanted is None else list(wanted(recipe))
            _one_model(job, name, checkpoint, recipe, chosen, backend)
            release(job.device)
    if not job.quick:
        for name, checkpoint in checkpoints.items():
            near = [Case("bf16", Test("tg", 128, NEAR))] if wanted is None else list(wanted("tuned"))
            _one_model(job, name, checkpoint, "wint4", near, backend, tuned=True)
            release(job.device)


def _one_model(
    job: Job, name: str, checkpoint: RandomCheckpoint, recipe: str, chosen: Sequence[Case],
    backend: Callable[[], Backend], *, tuned: bool = False,
) -> None:  # fmt: skip
    """Load and time one. Tuning a model's kernels takes a minute, so all but the last ones run without."""
    label = f"{recipe} tuned" if tuned else recipe
    keys = {case: f"{name} {label}, kv {case.kv}: {case.test}" for case in chosen}
    if all(key in job.done for key in keys.values()):
        return
    engine: Engine | None = None

    def load() -> Record:
        nonlocal engine
        context = max(case.test.context for case in chosen)
        engine = build(checkpoint, Recipe.parse(recipe), backend(), name=name, context=context, prepare=tuned)
        card = engine.card
        slow = sorted({f"{b.op} in {b.scheme}" for b in card.bindings if b.fallback})
        found = {"model": name, "recipe": card.recipe, "weight_bytes": card.weight_bytes, "seconds": card.load_seconds}
        return {**found, "fallbacks": slow, "kernels": sorted({f"{b.op}: {b.kernel}" for b in card.bindings})}

    key = f"{name} {label}: load"
    while key in job.succeeded:  # the device was lost since
        key += " again"
    job.attempt(key, load, least=60 if tuned else 15)
    if engine is None:
        return
    loaded: Engine = engine
    for case in chosen:
        job.attempt(keys[case], lambda case=case: time_case(loaded, case, name, recipe) | {"tuned": tuned}, least=8)


def time_case(engine: Engine, case: Case, name: str, recipe: str) -> Record:
    """The row of a case: once to warm up, then three times."""
    if engine.card.kv != case.kv:
        engine.set_kv(case.kv)
    test = case.test
    speeds: list[float] = []
    for turn in range(4):
        if test.depth:
            fill(engine, test)
        speeds.append(test.tokens / measure(engine, test, turn=turn).seconds)
    row: Record = {"model": name, "recipe": recipe, "kv": case.kv, "measures": test.kind, "test": str(test)}
    row |= {"tokens_per_second": statistics.median(speeds[1:]), "samples": speeds[1:]}
    if test.kind == "tg":
        row["bytes_per_token"] = bytes_per_token(engine, test.depth + test.tokens // 2)
    return row


def profile_models(job: Job) -> None:
    """The kernels of one decode step at wint4, by time."""
    for name, alias in MODELS.items():

        def work(name: str = name, alias: str = alias) -> Record:
            checkpoint = RandomCheckpoint.of(ALIASES[alias].config, job.device)
            engine = build(checkpoint, Recipe.parse("wint4"), cuda(), name=name, context=2 * NEAR, prepare=False)
            fill(engine, Test("tg", 64, NEAR))
            return {"model": name, "kernels": profile(engine)}

        job.attempt(f"{name} wint4: profile", work, least=15)
        release(job.device)


def profile(engine: Engine, steps: int = 8) -> list[Record]:
    """Name, launches and microseconds a step of what the device ran, the costliest first."""
    token = torch.zeros(1, dtype=torch.int64, device=engine.backend.device)
    for _ in range(3):
        engine.step(token)
    profiler: Any = import_module("torch.profiler")
    with profiler.profile(activities=[profiler.ProfilerActivity.CUDA]) as recorded:
        for _ in range(steps):
            engine.step(token)
        torch.cuda.synchronize()
    rows: list[Record] = [
        {"kernel": str(event.key)[:80], "launches": event.count / steps, "us": event.self_device_time_total / steps}
        for event in recorded.key_averages()
        if event.self_device_time_total > 0
    ]
    return sorted(rows, key=lambda row: -row["us"])[:20]


def release(device: str) -> None:
    """Give the memory of what is no longer used back."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
