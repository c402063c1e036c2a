"""What `qrun bench` wrote on one occasion beside what it wrote on another: ratios, and whether they exceed the noise.

It knows files and numbers; it measures nothing and prints nothing.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast

from qrun.errors import UsageError

LARGEST: Final = 64 << 20
"""Bytes of a file that are read at most; a sweep writes some kilobytes."""
ERRORS: Final = 3.0
"""Standard errors of a ratio within which it says nothing."""
LEAST: Final = 0.02
"""The same for a ratio as such: one process differs from the next by so much without any cause in the program."""
BUSY: Final = 0.1
"""The share of the processor in other hands that is worth a word."""
_KEYS: Final = ("model", "backend", "recipe", "kv", "test")
_FACTS: Final = {
    "qrun": "qrun {}",
    "torch": "torch {}",
    "processor": "a {}",
    "device": "{}",
    "threads": "{} threads",
}

Verdict = Literal["faster", "slower", "within noise", "one run", "only in the first", "not in the first"]


@dataclass(frozen=True)
class Results:
    """A file: the samples of each test in tokens per second, keyed by its model, backend, recipe, kv and test, and the
    distinct values of each fact about where and how it was measured."""

    name: str
    samples: dict[tuple[str, ...], tuple[float, ...]]
    facts: dict[str, tuple[str, ...]]
    busy: float
    """The largest share of the processor that other programs had when it was begun; 0 if unknown."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One test in the first file and in another one; medians in tokens per second, none where it is missing."""

    model: str
    backend: str
    recipe: str
    kv: str
    test: str
    first: str
    other: str
    first_median: float | None
    other_median: float | None
    ratio: float | None
    """The other's median over the first's."""
    noise: float | None
    """What the ratio must differ from 1 by to mean something: three standard errors as the samples' spread gives them,
    and 2 % at least; none where one of them has a single sample."""
    verdict: Verdict


def read(path: Path) -> Results:
    """The rows of a file that `qrun bench -o json` or `-o jsonl` wrote. Rows of the same test are taken together.

    Raises:
        UsageError: it cannot be read, or holds something else.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise UsageError(f"{path} has over {LARGEST >> 20} MB: give what qrun bench -o json wrote")
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"cannot read {path}: {error}; give what qrun bench -o json or -o jsonl wrote") from error
    samples: dict[tuple[str, ...], tuple[float, ...]] = {}
    facts: dict[str, dict[str, None]] = {name: {} for name in _FACTS}
    busy = 0.0
    for row in cast("list[Any]", rows):
        key, found = _row(row, path)
        share = row.get("busy")
        busy = max(busy, share if isinstance(share, float) and 0 <= share <= 1 else 0.0)
        samples[key] = samples.get(key, ()) + found
        for name in _FACTS:
            if row.get(name) is not None:
                facts[name][str(row[name])] = None
    if not samples:
        raise UsageError(f"{path} holds no rows: give what qrun bench -o json or -o jsonl wrote")
    return Results(str(path), samples, {name: tuple(values) for name, values in facts.items()}, busy)


def _row(row: Any, path: Path) -> tuple[tuple[str, ...], tuple[float, ...]]:
    if isinstance(row, Mapping):
        found = cast("Mapping[str, Any]", row)
        key = tuple(found.get(name) for name in _KEYS)
        samples = found.get("samples")
        if all(isinstance(part, str) for part in key) and isinstance(samples, list) and samples:
            speeds = cast("list[Any]", samples)
            if all(type(speed) in (int, float) and 1e-9 < speed < 1e12 for speed in speeds):
                return cast("tuple[str, ...]", key), tuple(map(float, speeds))
    raise UsageError(f"{path} holds a row that is no test of qrun bench: give what its -o json or -o jsonl wrote")


def compare(files: Sequence[Results]) -> list[Comparison]:
    """Every test of any file, in each other file against the first, in the order they first appear."""
    first, *others = files
    keys = dict.fromkeys(key for each in files for key in each.samples)
    return [
        _compare(key, first, other) for key in keys for other in others if key in first.samples or key in other.samples
    ]


def _compare(key: tuple[str, ...], first: Results, other: Results) -> Comparison:
    before, after = first.samples.get(key, ()), other.samples.get(key, ())
    ratio = noise = None
    verdict: Verdict = "not in the first" if after else "only in the first"
    if before and after:
        ratio = statistics.median(after) / statistics.median(before)
        verdict = "one run"
        if min(len(before), len(after)) > 1:
            noise = max(LEAST, ERRORS * math.hypot(_error(before), _error(after)))
            verdict = "within noise" if abs(ratio - 1) <= noise else "faster" if ratio > 1 else "slower"
    return Comparison(
        **dict(zip(_KEYS, key, strict=True)),
        first=first.name,
        other=other.name,
        first_median=statistics.median(before) if before else None,
        other_median=statistics.median(after) if after else None,
        ratio=ratio,
        noise=noise,
        verdict=verdict,
    )


def _error(samples: Sequence[float]) -> float:
    """The standard error of the mean, over it."""
    return statistics.stdev(samples) / math.sqrt(len(samples)) / statistics.fmean(samples)


def differences(files: Sequence[Results]) -> list[str]:
    """In what the other files were measured differently than the first, and which while others worked; a line each."""
    first, *others = files
    disturbed = [
        f"{each.name} was measured while other programs took {100 * each.busy:.0f} % of the processor"
        for each in files
        if each.busy > BUSY
    ]
    return disturbed + [
        f"{other.name} was measured with {_words(name, other)}, {first.name} with {_words(name, first)}"
        for other in others
        for name in _FACTS
        if other.facts[name] != first.facts[name]
    ]


def _words(name: str, file: Results) -> str:
    return " and ".join(_FACTS[name].format(value) for value in file.facts[name]) or f"an unknown {name}"
