"""`qrun fit`: which recipes and contexts fit, before anything is downloaded. The arithmetic is in `qrun.fit`."""

import dataclasses
import re
import shlex
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qrun.cli import card as cards
from qrun.cli import complete
from qrun.cli.console import Console
from qrun.cli.options import MODEL_PANEL, SUGAR, SweepOptions, parse_size
from qrun.cli.start import working
from qrun.cli.table import markdown, records
from qrun.errors import DoesNotFitError, UsageError

if TYPE_CHECKING:
    from qrun.fit import FitRow

HEADER = ("", "model", "recipe", "kv", "context", "weights", "cache", "loading", "needed", "fits", "most context")
LEFT = 4
RECIPES = "auto,bf16,wint8,wint4,wint2"
"""``auto`` only counts where a model is quantized already."""
"""What is tried when nothing is asked for, the best first."""
FIRST_CONTEXT = "4096"
CONTEXTS = f"{FIRST_CONTEXT},32k,max"
UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4, "mi": 1 << 20, "gi": 1 << 30}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitOptions(SweepOptions):
    """The same for `fit`: the model may be left out, and contexts may be a list with commas."""

    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            autocompletion=complete.models,
            help="A checkpoint directory, a name such as qwen3:0.6b, a family such as ernie, an org/name on the hub, "
            "or spark; every short name when not given.",
            show_default=False,
        ),
    ] = ""
    ctx_size: Annotated[
        str | None,
        typer.Option(
            "-c",
            "--ctx-size",
            metavar="TOKENS,…",
            help="Lengths of the context: 4096, 32k, or max for all the model has.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None

    def contexts(self, default: str = CONTEXTS) -> list[int]:
        """Return the contexts to go through, -1 for all the model has.

        Raises:
            UsageError: one of them does not parse.
        """
        parts = (self.ctx_size or default).split(",")
        return [-1 if part.strip().lower() == "max" else parse_size(part) for part in parts]

    def context(self) -> int:
        """Return the first of them.

        Raises:
            UsageError: one of them does not parse.
        """
        return self.contexts()[0]

    def asked(self) -> bool:
        """Return whether lines of the table were asked for by name."""
        return any((self.quant, self.kv, self.ctx_size, *(getattr(self, name) for name in SUGAR)))


def fit(
    sweep: FitOptions,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help="Free memory of another machine, such as 16GB or 24GiB; with --device cuda or xpu, of another GPU.",
        ),
    ] = None,
    output: Annotated[
        Literal["md", "csv", "json", "jsonl"], typer.Option("-o", "--output", help="The form of the table.")
    ] = "md",
) -> None:
    """Show what would fit, before anything is downloaded: weights, cache, peak while loading, per recipe and context.

    Of a model on the hub only the config and a header are read. A star marks what to take. `needed` is what must be
    free before a load starts, with a margin; `loading` the peak to expect of it. Without a model, or for a family, each
    model has one line: the best recipe that fits. `--quant`, `--kv` and `-c` take lists; the exit code is 4 if one of
    them is given and no line fits.

    Example:  qrun fit ernie:21b --kv bf16,int8 -c 4096,32k --memory 16GB
    """
    console = Console(quiet=sweep.quiet)
    sweep.check()
    free = None if memory is None else parse_memory(memory)
    recipes = [recipe if kv is None else recipe.with_kv(kv) for recipe in sweep.recipes(RECIPES) for kv in sweep.kvs()]
    with working(f"looking at {sweep.model or 'every short name'}", console):
        from qrun.fit import best, find_place
        from qrun.fit import fit as rows_of
        from qrun.outline import outlines

        found = outlines(sweep.model, offline=sweep.offline)
        place = find_place(sweep.device, sweep.threads, free)
        several = len(found) > 1
        contexts = sweep.contexts(FIRST_CONTEXT if several else CONTEXTS)
        tables = [rows_of(outline, recipes, contexts, place) for outline in found]
    rows = [best(table) for table in tables] if several else tables[0]
    if output == "md":
        lines = markdown(HEADER, [cells(row) for row in rows], left=LEFT)
    else:
        lines = records(output, (dataclasses.asdict(row) for row in rows))
    for line in lines:
        console.raw(line)
    for outline in found:
        if outline.note:
            console.warn(outline.note)
    console.note(f"{cards.size(place.free)} are free {place.about}")
    star = next((row for row in rows if row.recommended), None)
    if star is not None:
        start = "" if several else f": {command(star, sweep)}"
        console.note(f"* the first recipe that fits and spares a tenth of that, or else that fits{start}")
    if not any(row.fits for row in rows):
        least = min(rows, key=lambda row: row.needed)
        text = (
            f"nothing of this fits in {cards.size(place.free)}: {least.model} at {least.recipe} with a context of "
            f"{least.context} needs {cards.size(least.needed)}"
        )
        if sweep.asked():
            raise DoesNotFitError(f"{text}: try a smaller --quant, --kv or -c, or a smaller model")
        console.warn(text)


def parse_memory(text: str, option: str = "--memory") -> int:
    """Return the bytes that `text` names: `16GB` (powers of 1000), `24GiB` (powers of 1024), `640m`.

    Raises:
        UsageError: it is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if match is None or match[2] not in UNITS or float(match[1]) == 0:
        raise UsageError(f"{option} {text!r} is not a size: give one like 16GB or 24GiB")
    return int(float(match[1]) * UNITS[match[2]])


def command(row: "FitRow", sweep: FitOptions) -> str:
    """Return the command line that starts what a row describes."""
    words = ["qrun", "chat", row.model]
    if row.recipe in SUGAR:
        words.append(f"--{row.recipe}")
    elif row.recipe not in ("auto", "bf16"):
        words += ["--quant", row.recipe]
    if sweep.kv is not None:
        words += ["--kv", row.kv]
    if row.context != parse_size(FIRST_CONTEXT):
        words += ["-c", str(row.context) if row.context % 1024 else f"{row.context // 1024}k"]
    if sweep.device != "auto":
        words += ["--device", sweep.device]
    return shlex.join(words)


def cells(row: "FitRow") -> tuple[str, ...]:
    """Return one row as the table shows it."""
    return (
        "*" if row.recommended else "",
        row.model,
        row.recipe,
        row.kv,
        str(row.context),
        cards.size(row.weights),
        cards.size(row.cache),
        cards.size(row.loading),
        cards.size(row.needed),
        "yes" if row.fits else "no",
        str(row.most_context),
    )
