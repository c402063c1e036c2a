"""The plan that costs a model the least within a size: bits per weight, or the memory that it may take.

Costs are measured a unit at a time and taken to add up, which the plan as a whole is then measured to confirm. It
knows no terminal and no device but the one it is told.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from qrun.checkpoint import Checkpoint
from qrun.errors import DoesNotFitError, QrunError, UsageError
from qrun.free import available
from qrun.loader import is_tied
from qrun.memory import DEFAULT_CONTEXT, forecast, human
from qrun.models.config import ModelConfig
from qrun.quantize.knapsack import Option, choose
from qrun.quantize.plan import Plan
from qrun.quantize.probe import Probe, Progress
from qrun.quantize.rounding import written_format
from qrun.quantize.sensitivity import ACTIVATIONS, CACHE, Notes, measure
from qrun.quantize.units import Unit, units
from qrun.recipe import BF16, ActivationType, Recipe, WeightScheme

CANDIDATES: Final = ("2g128sym", "2g64sym", "2sym", "3sym", "4sym", "4g32sym", "6sym", "8", "16")
"""The schemes that are tried, as the grammar writes them after W: those that are written as they are meant."""
SHARE: Final = 0.05
"""INT8 activations are chosen, where they are allowed, if they add no more than this share to what weights cost."""
_TRIES: Final = 8
_LEFT: Final[Mapping[str, float]] = {BF16.term: 0.0}  # what is not rounded costs nothing


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a plan may take: ``bits`` per weight over all weights that can be quantized, those left alone included; or
    ``memory`` bytes of a device for weights, cache and running at a context."""

    bits: float | None = None
    memory: int | None = None
    context: int = DEFAULT_CONTEXT
    device: str = "cpu"

    def __str__(self) -> str:
        if self.memory is None:
            return f"{self.bits:g} bits per weight"
        return f"{human(self.memory)} with a context of {self.context}"


@dataclass(frozen=True, kw_only=True)
class Line:
    """What one unit got, its bytes, and what that costs by itself."""

    unit: Unit
    scheme: WeightScheme
    nbytes: int
    cost: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """Why a plan is as it is. Costs are divergences from the BF16 model in nats a token, over ``tokens``."""

    budget: Budget
    lines: tuple[Line, ...]
    bits: float
    predicted: float
    """The sum of all costs alone."""
    measured: float
    """The cost of the plan as a whole."""
    tokens: int
    activations: Mapping[str, float]
    """What each type that was allowed costs by itself."""
    kv: Mapping[str, float]


def parse_schemes(terms: Sequence[str]) -> list[WeightScheme]:
    """Schemes by their terms. Raises RecipeError."""
    return list(dict.fromkeys(Recipe.parse(f"mix:dense={term}").dense for term in terms))


def plan_for_budget(
    checkpoint: Checkpoint, config: ModelConfig, windows: Tensor, budget: Budget, *,
    candidates: Sequence[str] = CANDIDATES, plain: Collection[str] = (), kvs: Sequence[str] = ("bf16",),
    activations: Sequence[ActivationType] = ("16",), fitted: Tensor | None = None, label: str = "",
    notes: Path | None = None, device: str = "cpu", progress: Progress | None = None,
) -> tuple[Plan, Report]:  # fmt: skip
    """The best plan within a budget, by token ids [W, S] on which costs are measured on ``device``.

    Args:
        candidates: the schemes of which every unit gets one.
        plain: kinds of units that stay BF16, such as embedding and lm_head.
        kvs: caches that are allowed. Bits per weight leave room for any, so that the first is chosen; else the best.
        activations: types that are allowed; int8 is chosen where it costs next to nothing.
        fitted: windows as long, by which weights are rounded with GPTQ while they are measured; each by itself if none.
        notes: a folder that keeps what was measured, to go on there, and for other budgets.

    Raises:
        UsageError: the bits are fewer than any candidates make.
        DoesNotFitError: nothing of these candidates fits into the memory, or the model in BF16 not into this machine's.
        QrunError: what a checkpoint that cannot be loaded raises.
    """
    tied = is_tied(config, checkpoint)
    every, schemes = units(config, tied=tied), parse_schemes(candidates)
    allowed = [[BF16] if unit.kind in plain else schemes for unit in every]
    itemsize = max(checkpoint.dtype(name).itemsize for name in checkpoint.names())
    chooser = _Chooser(config, tied, every, allowed, budget, itemsize)
    recipes = {kv: Recipe.parse("bf16", kv) for kv in (kvs if budget.memory is not None else kvs[:1])}
    fitting = [kv for kv, recipe in recipes.items() if chooser.spare(recipe) >= 0]
    if not fitting:
        raise chooser.refusal(recipes.popitem()[1])
    _check_room(config, device)
    probe = Probe(checkpoint, config, windows, fitted=fitted, device=device, progress=progress)
    both, how = (windows, device) if fitted is None else (torch.cat([windows, fitted]), f"{device} gptq {len(windows)}")
    costs = measure(
        probe, [unit for unit in every if unit.kind not in plain], schemes, activations=activations, kvs=kvs,
        notes=Notes.open(notes, checkpoint, both, how), progress=progress,
    )  # fmt: skip
    made: list[tuple[float, str, tuple[Line, ...]]] = []
    for kv in fitting:
        lines = chooser.choose(costs, recipes[kv])
        if lines is not None:
            made.append((costs[CACHE][kv] + sum(line.cost for line in lines), kv, lines))
    if not made:
        raise chooser.refusal(recipes[fitting[-1]])
    cost, kv, lines = min(made, key=lambda each: each[0])
    act = _activations(activations, costs[ACTIVATIONS], cost)
    chosen = [(line.unit, line.scheme) for line in lines]
    plan = Plan.of_units(config, chosen, replace(recipes[kv], activations=act), tied=tied, label=label)
    if progress is not None:
        progress("measuring the plan", 0, 1)
    report = Report(
        budget=budget,
        lines=lines,
        bits=plan.bits_per_weight,
        predicted=cost + costs[ACTIVATIONS][act],
        measured=probe.plan(plan),
        tokens=windows.numel(),
        activations=costs[ACTIVATIONS],
        kv=costs[CACHE],
    )
    return plan, report


