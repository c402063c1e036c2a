"""What a model needs at a recipe and a context, and what a device has: arithmetic on layouts, before anything is read.

Used by the loader, the hub and the error messages, so that all three agree. Knows no checkpoint and no network.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil
import torch

from qrun.errors import DoesNotFitError
from qrun.formats import format_of
from qrun.formats.kv import kv_format
from qrun.models.config import ModelConfig
from qrun.models.plan import Weight, plan
from qrun.recipe import Recipe

OVERHEAD: Final = 600_000_000
"""Bytes beside weights and cache: Python, torch and compiled kernels (about 350 MB) and the activations of a chunk."""
KEPT_ITEMSIZE: Final = 4
"""Norms, biases and the router stay in float32."""
SMALLER: Final = ("wint8", "wint4")
"""What to suggest instead of a recipe that does not fit, best first."""
DEFAULT_CONTEXT: Final = 4096


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Bytes a loaded model takes; ``parameters`` counts numbers, ``active`` those that one token uses."""

    roles: dict[str, int]
    parameters: int
    active: int
    kv_per_token: int
    context: int
    largest: int
    """The largest weight as it is read and assembled, before it is quantized."""

    @property
    def weights(self) -> int:
        return sum(self.roles.values())

    @property
    def kv(self) -> int:
        """The whole cache, every position filled."""
        return self.kv_per_token * self.context

    @property
    def peak_load(self) -> int:
        """Resident bytes that loading never exceeds: the weights, one tensor twice (as read and in work), the rest."""
        return self.weights + 2 * self.largest + OVERHEAD

    @property
    def total(self) -> int:
        """Resident bytes when the context is full."""
        return self.weights + self.kv + OVERHEAD

    @property
    def needed(self) -> int:
        """What must be free before loading starts."""
        return max(self.peak_load, self.total)


def forecast(
    config: ModelConfig,
    recipe: Recipe,
    context: int = DEFAULT_CONTEXT,
    *,
    tied: bool | None = None,
    source_itemsize: int = 2,
) -> Forecast:
    """What ``config`` takes at ``recipe``, exact to the byte for weights and cache.

    ``tied`` overrides what the config says of the head; unknown counts as untied, the larger. ``source_itemsize`` is
    bytes per number in the checkpoint's files.
    """
    if tied is None:
        tied = bool(config.tied)
    roles: dict[str, int] = {}
    parameters = active = largest = 0
    for weight in plan(config, tied=tied):
        count = math.prod(weight.shape)
        parameters += count
        active += _active(config, weight, count)
        roles[weight.role] = roles.get(weight.role, 0) + stored_bytes(weight, recipe)
        largest = max(largest, source_itemsize * max(sum(math.prod(s.shape) for s in part) for part in weight.parts))
    per_head = sum(
        math.prod(shape) * dtype.itemsize
        for name in (recipe.k, recipe.v)
        for shape, dtype in kv_format(name).layout(config.head_dim).values()
    )
    return Forecast(
        roles=roles,
        parameters=parameters,
        active=active,
        kv_per_token=per_head * config.kv_heads * config.layers,
        context=context,
        largest=largest,
    )


def stored_bytes(weight: Weight, recipe: Recipe) -> int:
    """Bytes of one weight in the format its role has, scales and padding included."""
    for role, scheme in recipe.schemes().items():
        if role == weight.role:
            layout = format_of(scheme).layout(weight.shape)
            return sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout.values())
    return math.prod(weight.shape) * KEPT_ITEMSIZE


def largest_context(config: ModelConfig, recipe: Recipe, memory: int, *, tied: bool | None = None) -> int:
    """The most positions, in steps of 256 and up to the model's own limit, that fit in ``memory`` bytes; 0 if none."""
    need = forecast(config, recipe, 0, tied=tied)
    if need.peak_load > memory:
        return 0
    return min(config.positions, (memory - need.total) // need.kv_per_token // 256 * 256)


def check_fits(
    config: ModelConfig, recipe: Recipe, *, context: int, memory: int, name: str, tied: bool | None = None
) -> Forecast:
    """The forecast, if ``memory`` bytes are enough for it.

    Raises `DoesNotFitError` saying how much is needed, how much is there, and what would fit.
    """
    need = forecast(config, recipe, context, tied=tied)
    if need.needed <= memory:
        return need
    what = f"{name} at {recipe.name} with a context of {context} needs {human(need.needed)}, {human(memory)} are free"
    raise DoesNotFitError(f"{what}: {_advice(config, recipe, context, memory, tied)}")


def _advice(config: ModelConfig, recipe: Recipe, context: int, memory: int, tied: bool | None) -> str:
    shorter = largest_context(config, recipe, memory, tied=tied)
    need = forecast(config, recipe, context, tied=tied)
    if shorter:
        for kv in ("int8", "int4"):
            would = forecast(config, recipe.with_kv(kv), context, tied=tied)
            if would.needed <= memory and would.kv < need.kv:
                return f"use --ctx-size {shorter}, or --kv {kv} ({human(would.needed)})"
        return f"use --ctx-size {shorter}"
    for option, smaller in _alternatives(recipe):
        would = forecast(config, smaller, context, tied=tied)
        if would.needed <= memory and would.weights < need.weights:
            return f"use {option} ({human(would.needed)})"
    for option, smaller in _alternatives(recipe):
        shorter = largest_context(config, smaller, memory, tied=tied)
        if shorter:
            return f"use {option} --ctx-size {shorter}"
    return "choose a smaller model, or talk to the embedded one: qrun chat spark"


def _alternatives(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """Smaller recipes as options to type, with the cache as it is, then with a smaller one."""
    for kv in (None, "int4"):
        for quant in SMALLER:
            option = f"--quant {quant}"
            yield (
                option if kv is None else f"{option} --kv {kv}",
                Recipe.parse(quant, kv or (recipe.k if recipe.k == recipe.v else f"k{recipe.k}v{recipe.v}")),
            )


def human(count: int) -> str:
    """Bytes as people write them: ``640 MB``, ``12.9 GB``."""
    return f"{count / 1e9:.1f} GB" if count >= 999_500_000 else f"{count / 1e6:.0f} MB"


def available(device: str = "cpu", *, cgroups: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc")) -> int:
    """Free bytes of a device now. For the CPU: what the system can give, or the least that a control group leaves."""
    if device != "cpu":
        return int(torch.get_device_module(device).mem_get_info()[0])
    return min([psutil.virtual_memory().available, *_cgroup_free(cgroups, proc)])


def _cgroup_free(root: Path, proc: Path) -> Iterator[int]:
    """What every memory limit above this process leaves, in bytes. Containers see less than the machine has."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = top / path.strip("/")
        for place in (group, *group.parents):
            if place == top or top in place.parents:
                yield from _limit_free(place, *names)


def _limit_free(group: Path, limit: str, usage: str, reclaimable: str) -> Iterator[int]:
    try:
        most = int((group / limit).read_text())
        used = int((group / usage).read_text())
        stat = dict(line.split(" ", 1) for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or no limit ("max")
        return
    yield max(0, most - used + int(stat.get(reclaimable, 0)))


def _active(config: ModelConfig, weight: Weight, count: int) -> int:
    if weight.role == "experts" and config.moe is not None:
        return count * config.moe.top_k // config.moe.experts
    return count
