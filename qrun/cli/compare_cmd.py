"""`qrun bench compare`: results of `qrun bench` side by side. The comparing is in `qrun.bench_compare`."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qrun.cli.console import Console
from qrun.cli.sanitize import one_line
from qrun.cli.table import markdown, records
from qrun.errors import UsageError

if TYPE_CHECKING:
    from qrun.bench_compare import Comparison

LEFT = 6


def compare(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE", help="What qrun bench -o json or -o jsonl wrote; all are compared with the first."
        ),
    ],
    output: Annotated[
        Literal["md", "csv", "json", "jsonl"], typer.Option("-o", "--output", help="The form of the table.")
    ] = "md",
) -> None:
    """Compare results of `qrun bench`: medians of the same test, their ratio, and whether that exceeds the noise.

    A ratio counts where it differs from 1 by three standard errors, as the runs' spread gives them, and by 2 % at
    least. Runs in one file tell nothing of what else changed in the meantime: alternate, and join JSON lines with >>.

    Example:  qrun bench compare before.json after.json
    """
    from qrun import bench_compare

    console = Console()
    if len(files) < 2:
        raise UsageError("there is nothing to compare: give two files or more")
    results = [bench_compare.read(path) for path in files]
    rows = bench_compare.compare(results)
    if output == "md":
        header = (
            "model",
            "backend",
            "recipe",
            "kv",
            "test",
            "file",
            f"{results[0].name} t/s",
            "t/s",
            "ratio",
            "noise",
            "is",
        )
        lines = markdown(header, [cells(row) for row in rows], left=LEFT)
    else:
        lines = records(output, (dataclasses.asdict(row) for row in rows))
    for line in lines:
        console.raw(line)
    console.note("noise is what runs within a file show; what the machine did differently between files is not in it")
    for difference in bench_compare.differences(results):
        console.warn(difference)


def cells(row: "Comparison") -> tuple[str, ...]:
    """Return one row as the table shows it."""
    return (
        *map(one_line, (row.model, row.backend, row.recipe, row.kv, row.test, row.other)),
        "" if row.first_median is None else f"{row.first_median:.2f}",
        "" if row.other_median is None else f"{row.other_median:.2f}",
        "" if row.ratio is None else f"{row.ratio:.3f}",
        "" if row.noise is None else f"± {row.noise:.3f}",
        row.verdict,
    )
