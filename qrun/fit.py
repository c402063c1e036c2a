"""Which recipes and contexts of a model fit a device, and which is to be recommended: rows of plain numbers.

The arithmetic is `qrun.memory`'s, the same that refuses a load. It reads no weights and prints nothing.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from qrun.backends import GPUS, allocation_limit, find_gpu
from qrun.errors import BackendError
from qrun.free import available, in_use
from qrun.memory import Forecast, forecast
from qrun.outline import Outline
from qrun.recipe import Recipe

SPARE: Final = 0.1
"""The share of the free memory that a recommendation leaves."""

LIBRARIES: Final = 109_000_000
"""Resident bytes of the backend with its compiler: what a process that loads has before, and this one has not."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a model would run. ``free`` bytes of ``device``, ``most`` of them at once if there is such a limit;
    ``resident`` is what a process takes before it loads."""

    device: str
    free: int
    resident: int
    threads: int
    about: str
    most: int | None = None


@dataclass(frozen=True, kw_only=True)
class FitRow:
    """One recipe, cache and context of one model. Bytes, and positions.

    ``loading`` is the expected peak of the load, ``needed`` what must be free before it starts, ``most_context`` the
    longest context that would fit, 0 if none.
    """

    model: str
    recipe: str
    kv: str
    context: int
    weights: int
    cache: int
    loading: int
    needed: int
    free: int
    fits: bool
    most_context: int
    recommended: bool = False

    @property
    def spares(self) -> bool:
        """Whether it fits and leaves some memory to others."""
        return self.fits and self.needed <= (1 - SPARE) * self.free


def find_place(device: str, threads: int | None = None, memory: int | None = None) -> Place:
    """The device that ``device`` names, with ``memory`` bytes free or what it has.

    With ``memory`` another machine is meant, so that no device need be here; auto is a CPU then.
    Raises `BackendError` for a device that cannot be used.
    """
    if threads is None:
        threads = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    resident = in_use() + LIBRARIES
    if memory is not None:
        where = "of a GPU" if device in GPUS else "of memory"
        kind = device if device in GPUS else "cpu"
        return Place(device=kind, free=memory, resident=resident, threads=threads, about=where)
    kind, about = "cpu", "of this machine's memory"
    for name in GPUS if device == "auto" else (device,) if device in GPUS else ():
        gpu = find_gpu(name)
        if gpu.usable:
            kind, about = name, f"of the {gpu.about.partition(',')[0]}"
            break
        if device == name:
            raise BackendError(f"{gpu.about}, or use --device cpu")
    return Place(
        device=kind, free=available(kind), resident=resident, threads=threads, about=about, most=allocation_limit(kind)
    )


def fit(outline: Outline, recipes: Sequence[Recipe], contexts: Sequence[int], place: Place) -> list[FitRow]:
    """A row for each recipe and context (-1: all the model has), longer ones than it has left out; one recommended.

    That is the first recipe that fits with some memory to spare, or else that fits, at the longest context that does.
    """
    positions = outline.config.positions
    rooms = list(dict.fromkeys(positions if room < 0 else min(room, positions) for room in contexts))
    rows: list[FitRow] = []
    for recipe in recipes:
        if recipe.own and not outline.quantized and len(recipes) > 1:
            continue  # the same as BF16
        need = forecast(
            outline.config, recipe, tied=outline.tied, source_itemsize=outline.itemsize, device=place.device,
            formats=outline.stored if recipe.own else None,
        )  # fmt: skip
        if recipe.own and outline.files is not None:
            need = replace(need, roles={"files": outline.files})
        rows += [_row(outline.name, recipe, replace(need, context=room), positions, place) for room in rooms]
    for good in ([row for row in rows if row.spares], [row for row in rows if row.fits]):
        if good:
            same = [row for row in good if row.recipe == good[0].recipe]
            chosen = max(same, key=lambda row: row.context)
            return [replace(row, recommended=row is chosen) for row in rows]
    return rows


def _row(model: str, recipe: Recipe, need: Forecast, positions: int, place: Place) -> FitRow:
    loading = need.expected_load(place.resident, place.threads) if place.device == "cpu" else need.peak_load
    whole = place.most is None or need.block <= place.most
    return FitRow(
        model=model,
        recipe=recipe.name,
        kv=recipe.kv,
        context=need.context,
        weights=need.weights,
        cache=need.kv,
        loading=loading,
        needed=need.needed,
        free=place.free,
        fits=whole and need.needed <= place.free,
        most_context=need.room(place.free, positions) if whole else 0,
    )


def best(rows: Sequence[FitRow]) -> FitRow:
    """The recommended row; where nothing fits, the one that needs the least."""
    return next((row for row in rows if row.recommended), min(rows, key=lambda row: row.needed))
