"""`qrun cache`: the quantized weights kept on disk. The store itself is `qrun.store`."""

import re
import time
from typing import Annotated

import typer

from qrun.cli import card as cards
from qrun.cli.console import Console
from qrun.cli.table import markdown
from qrun.errors import UsageError

app = typer.Typer(
    no_args_is_help=True,
    help="The quantized weights that qrun keeps, so that a second start is quick. Example:  qrun cache ls",
)

UNITS = {"h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}


@app.command("ls")
def list_entries() -> None:
    """List what is kept, last used first.

    Example:  qrun cache ls
    """
    from qrun.store import WeightStore

    console = Console()
    store = WeightStore.default()
    entries = store.ls()
    rows = [
        (entry.key[:12], entry.model, entry.recipe, cards.size(entry.bytes), f"{ago(time.time() - entry.used)} ago")
        for entry in entries
    ]
    for line in markdown(("key", "model", "recipe", "size", "used"), rows, left=3):
        console.raw(line)
    console.note(f"{len(entries)} in {store.root}, {cards.size(sum(entry.bytes for entry in entries))}")


@app.command()
def prune(
    key: Annotated[
        list[str] | None, typer.Argument(metavar="KEY", help="Only these, by the first digits that ls shows.")
    ] = None,
    older_than: Annotated[
        str | None, typer.Option("--older-than", metavar="AGE", help="Only what was not used for 12h, 30d or 4w.")
    ] = None,
) -> None:
    """Delete what is kept: all of it, or only some. It is made again when it is needed.

    Example:  qrun cache prune --older-than 30d
    """
    seconds = None if older_than is None else age(older_than)
    from qrun.store import WeightStore

    console = Console()
    count, freed = WeightStore.default().prune(key, older_than=seconds, everything=not key and seconds is None)
    console.note(f"{count} deleted, {cards.size(freed)} freed")
    if key and not count:
        raise UsageError(f"nothing is kept under {', '.join(key)}: qrun cache ls lists the keys")


def age(text: str) -> float:
    """Return the seconds that `12h`, `30d` or `4w` name.

    Raises:
        UsageError: the text is no age.
    """
    match = re.fullmatch(r"(\d+)([hdw])", text.strip().lower())
    if match is None:
        raise UsageError(f"--older-than {text!r} is not an age: give 12h, 30d or 4w")
    return int(match[1]) * UNITS[match[2]]


def ago(seconds: float) -> str:
    """Return a time span in its largest unit: `3 d`."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
