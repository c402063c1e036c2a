"""`qrun info`: this machine, and how a model would run on it."""

import dataclasses
import json
import os
import platform
from typing import Annotated

import typer

from qrun.cli import card as cards
from qrun.cli.console import Console
from qrun.cli.options import OUTPUT_PANEL, ModelOptions
from qrun.cli.start import load_engine


def info(
    model: ModelOptions,
    as_json: Annotated[
        bool,
        typer.Option("--json", envvar="QRUN_JSON", help="Print it as one JSON object.", rich_help_panel=OUTPUT_PANEL),
    ] = False,
) -> None:
    """Show this machine, and load a model to show what each part of it runs on.

    Example:  qrun info ernie:0.3b --wint4
    """
    console = Console(quiet=model.quiet)
    model.check()
    machine = describe_machine()
    if not as_json:
        for title, value in machine.items():
            console.raw(f"{title:<10}{value}\n")
        console.raw("\n")
    card = load_engine(model, console).card
    if as_json:
        console.raw(json.dumps({"machine": machine, "card": dataclasses.asdict(card)}, ensure_ascii=False) + "\n")
        return
    console.raw("".join(cards.title(card)) + "\n")
    for title, value in cards.rows(card):
        console.raw(f"  {title:<9}{value}\n")
    console.raw("\n")
    for line, _ in cards.bindings(card):
        console.raw(f"  {line}\n")
    for note in card.notes:
        console.raw(f"  note: {note}\n")


def describe_machine() -> dict[str, str]:
    """Return what qrun found here: versions, processor, memory, GPU."""
    import psutil
    import torch

    from qrun import __version__
    from qrun.backends import describe_gpu
    from qrun.doctor_machine import processor
    from qrun.memory import available

    memory = psutil.virtual_memory()
    return {
        "qrun": __version__,
        "python": f"{platform.python_version()}, torch {torch.__version__}",
        "cpu": f"{processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "memory": f"{cards.size(available())} free of {cards.size(memory.total)}",
        "gpu": describe_gpu(),
    }