def _check_room(config: ModelConfig, device: str) -> None:
    need, free = forecast(config, Recipe.parse(), device=device).peak_load, available(device)
    if need > free:
        raise DoesNotFitError(
            f"to measure what each layer minds the model must be here in BF16, which needs {human(need)}, "
            f"{human(free)} are free: use a plan that was made elsewhere (--save-plan there, --plan here)"
        )


def _activations(allowed: Sequence[ActivationType], costs: Mapping[str, float], cost: float) -> ActivationType:
    """int8 where it may be and costs little beside ``cost``; else the first of the others."""
    others: list[ActivationType] = [act for act in allowed if act != "int8"]
    if not others or ("int8" in allowed and costs["int8"] <= SHARE * cost):
        return "int8"
    return others[0]


@dataclass(frozen=True)
class _Chooser:
    """The units, the schemes that each may have, and what all may take together."""

    config: ModelConfig
    tied: bool
    units: Sequence[Unit]
    allowed: Sequence[Sequence[WeightScheme]]
    budget: Budget
    itemsize: int

    def choose(self, costs: Mapping[str, Mapping[str, float]], recipe: Recipe) -> tuple[Line, ...] | None:
        """The schemes that cost least together; none if nothing fits beside this recipe's cache."""
        options = [
            [
                Line(unit=unit, scheme=s, nbytes=self._size(unit, s), cost=costs.get(unit.name, _LEFT)[s.term])
                for s in allowed
            ]
            for unit, allowed in zip(self.units, self.allowed, strict=True)
        ]
        limit = self._limit(self._smallest(), recipe)
        for _ in range(_TRIES):
            found = choose([[Option(line.nbytes, line.cost) for line in lines] for lines in options], limit)
            if found is None:
                return None
            chosen = tuple(lines[i] for lines, i in zip(options, found, strict=True))
            over = sum(line.nbytes for line in chosen) - self._limit([line.scheme for line in chosen], recipe)
            if over <= 0:
                return chosen
            limit -= over  # on a GPU, what is beside the weights while they are loaded depends on them
        return None

    def spare(self, recipe: Recipe) -> int:
        """Bytes that the smallest plan leaves of the budget; less than 0 if it does not fit."""
        smallest = self._smallest()
        return self._limit(smallest, recipe) - self._bytes(smallest)

    def refusal(self, recipe: Recipe) -> QrunError:
        """What to say where nothing fits."""
        if self.budget.memory is None:
            bits = 8 * self._bytes(self._smallest()) / sum(unit.numbers for unit in self.units)
            return UsageError(f"{self.budget} are too few: the smallest plan of these schemes has {bits:.2f}")
        return DoesNotFitError(
            f"no plan fits into {self.budget}: the smallest, with a cache in {recipe.kv}, needs "
            f"{human(self.budget.memory - self.spare(recipe))}; give a smaller --ctx-size, or choose a smaller model"
        )

    def _size(self, unit: Unit, scheme: WeightScheme) -> int:
        return unit.nbytes(scheme, running=self.budget.memory is not None)

    def _bytes(self, chosen: Sequence[WeightScheme]) -> int:
        return sum(self._size(unit, scheme) for unit, scheme in zip(self.units, chosen, strict=True))

    def _smallest(self) -> list[WeightScheme]:
        return [
            min(allowed, key=lambda scheme, unit=unit: self._size(unit, scheme))
            for unit, allowed in zip(self.units, self.allowed, strict=True)
        ]

    def _limit(self, chosen: Sequence[WeightScheme], recipe: Recipe) -> int:
        """Bytes that the weights may take together; of a device, where these are chosen."""
        if self.budget.memory is None:
            assert self.budget.bits is not None, "a budget has bits or memory"
            return math.floor(self.budget.bits * sum(unit.numbers for unit in self.units) / 8)
        formats = {
            weight.name: written_format(scheme, weight.shape[-1])
            for unit, scheme in zip(self.units, chosen, strict=True)
            for weight in unit.weights
        }
        need = forecast(
            self.config, recipe, self.budget.context, tied=self.tied, source_itemsize=self.itemsize,
            formats=lambda weight: formats.get(weight.name), device=self.budget.device,
        )  # fmt: skip
        return self.budget.memory - need.roles.get("kept", 0) - max(need.loading, need.total - need.weights)
