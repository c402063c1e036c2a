"""Which program shape each weight runs fastest with on this card: measured once, kept on disk, a rule until then.

It times launches and knows their shapes; what they compute is not its affair.
"""

import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from qrun.backends import kept
from qrun.backends.cuda_device import Card
from qrun.kernels.gpu_gemv import Config, Operand, Scratch, default_config, gemv, scratch_size
from qrun.kernels.gpu_packed import Packed
from qrun.paths import cache_dir

CANDIDATES = 20
"""Shapes that are tried for a weight, at most."""
COLUMNS = 8
"""Only what single tokens run is tuned."""


class Tuner:
    """Program shapes for a card. ``progress`` is told of each weight that is measured."""

    def __init__(self, card: Card, progress: Callable[[str], None], *, folder: Path | None = None) -> None:
        self._card = card
        self._progress = progress
        version = "".join(c if c.isalnum() else "-" for c in f"{card.name} {_triton_version()}")
        self._file = (folder or cache_dir() / "tuned") / f"{version}.json"
        self._known = _known(self._file)
        self._seen: dict[str, list[Packed]] = {}

    def config(self, weight: Packed, columns: int, blocks: int = 1) -> Config:
        """The shape for a weight, so many columns of tokens and blocks of them."""
        if columns == COLUMNS and blocks == 1:
            known = self._known.get(key_of(weight))
            if known is not None:
                return known
        return default_config(weight, columns, self._card.processors, blocks)

    def register(self, weight: Packed) -> None:
        """A weight to be tuned, unless its like is known."""
        if self._card.captures and not weight.experts and key_of(weight) not in self._known:
            self._seen.setdefault(key_of(weight), []).append(weight)

    def tune(self) -> None:
        """Measure what was registered and keep the results; says so before each, for a kernel takes seconds."""
        seen, self._seen = self._seen, {}
        for i, (key, weights) in enumerate(seen.items()):
            self._progress(f"measuring kernels on this GPU, once: {i + 1} of {len(seen)}, {key}")
            timed = {config: self._time(config, weights) for config in candidates(weights[0], self._card)}
            best = min(timed, key=lambda config: timed[config])
            if timed[best] < float("inf"):  # or there was no room to measure
                self._known[key] = best
        if seen:
            kept.write(self._file, {key: asdict(config) for key, config in self._known.items()})

    def _time(self, config: Config, weights: list[Packed]) -> float:
        """Median microseconds of a product, from as many weights in turn as there are, so that none is in the cache."""
        first = weights[0]
        x = torch.randn(1, first.width, device=self._card.device).to(self._card.half)
        operand = Operand(x=x, sums=x.float().view(1, -1, 32).sum(-1), width=first.k)
        out = torch.empty(1, first.n, device=self._card.device)
        scratch = Scratch(
            partial=torch.empty(max(1, scratch_size(first, COLUMNS, 1, config.split)), device=self._card.device),
            counter=torch.zeros(first.rows // config.rows, dtype=torch.int32, device=self._card.device),
        )
        try:
            gemv(first, operand, out, scratch=scratch, config=config)
            flush = torch.empty(1 << 28, dtype=torch.int8, device=x.device)
        except Exception:  # a shape this card has no room for
            return float("inf")
        # It empties the cache, and keeps the device busy until all that is timed is queued, so that no launch is timed.
        times: list[float] = []
        for turn in range(20):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            for _ in range(4):
                flush.zero_()
            begin.record()
            gemv(weights[turn % len(weights)], operand, out, scratch=scratch, config=config)
            end.record()
            end.synchronize()
            times.append(1000 * begin.elapsed_time(end))
        return statistics.median(times)


def key_of(weight: Packed) -> str:
    """What decides a weight's speed: its kind, groups and sizes."""
    zero = "z" if weight.zero is not None else ""
    return f"{weight.kind} g{weight.group}{zero} {weight.n}x{weight.k}" + (" pairs" if weight.pairs else "")


def candidates(weight: Packed, card: Card) -> list[Config]:
    """Shapes worth a try, the rule's own first."""
    chosen = default_config(weight, COLUMNS, card.processors)
    tiles = weight.width // weight.tile
    wide = weight.pairs == 128
    found = [chosen]
    for rows, warps in ((128, 4), (256, 4), (128, 2), (256, 8)):
        if weight.rows % rows or (wide and rows != 256):
            continue
        for split in sorted({1, max(1, chosen.split // 2), chosen.split, 2 * chosen.split}):
            for stages in (3, 4):
                if split <= max(1, tiles // 2):
                    found.append(Config(rows=rows, warps=warps, stages=stages, split=split))
    return list(dict.fromkeys(found))[:CANDIDATES]


def _triton_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"triton {version('triton')}"
    except PackageNotFoundError:
        return "triton"


def _known(file: Path) -> dict[str, Config]:
    try:
        return {
            key: Config(**{name: int(value) for name, value in shape.items()}) for key, shape in kept.read(file).items()
        }
    except (TypeError, ValueError):  # of another version
        return {}
