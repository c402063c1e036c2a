"""What rounding each unit of a model costs, measured one at a time, and kept in a file as it is found.

Costs are divergences from the BF16 model's predictions in nats a token. It knows no budget, and not how to measure.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Final, Protocol, cast

import torch

from qrun.checkpoint import Checkpoint
from qrun.quantize.probe import Progress
from qrun.quantize.units import Unit
from qrun.recipe import BF16, Recipe, WeightScheme

VERSION: Final = 1
MOST_BYTES: Final = 64 << 20
ACTIVATIONS: Final = "activations"
CACHE: Final = "kv"


class Measures(Protocol):
    """What `qrun.quantize.probe.Probe` can do."""

    def unit(self, unit: Unit, scheme: WeightScheme) -> float: ...

    def recipe(self, recipe: Recipe) -> float: ...


@dataclass
class Notes:
    """What was found so far: of a unit, or of activations or the cache, by the term of what it was rounded to.

    Every finding is written at once, so that an interrupted measurement goes on where it was. ``path`` None, and a file
    that cannot be written, keep nothing.
    """

    path: Path | None
    key: str
    found: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])

    @classmethod
    def open(cls, folder: Path | None, checkpoint: Checkpoint, windows: torch.Tensor, how: str) -> "Notes":
        """The notes in a folder of this checkpoint, these token ids and this way of measuring, if there are any."""
        digest = hashlib.sha256(f"{VERSION} {checkpoint.identity} {how} {list(windows.shape)}".encode())
        digest.update(windows.cpu().numpy().tobytes())
        key = digest.hexdigest()
        path = None if folder is None else folder / f"{key[:32]}.json"
        held = {} if path is None else _read(path)
        return cls(path, key, _findings(held.get("kl")) if held.get("key") == key else {})

    def get(self, name: str, term: str) -> float | None:
        """What is noted of a unit at a term."""
        return self.found.get(name, {}).get(term)

    def add(self, name: str, term: str, divergence: float) -> float:
        """Note a divergence, and return it."""
        self.found.setdefault(name, {})[term] = divergence
        if self.path is not None:
            beside = self.path.with_name(f".{self.path.name}.part")
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                beside.write_text(json.dumps({"key": self.key, "kl": self.found}, indent=1) + "\n", encoding="utf-8")
                beside.replace(self.path)
            except OSError:
                self.path = None
            finally:
                with contextlib.suppress(OSError):
                    beside.unlink(missing_ok=True)
        return divergence


def measure(
    probe: Measures, units: Sequence[Unit], schemes: Sequence[WeightScheme], *, activations: Sequence[str] = (),
    kvs: Sequence[str] = (), notes: Notes, progress: Progress | None = None,
) -> Mapping[str, Mapping[str, float]]:  # fmt: skip
    """Unit name -> scheme term -> divergence; the same of `ACTIVATIONS` and `CACHE`. BF16 costs nothing."""
    blocks = [list(block) for _, block in groupby(units, key=lambda unit: unit.layer)]
    wanted = [(unit, scheme) for block in blocks for scheme in schemes if scheme != BF16 for unit in block]
    total = len(wanted) + len(activations) + len(kvs)
    say: Progress = progress or (lambda what, done, total: None)
    out: dict[str, dict[str, float]] = {unit.name: {BF16.term: 0.0} for unit in units if BF16 in schemes}
    done = 0
    for unit, scheme in wanted:
        say(f"measuring {unit.name} at {scheme}", done, total)
        cost = notes.get(unit.name, scheme.term)
        cost = notes.add(unit.name, scheme.term, probe.unit(unit, scheme)) if cost is None else cost
        out.setdefault(unit.name, {})[scheme.term] = cost
        done += 1
    recipes = [(ACTIVATIONS, term, Recipe.parse(f"mix:act={term}")) for term in activations]
    recipes += [(CACHE, term, Recipe.parse("bf16", term)) for term in kvs]
    for name, term, recipe in recipes:
        say(f"measuring {name} in {term}", done, total)
        cost = notes.get(name, term)
        if cost is None:
            cost = 0.0 if recipe == Recipe.parse() else notes.add(name, term, probe.recipe(recipe))
        out.setdefault(name, {})[term] = cost
        done += 1
    return out


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; nothing where there is none of use."""
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
        value = json.loads(raw) if len(raw) <= MOST_BYTES else None
    except (OSError, ValueError, RecursionError):
        return {}
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}


def _findings(value: object) -> dict[str, dict[str, float]]:
    """What is well formed of some findings."""
    found: dict[str, dict[str, float]] = {}
    for name, terms in cast(dict[str, object], value).items() if isinstance(value, dict) else ():
        for term, cost in cast(dict[str, object], terms).items() if isinstance(terms, dict) else ():
            if isinstance(cost, float) and 0 <= cost < 1e6:
                found.setdefault(name, {})[term] = cost
    return found
