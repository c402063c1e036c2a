"""What is written where: the model's text to stdout, everything else to stderr. The one file that imports rich.

Knows streams, colours and tables; not what a model or a command is.
"""

import sys
import threading
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from qrun.cli.sanitize import one_line, printable
from qrun.errors import QrunError

PATIENCE = 0.25
"""Seconds before a spinner appears."""


class Console:
    """The two streams of a command.

    Attributes:
        quiet: only text and errors are written.
        interactive: stdin and one of the outputs are a terminal, so a person can be asked.
    """

    def __init__(self, *, quiet: bool = False, verbose: bool = False) -> None:
        if sys.stdout is None:
            raise QrunError("the standard output is closed: redirect it to a file, or to /dev/null")
        self.quiet = quiet
        self.verbose = verbose
        self._out: TextIO = sys.stdout
        self._rich = RichConsole(file=sys.stderr, highlight=False, markup=False, emoji=False)
        self._at_line_start = True
        self._reasoning_open = False
        stdin_is_terminal = sys.stdin is not None and sys.stdin.isatty()
        self.interactive = stdin_is_terminal and (self._out.isatty() or sys.stderr.isatty())

    def text(self, piece: str) -> None:
        """Write a piece of the model's answer to stdout, at once and without control characters.

        Raises:
            BrokenPipeError: nobody reads any more.
        """
        piece = printable(piece)
        if piece:
            self._end_reasoning()
            self._out.write(piece)
            self._out.flush()
            self._at_line_start = piece.endswith("\n")

    def raw(self, text: str) -> None:
        """Write `text` to stdout as it is: JSON and tables."""
        self._out.write(text)
        self._out.flush()

    def end_text(self) -> None:
        """Finish the line the model left open, so that what follows starts on its own."""
        self._end_reasoning()
        if not self._at_line_start:
            self.text("\n")

    def reasoning(self, piece: str) -> None:
        """Write a piece of the model's reasoning to stderr, dimmed: it is not the answer."""
        if not self.quiet:
            self._rich.print(Text(printable(piece), style="dim italic"), end="", soft_wrap=True)
            self._reasoning_open = True

    def _end_reasoning(self) -> None:
        if self._reasoning_open:
            self._rich.print()
            self._reasoning_open = False

    def note(self, *lines: str, style: str = "dim") -> None:
        """Write lines to stderr, unless quiet."""
        if not self.quiet:
            self.say(*lines, style=style)

    def say(self, *lines: str, style: str = "") -> None:
        """Write lines to stderr, even if quiet: the answer to something a person asked for."""
        for line in lines:
            self._rich.print(Text(printable(line), style=style), soft_wrap=True)

    def titled(self, rows: Iterable[tuple[str, str]]) -> None:
        """Write rows of a dim title and a value to stderr, unless quiet."""
        if not self.quiet:
            for title, value in rows:
                self._rich.print(Text.assemble((f"  {title:<9}", "dim"), printable(value)), soft_wrap=True)

    def heading(self, name: str, rest: str) -> None:
        """Write a bold name and what belongs to it to stderr, unless quiet."""
        if not self.quiet:
            self._rich.print(Text.assemble((printable(name), "bold"), printable(rest)), soft_wrap=True)

    def warn(self, message: str) -> None:
        """Write a warning of one line to stderr, unless quiet."""
        self.note(f"note: {one_line(message)}", style="yellow")

    def error(self, message: str) -> None:
        """Write an error of one line to stderr, always."""
        self._rich.print(Text.assemble(("qrun: ", "bold red"), one_line(message)), soft_wrap=True)

    @contextmanager
    def waiting(self, what: str, *, bar: bool = False) -> Generator["Waiting"]:
        """Show a spinner on stderr while the body runs, if stderr is a terminal; with `bar`, also how far it is."""
        waiting = Waiting(self._rich, what, bar=bar, shown=sys.stderr.isatty() and not self.quiet)
        try:
            yield waiting
        finally:
            waiting.stop()


class Waiting:
    """A spinner that appears once the wait is worth telling of. Nothing at all where there is no terminal."""

    def __init__(self, rich: RichConsole, what: str, *, bar: bool, shown: bool) -> None:
        columns = [BarColumn(bar_width=24), TaskProgressColumn()] if bar else []
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", style="dim", markup=False),
            *columns,
            TimeElapsedColumn(),
            console=rich,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._progress.add_task(printable(what), total=None)
        self._lock = threading.Lock()
        self._shown = False
        self._timer = threading.Timer(PATIENCE, self._show)
        self._timer.daemon = True
        if shown:
            self._timer.start()

    def _show(self) -> None:
        with self._lock:
            if not self._timer.finished.is_set():
                self._shown = True
                self._progress.start()

    def update(self, what: str, done: int, total: int) -> None:
        """Say what is being done, how much of it is, and of how much; `total` 0 when that is unknown."""
        self._progress.update(self._task, description=one_line(what), completed=done, total=total or None)

    @contextmanager
    def aside(self) -> Generator[None]:
        """Remove the spinner while the body writes something, then show it again."""
        with self._lock:
            if self._shown:
                self._progress.stop()
            yield
            if self._shown:
                self._progress.start()

    def stop(self) -> None:
        """Remove the spinner for good; a second call does nothing."""
        with self._lock:
            self._timer.cancel()
            if self._shown:
                self._progress.stop()
            self._shown = False
