"""`qrun doctor`: what is wrong here, as lines, JSON or a report to send. The checks themselves are `qrun.doctor`."""

import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from qrun import __version__
from qrun.cli.console import Console
from qrun.cli.interrupt import Abandon
from qrun.cli.options import OUTPUT_PANEL
from qrun.cli.sanitize import one_line
from qrun.doctor_check import Check, failed, public, summary
from qrun.errors import UsageError

WRONG = ("warning", "failure")


def doctor(
    device: Annotated[
        Literal["auto", "cuda", "xpu", "cpu"],
        typer.Option(
            "--device",
            help="Whose kernels to try; auto is an NVIDIA GPU that can be used, else an Intel one, else the CPU.",
        ),
    ] = "auto",
    xpu_tier: Annotated[
        Literal["native", "ipex", "triton", "torch"] | None,
        typer.Option("--xpu-tier", help="On an Intel GPU, whose kernels to try first."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", metavar="N", help="CPU threads; every core when not given.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report",
            metavar="FILE",
            help="Also write it as Markdown that can be sent: no tokens, no paths of yours.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", envvar="QRUN_JSON", help="Print it as one JSON object.", rich_help_panel=OUTPUT_PANEL),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="Print only what is wrong.", rich_help_panel=OUTPUT_PANEL)
    ] = False,
) -> None:
    """Look for what is wrong: machine, environment, versions, devices, and each kernel against plain torch.

    Ends with exit code 1 if anything is wrong; notes and warnings are not. Sends nothing anywhere.

    Example:  qrun doctor --report doctor.md
    """
    if threads is not None and threads < 1:
        raise UsageError(f"--threads {threads} is impossible: give 1 or more")
    if report is not None and (report.is_dir() or not report.absolute().parent.is_dir()):
        raise UsageError(f"--report {report} cannot be written: give a file in a directory that exists")
    console = Console(quiet=quiet)
    checks: list[Check] = []
    for check in _examined(device, threads, xpu_tier, console):
        checks.append(check)
        if not as_json and not quiet:
            console.raw(line(check) + "\n")
    if report is not None:
        _write(report, markdown(checks, Path.home()))
    if as_json:
        found = {"qrun": __version__, "ok": not failed(checks), "checks": [record(check) for check in checks]}
        console.raw(json.dumps(found, ensure_ascii=False) + "\n")
    else:
        console.raw("".join(f"{text}\n" for text in ending(checks, quiet=quiet)))
    if report is not None:
        console.note(f"written to {report}")
    if failed(checks):
        raise typer.Exit(1)


def _examined(device: str, threads: int | None, xpu_tier: str | None, console: Console) -> Iterator[Check]:
    """The checks as they come, with progress on stderr; Ctrl-C ends them, wherever it is caught on the way."""
    from qrun.doctor import examine

    with console.waiting("looking around", bar=True) as waiting:
        coming = examine(
            device, threads=threads, xpu_tier=xpu_tier, progress=waiting.update,
            encoding=sys.stdout.encoding or "unknown",
        )  # fmt: skip
        while True:
            with Abandon():  # once for each check, or one that fails by the interrupt would be followed by the next
                check = next(coming, None)
            if check is None:
                return
            with waiting.aside():
                yield check


def line(check: Check) -> str:
    """One check as one line; what to do is said at once where it is only a note."""
    fix = f" ({check.fix})" if check.fix and check.status not in WRONG else ""
    return f"{check.status:<8} {check.section:<12} {one_line(check.name):<14} {one_line(check.detail + fix)}"


def ending(checks: Iterable[Check], *, quiet: bool = False) -> Iterator[str]:
    """What is wrong and what to do about it, failures last, and the count of everything."""
    checks = list(checks)
    wrong = [check for status in WRONG for check in checks if check.status == status]
    if wrong and not quiet:
        yield ""
    for check in wrong:
        yield one_line(f"{check.status}: {check.section}, {check.name}: {check.detail}")
        if check.fix:
            yield f"  fix: {one_line(check.fix)}"
    if not quiet:
        yield ""
        yield summary(checks)


def record(check: Check) -> dict[str, Any]:
    """A check as JSON has it: what is no number is null."""
    found = dataclasses.asdict(check)
    for run in found["runs"]:
        run.update({name: None for name, value in run.items() if not math.isfinite(value)})
    return found


def markdown(checks: Iterable[Check], home: Path) -> str:
    """A report that can be attached to an issue."""
    checks = [public(check, home) for check in checks]
    lines = [
        f"# qrun {__version__} doctor, {date.today().isoformat()}", "", f"{summary(checks)}", "", "```",
        *map(line, checks), *ending(checks), "```", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _write(path: Path, text: str) -> None:
    """Beside its place first, so that there is a whole report or none."""
    beside = path.with_name(f".{path.name}.partial")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
