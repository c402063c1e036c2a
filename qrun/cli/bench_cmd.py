"""`qrun bench`: how fast a model reads and writes here, as llama-bench prints it. The measuring is in `qrun.bench`."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qrun.bench_compare import BUSY
from qrun.cli import card as cards
from qrun.cli.console import Console
from qrun.cli.eval_cmd import BUILT_IN_NOTE
from qrun.cli.options import EMBEDDED, SweepOptions
from qrun.cli.start import working
from qrun.cli.table import markdown, records
from qrun.errors import UsageError

if TYPE_CHECKING:
    from qrun.bench import BenchRow

COLUMNS = {
    "model": 12, "size": 7, "params": 7, "backend": 7, "threads": 7, "recipe": 8, "kv": 4, "test": 5,
    "t/s": 17, "TTFT": 7, "load": 6, "quantize": 8, "peak": 7, "% bw": 4,
}  # fmt: skip
"""Headers with the least width of what stands below: rows come one by one, and the first must fit the last."""
QUALITY = {"KL": 7, "same top": 8}
LEFT = 8


def bench(
    sweep: SweepOptions,
    n_prompt: Annotated[
        str, typer.Option("-p", "--n-prompt", metavar="N,…", help="Prompt lengths to read; 0 is none.")
    ] = "512",
    n_gen: Annotated[
        str, typer.Option("-n", "--n-gen", metavar="N,…", help="Numbers of tokens to write; 0 is none.")
    ] = "128",
    depth: Annotated[
        str, typer.Option("-d", "--depth", metavar="N,…", help="Tokens already in the cache when a test starts.")
    ] = "0",
    repetitions: Annotated[
        int, typer.Option("-r", "--repetitions", metavar="N", help="Measured runs a test, after one to warm up.")
    ] = 5,
    quality: Annotated[
        bool,
        typer.Option(
            "--quality",
            help="Also KL divergence and top-1 agreement with BF16, on the first 2048 tokens of eval's text.",
        ),
    ] = False,
    output: Annotated[
        Literal["md", "csv", "json", "jsonl"], typer.Option("-o", "--output", help="The form of the table.")
    ] = "md",
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Also draw the speeds into a .png or .svg file.")
    ] = None,
) -> None:
    """Measure speed: pp512 is reading a prompt of 512 tokens, tg128 is writing 128. Lists with commas are swept.

    What is compared takes turns, run by run. t/s is mean and standard deviation; JSON and CSV hold the medians too.
    `qrun bench compare A.json B.json` compares what `-o json` wrote.

    Example:  qrun bench ernie:0.3b --quant bf16,wint8,wint4 --kv bf16,int4 -d 0,4096
    """
    console = Console(quiet=sweep.quiet)
    recipes, kvs = sweep.recipes(), sweep.kvs()
    lengths = [("pp", n) for n in whole(n_prompt, "-p")] + [("tg", n) for n in whole(n_gen, "-n")]
    if repetitions < 1:
        raise UsageError(f"--repetitions {repetitions} is impossible: give 1 or more")
    if not any(n for _, n in lengths):
        raise UsageError("nothing to measure: give -p or -n a number above 0")
    depths = whole(depth, "-d")
    sweep.check()
    busy = others(console)
    with working(f"loading {sweep.model}", console) as waiting:
        from qrun import plot as plots
        from qrun.bench import Test, run

        if plot is not None:
            plots.check(plot)
        occasion = facts() | {"busy": busy}
        tests = [
            Test("pp" if kind == "pp" else "tg", count, deep) for deep in depths for kind, count in lengths if count
        ]
        columns = COLUMNS | (QUALITY if quality else {})
        widths = columns | {
            "model": max(COLUMNS["model"], len(Path(sweep.model).name)),
            "recipe": max(COLUMNS["recipe"], *(len(recipe.label) for recipe in recipes)),
            "test": max(COLUMNS["test"], *(len(str(test)) for test in tests)),
        }
        found: list[BenchRow] = []
        rows = kept(
            run(
                sweep.model,
                quants=recipes,
                kvs=kvs,
                tests=tests,
                repeats=repetitions,
                quality=quality,
                progress=waiting.update,
                **sweep.load_arguments(),
            ),
            found,
        )
        lines = (
            markdown(
                list(columns), (cells(row, quality=quality) for row in rows), left=LEFT, widths=list(widths.values())
            )
            if output == "md"
            else records(output, (dataclasses.asdict(row) | occasion for row in rows))
        )
        for line in lines:
            with waiting.aside():
                console.raw(line)
        if plot is not None:
            waiting.update(f"drawing {plot}", 0, 0)
            plots.speed(found, plot)
    for note in notes(found):
        console.warn(note)
    if sweep.model == EMBEDDED:
        console.note("spark fits in the processor's caches: its speed says little of larger models")


def others(console: Console) -> float:
    """Return the share of the processor that other programs take now; says so if it is worth a word."""
    import psutil

    busy = psutil.cpu_percent(interval=0.2) / 100  # while this one sleeps: a load average would hold its last run
    if busy > BUSY:
        console.warn(f"other programs take {100 * busy:.0f} % of the processor: speeds will vary and be too low")
    return busy


def facts() -> dict[str, Any]:
    """Return when and by what is measured, for whoever compares it one day."""
    import torch

    from qrun import __version__
    from qrun.doctor_machine import processor

    return {
        "qrun": __version__,
        "torch": torch.__version__,
        "processor": processor(),
        "cores": os.cpu_count(),
        "when": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def kept(rows: "Iterable[BenchRow]", found: "list[BenchRow]") -> "Iterator[BenchRow]":
    """Yield the rows, and keep them too."""
    for row in rows:
        found.append(row)
        yield row


def notes(rows: "Sequence[BenchRow]") -> Iterator[str]:
    """Yield what a reader of the table should know, a line each."""
    from qrun.eval import BUILT_IN

    noisy = [row for row in rows if row.noisy]
    if noisy:
        worst = max(noisy, key=lambda row: max(row.variation, abs(row.drift)))
        yield (
            f"the machine was not quiet: {len(noisy)} of {len(rows)} tests varied or drifted by over 5 %, {worst.test} "
            f"of {worst.recipe} by {100 * max(worst.variation, abs(worst.drift)):.0f} %: compare medians, or repeat it"
        )
    if not all(row.in_turns for row in rows):
        yield "memory is not enough for all recipes at once: they were measured one after another, not in turns"
    if any(row.text == BUILT_IN for row in rows):
        yield BUILT_IN_NOTE


def whole(text: str, option: str) -> list[int]:
    """Return the numbers of a comma list.

    Raises:
        UsageError: one of them is no whole number from 0.
    """
    numbers = text.split(",")
    if not all(number.strip().isdecimal() for number in numbers):
        raise UsageError(f"{option} {text!r} is not a list of whole numbers: {option} 128,512, for example")
    return [int(number) for number in numbers]


def cells(row: "BenchRow", *, quality: bool = False) -> tuple[str, ...]:
    """Return one row as the table shows it."""
    quantize = "" if row.quantize_seconds is None else f"{row.quantize_seconds:.1f} s"
    speed = (
        row.model,
        cards.size(row.size),
        cards.number(row.parameters),
        row.backend,
        "n/a" if row.threads is None else str(row.threads),
        row.recipe,
        row.kv,
        row.test,
        f"{row.mean:.2f} ± {row.std:.2f}",
        "" if row.first_token_seconds is None else f"{row.first_token_seconds:.3f} s",
        f"{row.load_seconds:.1f} s",
        "kept" if row.from_store else quantize,
        cards.size(row.peak_memory),
        "" if row.bandwidth_share is None else f"{100 * row.bandwidth_share:.0f}",
    )
    found = "" if row.kl_mean is None else f"{row.kl_mean:.5f}", "" if row.top1 is None else f"{100 * row.top1:.1f} %"
    return speed + found if quality else speed
