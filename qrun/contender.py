"""Engines that are loaded together to be compared, and the memory of each. It knows no tests and no clock."""

import gc
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from qrun.api import load
from qrun.engine import Engine
from qrun.free import available, in_use, release
from qrun.memory import forecast
from qrun.recipe import Recipe
from qrun.resident import peak, reset_peak


@dataclass
class Contender:
    """An engine that takes turns with others. ``held`` and the peaks are bytes of its device as if it were alone there.

    They are what its own load and turns, in which nothing else runs, made the process or the GPU grow by; and in a
    process, what the first load left there beside weights: Python, torch and compiled kernels.
    """

    engine: Engine
    own_kv: str
    held: int
    load_peak: int
    peak: int

    @classmethod
    def load(
        cls, model: str | Path | None, recipe: Recipe, *, beside: "Sequence[Contender]" = (), **options: Any
    ) -> Self:
        """Load it beside those that are there already; ``options`` as of `qrun.load`, whose errors it raises."""
        device = beside[0].device if beside else "cpu"
        _tidy()
        alone = before = _held(device)
        if beside:
            alone = beside[0].held - beside[0].engine.card.weight_bytes if device == "cpu" else 0
        reset_peak()
        engine = load(model, quant=recipe, **options)
        if engine.backend.device.type != device:  # the first one, on a GPU, where nothing was yet
            device, alone, before = engine.backend.device.type, 0, 0
        _tidy()
        most = alone + max(engine.card.measured_peak, peak(device)) - before
        held = alone + _held(device) - before
        most = max(most, held)  # the system's count of the peak may lag behind
        return cls(engine, f"k{recipe.k}v{recipe.v}", held, most, most)

    @property
    def device(self) -> str:
        return self.engine.backend.device.type

    @contextmanager
    def turn(self) -> Generator[Engine]:
        """The engine, to be put to work; what that takes is counted."""
        reset_peak(self.device)
        before = _held(self.device)
        yield self.engine
        self.peak = max(self.peak, self.held + peak(self.device) - before)
        self.held += _held(self.device) - before

    def set_kv(self, kv: str | None) -> None:
        """Use a cache in another format, none being the recipe's own; ``peak`` is that of the load again, and of it."""
        self.peak = self.load_peak
        with self.turn() as engine:
            engine.set_kv(self.own_kv if kv is None else kv)


def fit_beside(engine: Engine, recipes: Sequence[Recipe], kvs: Sequence[str | None]) -> bool:
    """Whether memory is enough to load all of the recipes, of which the engine is the first, and fill their caches."""
    device = engine.backend.device.type
    needs = [
        max(
            (forecast(engine.config, r if kv is None else r.with_kv(kv), engine.context, device=device) for kv in kvs),
            key=lambda need: need.total,
        )
        for r in recipes
    ]
    weights = sum(need.weights for need in needs[1:])
    caches = sum(need.total - need.weights - need.running for need in needs)
    return weights + caches + max(max(need.loading, need.running) for need in needs) <= available(device)


def _tidy() -> None:
    """Give back what is freed: engines are in cycles, and the C library keeps blocks, a GB after an evaluation."""
    gc.collect()
    release()


def _held(device: str) -> int:
    """Bytes in use now."""
    if device == "cpu":
        return in_use()
    return int(torch.get_device_module(device).memory_allocated())
