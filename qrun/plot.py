"""Tables as pictures: speed by recipe or by depth, quality against size. The one file that imports matplotlib.

It draws rows into a file and needs no display; it measures nothing and prints nothing.
"""

import os
import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from qrun.bench import BenchRow, Test
from qrun.errors import UsageError
from qrun.eval import EvalRow

SUFFIXES: Final = (".png", ".svg")
_KINDS: Final = {"pp": "reading a prompt", "tg": "writing"}


def check(path: Path) -> None:
    """Refuse a file that could not be drawn, before anything is measured for it.

    Raises:
        UsageError: the name does not end in .png or .svg, its folder is missing, or matplotlib is.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--plot {path}: name a file that ends in .png or .svg")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UsageError(f"--plot {path}: there is no folder {path.parent} to write to")
    if find_spec("matplotlib") is None:
        raise UsageError('--plot needs matplotlib, which is not installed: pip install "qrun-llm[plot]"')


def speed(rows: Sequence[BenchRow], path: Path) -> None:
    """Draw tokens per second with their standard deviations: bars, or lines where tests begin at several depths.

    Raises:
        OSError: the file cannot be written.
    """
    parsed = [(row, Test.parse(row.test)) for row in rows]
    kinds = [kind for kind in _KINDS if any(test.kind == kind for _, test in parsed)]
    several = len({test.depth for _, test in parsed}) > 1
    figure, axes = _figure(len(kinds), rows[0].model, f"{rows[0].device}")
    caches = len({row.kv for row in rows}) > 1
    for ax, kind in zip(axes, kinds, strict=True):
        series: dict[str, list[tuple[BenchRow, Test]]] = {}
        for row, test in parsed:
            if test.kind == kind:
                name = f"{row.recipe}, {row.kv} cache" if caches else row.recipe
                series.setdefault(f"{name}, {kind}{test.tokens}" if several else name, []).append((row, test))
        ax.set_title(_KINDS[kind])
        if several:
            _lines(ax, series)
        else:
            _bars(ax, series)
        ax.set_ylabel("tokens per second")
        ax.set_ylim(bottom=0)
        ax.legend(
            fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2
        )  # below, clear of the bars
    _save(figure, path)


def _lines(ax: Any, series: dict[str, list[tuple[BenchRow, Test]]]) -> None:
    for name, points in series.items():
        ax.errorbar(
            [test.depth for _, test in points],
            [row.mean for row, _ in points],
            [row.std for row, _ in points],
            marker="o",
            capsize=3,
            label=name,
        )
    ax.set_xlabel("tokens already in the cache")


def _bars(ax: Any, series: dict[str, list[tuple[BenchRow, Test]]]) -> None:
    tests = list(dict.fromkeys(row.test for points in series.values() for row, _ in points))
    width = 0.8 / len(series)
    for i, (name, points) in enumerate(series.items()):
        places = [tests.index(row.test) + width * (i - (len(series) - 1) / 2) for row, _ in points]
        ax.bar(
            places,
            [row.mean for row, _ in points],
            width * 0.95,
            yerr=[row.std for row, _ in points],
            capsize=3,
            label=name,
        )
    ax.set_xticks(range(len(tests)), tests)


def quality(rows: Sequence[EvalRow], path: Path) -> None:
    """Draw the mean KL divergence against bits a weight, a token's bytes in the cache, or both, whichever vary.

    What does not diverge at all, as the reference itself, has no place on the logarithmic axis and is left out.

    Raises:
        OSError: the file cannot be written.
    """
    caches = len({row.kv for row in rows}) > 1
    weights = not caches or len({_weights(row) for row in rows}) > 1
    figure, axes = _figure(weights + caches, rows[0].model, f"{rows[0].tokens} tokens, against {rows[0].reference}")
    if weights:
        _points(axes[0], rows, lambda row: row.bits_per_weight, of=lambda row: f"{row.kv} cache", label=_weights)
        axes[0].set_xlabel("bits per weight")
    if caches:
        _points(axes[-1], rows, lambda row: row.kv_bytes_per_token / 1024, of=_weights, label=lambda row: row.kv)
        axes[-1].set_xlabel("KiB of cache per token")
    _save(figure, path)


def _weights(row: EvalRow) -> str:
    """The recipe without its cache, which has a place of its own in the picture."""
    return re.sub(r"C[^C]*$|,kv=.*", "", row.recipe)


def _points(
    ax: Any, rows: Sequence[EvalRow], x: Callable[[EvalRow], float], *, of: Callable[[EvalRow], str],
    label: Callable[[EvalRow], str],
) -> None:  # fmt: skip
    series: dict[str, list[EvalRow]] = {}
    for row in rows:
        if row.kl_mean > 0:
            series.setdefault(of(row), []).append(row)
    for name, points in series.items():
        ax.scatter([x(row) for row in points], [row.kl_mean for row in points], label=name)
        for row in points:
            ax.annotate(label(row), (x(row), row.kl_mean), (4, 4), textcoords="offset points", fontsize="small")
    if series:
        ax.set_yscale("log")
        ax.legend(fontsize="small")
    ax.set_ylabel("KL divergence, nats per token")
    ax.margins(0.15)


def _figure(panels: int, model: str, rest: str) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(6.4 * panels, 4.8), layout="constrained")
    figure.suptitle(f"{model}: {rest}", parse_math=False)  # a model's name may hold a dollar sign
    axes = [figure.add_subplot(1, panels, i + 1) for i in range(panels)]
    for ax in axes:
        ax.grid(True, alpha=0.3)
        ax.set_axisbelow(True)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    """Write beside and rename, so that a reader finds a whole picture or the one before."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(unfinished, format=path.suffix.lower().removeprefix("."), dpi=150)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
