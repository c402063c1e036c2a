"""`qrun eval`: what a recipe costs in quality, as a table. The measuring is in `qrun.eval`."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qrun.cli import card as cards
from qrun.cli.console import Console
from qrun.cli.options import SweepOptions
from qrun.cli.start import working
from qrun.cli.table import markdown, records
from qrun.errors import UsageError

if TYPE_CHECKING:
    from qrun.eval import EvalRow

HEADER = ("model", "recipe", "kv", "size", "bits", "KV/token", "perplexity", "KL mean", "KL p99", "same top")
BY_LENGTH = ("KL 1st ¼", "KL last ¼")
LONG = 2048
"""Tokens a window from which on the table shows how the divergence grows along it."""
LEFT = 3
RECIPES = "bf16,wint8,fp8,wint4,nf4"
BUILT_IN_NOTE = (
    "the text was the built-in one, conversations about qrun: a text of your own says more (qrun eval --text FILE)"
)


def evaluate(
    sweep: SweepOptions,
    text: Annotated[
        Path | None,
        typer.Option("-f", "--text", metavar="FILE", help="A UTF-8 text; a built-in one if not given."),
    ] = None,
    reference: Annotated[
        str, typer.Option("--reference", metavar="RECIPE", help="What the recipes are compared with.")
    ] = "bf16",
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="MODEL",
            help="Compare with another model, as the one that this was quantized from.",
        ),
    ] = None,
    window: Annotated[
        int,
        typer.Option(
            "--window",
            metavar="N",
            help="Tokens read in one go, up to all the model's positions; the cache starts empty.",
        ),
    ] = 512,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "-n",
            "--max-tokens",
            envvar="QRUN_EVAL_TOKENS",  # not QRUN_MAX_TOKENS: a limit on answers is none on the text
            metavar="N",
            help="Read only the first N tokens of the text.",
        ),
    ] = None,
    output: Annotated[
        Literal["md", "csv", "json", "jsonl"], typer.Option("-o", "--output", help="The form of the table.")
    ] = "md",
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Also draw quality against bits into a .png or .svg file."),
    ] = None,
) -> None:
    """Measure quality: the perplexity of a text, and the KL divergence from the unquantized model, per recipe.

    A checkpoint that is quantized already is compared with the one it was made from by --against.

    Example:  qrun eval ernie:0.3b --quant wint8,wint4,nf4 --kv bf16,int4 --text book.txt
    """
    console = Console(quiet=sweep.quiet)
    sweep.check()
    recipes, kvs = sweep.recipes(RECIPES if against is None else "auto"), sweep.kvs()
    if window < 2:
        raise UsageError(f"--window {window} is too small: give 2 or more")
    if max_tokens is not None and max_tokens < 2:
        raise UsageError(f"--max-tokens {max_tokens} is too small: give 2 or more")
    if text is not None and not text.is_file():
        raise UsageError(f"there is no file {text}: give a UTF-8 text with --text")
    with working(f"loading {sweep.model}", console) as waiting:
        from qrun import plot as plots
        from qrun.eval import BUILT_IN
        from qrun.eval import evaluate as measure

        if plot is not None:
            plots.check(plot)
        rows = measure(
            sweep.model,
            recipes,
            kvs,
            text,
            reference=reference,
            against=against,
            window=window,
            max_tokens=max_tokens,
            progress=waiting.update,
            **sweep.load_arguments(),
        )
        if plot is not None:
            waiting.update(f"drawing {plot}", 0, 0)
            plots.quality(rows, plot)
    if output == "md":
        by_length = window >= LONG and all(row.kl_by_quarter for row in rows)
        header = HEADER + (BY_LENGTH if by_length else ())
        lines = markdown(header, [cells(row, by_length=by_length) for row in rows], left=LEFT)
    else:
        lines = records(output, (dataclasses.asdict(row) for row in rows))
    for line in lines:
        console.raw(line)
    console.note(f"{rows[0].tokens} tokens, against {rows[0].reference}; KL in nats a token; ± is one standard error")
    if rows[0].text == BUILT_IN:
        console.warn(BUILT_IN_NOTE)


def cells(row: "EvalRow", *, by_length: bool = False) -> tuple[str, ...]:
    """Return one row as the table shows it; `by_length` adds the first and last quarter's divergence."""
    return (
        row.model,
        row.recipe,
        row.kv,
        cards.size(row.size),
        f"{row.bits_per_weight:.2f}",
        f"{row.kv_bytes_per_token / 1024:.2f} KiB",
        f"{row.perplexity:.3f} ± {row.perplexity_error:.3f}",
        f"{row.kl_mean:.5f}",
        f"{row.kl_p99:.4f}",
        f"{100 * row.top1:.1f} %",
        *((f"{row.kl_by_quarter[0]:.5f}", f"{row.kl_by_quarter[-1]:.5f}") if by_length else ()),
    )
