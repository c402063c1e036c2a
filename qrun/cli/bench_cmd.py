"""`qrun bench`: how fast a model reads and writes here, as llama-bench prints it. The measuring is in `qrun.bench`."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qrun.cli import card as cards
from qrun.cli.console import Console
from qrun.cli.options import EMBEDDED, SweepOptions
from qrun.cli.start import working
from qrun.cli.table import markdown, records
from qrun.errors import UsageError

if TYPE_CHECKING:
    from qrun.bench import BenchRow

COLUMNS = {
    "model": 12, "size": 7, "params": 7, "backend": 7, "threads": 7, "recipe": 8, "kv": 4, "test": 5,
    "t/s": 15, "TTFT": 7, "load": 6, "peak": 7, "% bw": 4,
}  # fmt: skip
"""Headers with the least width of what stands below: rows come one by one, and the first must fit the last."""
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
    output: Annotated[
        Literal["md", "csv", "json", "jsonl"], typer.Option("-o", "--output", help="The form of the table.")
    ] = "md",
) -> None:
    """Measure speed: pp512 is reading a prompt of 512 tokens, tg128 is writing 128. Lists with commas are swept.

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
    with working(f"loading {sweep.model}", console) as waiting:
        from qrun.bench import Test, run

        tests = [
            Test("pp" if kind == "pp" else "tg", count, deep) for deep in depths for kind, count in lengths if count
        ]
        widths = COLUMNS | {
            "model": max(COLUMNS["model"], len(Path(sweep.model).name)),
            "recipe": max(COLUMNS["recipe"], *(len(recipe.label) for recipe in recipes)),
            "test": max(COLUMNS["test"], *(len(str(test)) for test in tests)),
        }
        rows = run(
            sweep.model,
            quants=recipes,
            kvs=kvs,
            tests=tests,
            repeats=repetitions,
            progress=waiting.update,
            **sweep.load_arguments(),
        )
        lines = (
            markdown(list(COLUMNS), (cells(row) for row in rows), left=LEFT, widths=list(widths.values()))
            if output == "md"
            else records(output, (dataclasses.asdict(row) for row in rows))
        )
        for line in lines:
            with waiting.aside():
                console.raw(line)
    if sweep.model == EMBEDDED:
        console.note("spark fits in the processor's caches: its speed says little of larger models")


def whole(text: str, option: str) -> list[int]:
    """Return the numbers of a comma list.

    Raises:
        UsageError: one of them is no whole number from 0.
    """
    numbers = text.split(",")
    if not all(number.strip().isdecimal() for number in numbers):
        raise UsageError(f"{option} {text!r} is not a list of whole numbers: {option} 128,512, for example")
    return [int(number) for number in numbers]


def cells(row: "BenchRow") -> tuple[str, ...]:
    """Return one row as the table shows it."""
    return (
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
        cards.size(row.peak_memory),
        "" if row.bandwidth_share is None else f"{100 * row.bandwidth_share:.0f}",
    )
