"""What is written where: the model's text to stdout, everything else to stderr. The one file that imports rich.

Knows streams, colours and tables; not what a model or a command is.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Literal, TextIO, cast

from rich.box import SIMPLE
from rich.cells import cell_len
from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.rule import Rule as RichRule
from rich.table import Table as RichTable
from rich.text import Text

from qrun.cli.markdown import CodeLine, Hang, MarkdownStream, Piece, Rule, Span, Table
from qrun.cli.sanitize import one_line, printable
from qrun.cli.wrap import Wrapper
from qrun.errors import QrunError

if TYPE_CHECKING:
    from rich.syntax import Syntax

PATIENCE = 0.25
"""Seconds before a spinner appears."""
LOOKS = {
    "strong": "bold",
    "emph": "italic",
    "strike": "strike",
    "code": "cyan",
    "heading": "bold magenta",
    "link": "underline",
    "url": "dim",
    "mark": "dim",
}
"""How markdown's styles look: in the terminal's own colours, so that they suit its background."""
CODE_CONTEXT = 4000
"""Characters of a code block that are looked at again to colour its next line."""


class Console:
    """The two streams of a command.

    Attributes:
        quiet: only text and errors are written.
        interactive: stdin and one of the outputs are a terminal, so a person can be asked.
        renders: stdout is a terminal that can show markdown.
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
        self._page: Page | None = None
        self.renders = self._out.isatty() and os.environ.get("TERM") != "dumb"
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

    def markdown(self, piece: str) -> None:
        """Write a piece of the model's answer to stdout as far as it is certain how it looks; `end_text` ends it."""
        self._end_reasoning()
        self._page = self._page or Page(self._out)
        self._page.write(piece)

    def raw(self, text: str) -> None:
        """Write `text` to stdout as it is: JSON and tables."""
        self._out.write(text)
        self._out.flush()

    def end_text(self) -> None:
        """Finish the line the model left open, so that what follows starts on its own."""
        self._end_reasoning()
        if self._page is not None:
            page, self._page = self._page, None
            page.end()
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
    def waiting(
        self, what: str, *, bar: bool = False, watch: Callable[[], tuple[int, int]] | None = None
    ) -> Generator["Waiting"]:
        """Show a spinner on stderr while the body runs, if stderr is a terminal; with `bar`, also how far it is.

        watch: asked by the spinner itself for the tokens done and their total, (0, 0) while that is unknown.
        """
        waiting = Waiting(self._rich, what, bar=bar, shown=sys.stderr.isatty() and not self.quiet)
        waiting.watch = watch
        try:
            yield waiting
        finally:
            waiting.stop()


class Page:
    """One answer's markdown on a terminal: written once, in the order it comes, never moved or taken back."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._rich = RichConsole(file=out, highlight=False, markup=False, emoji=False)
        self._stream = MarkdownStream()
        self._wrapper = Wrapper(self._width, cell_len)
        self._code: list[str] = []
        self._syntax: Syntax | None = None
        self._ended = True  # the line that was last written to

    def write(self, piece: str) -> None:
        """Show what this piece of the source made certain.

        Raises:
            BrokenPipeError: nobody reads any more.
        """
        for part in self._stream.push(piece):
            self._show(part)
        self._out.flush()

    def end(self) -> None:
        """Show the rest, and end the line."""
        for part in self._stream.flush():
            self._show(part)
        self._spans(self._wrapper.flush())
        if not self._ended:
            self._spans([Span("\n")])
        self._out.flush()

    def _width(self) -> int:
        with suppress(OSError):  # a terminal that does not tell
            return os.get_terminal_size(self._out.fileno()).columns or 80
        return 80

    def _show(self, part: Piece) -> None:
        match part:
            case Span():
                self._spans(self._wrapper.push(part))
            case Hang(text):
                self._wrapper.hang = text
            case CodeLine():
                self._print(self._coloured(part), end="")
                self._ended = False
            case Rule():
                self._print(RichRule(style="dim"), width=self._width())
            case Table():
                self._print(_table(part), width=self._width())

    def _spans(self, spans: Iterable[Span]) -> None:
        for span in spans:
            if span.styles:
                self._print(_text(span), end="")
            else:
                self._out.write(span.text)
            self._ended = span.text.endswith("\n")

    def _print(self, what: "RenderableType", *, end: str = "\n", width: int | None = None) -> None:
        self._rich.print(what, end=end, soft_wrap=width is None, width=width)

    def _coloured(self, line: CodeLine) -> Text:
        """A line of code, coloured as what came before in its block has it."""
        from rich.syntax import Syntax

        if line.first or self._syntax is None:
            self._code = []
            self._syntax = Syntax("", line.language or "text", theme="ansi_dark")
        if sum(map(len, self._code)) > CODE_CONTEXT:
            self._code = []
        self._code.append(line.text)
        coloured = self._syntax.highlight("\n".join(self._code)).split("\n", allow_blank=True)
        found = coloured[len(self._code) - 1]
        return found if found.plain == line.text else Text(line.text)


def _text(span: Span) -> Text:
    return Text(span.text, " ".join(LOOKS[name] for name in span.styles))


def _table(table: Table) -> RichTable:
    """Cells that are too wide break within their columns."""
    shown = RichTable(box=SIMPLE, show_edge=False, pad_edge=False)
    header, *rows = table.rows
    for n, cell in enumerate(header):
        align = table.align[n] if n < len(table.align) else "left"
        justify = cast('Literal["left", "center", "right"]', align)
        shown.add_column(Text.assemble(*map(_text, cell)), justify=justify, overflow="fold")
    for row in rows:
        shown.add_row(*(Text.assemble(*map(_text, cell)) for cell in row))
    return shown


class Watched(Progress):
    """A spinner that looks at the work whenever it is drawn: whoever works has no time to tell."""

    def look(self) -> None:
        """Take note of how far the work is."""

    def get_renderables(self) -> Iterable[RenderableType]:
        self.look()
        return super().get_renderables()


class Waiting:
    """A spinner that appears once the wait is worth telling of. Nothing at all where there is no terminal.

    Attributes:
        watch: what the spinner asks for the tokens done and their total, from a thread of its own.
    """

    def __init__(self, rich: RichConsole, what: str, *, bar: bool, shown: bool) -> None:
        columns = [BarColumn(bar_width=24), TaskProgressColumn()] if bar else []
        self._progress = Watched(
            SpinnerColumn(),
            TextColumn("{task.description}", style="dim", markup=False),
            *columns,
            TimeElapsedColumn(),
            console=rich,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self.watch: Callable[[], tuple[int, int]] | None = None
        self._what = printable(what)
        self._from: tuple[float, int] | None = None
        self._task = self._progress.add_task(self._what, total=None)
        self._progress.look = self._look
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

    def _look(self) -> None:
        """Say `reading, 1024 of 8192 tokens, 512 tok/s, 14 s left`, as far as that is known."""
        done, total = self.watch() if self.watch is not None else (0, 0)
        if done and total:
            now = time.monotonic()
            begun, before = self._from = self._from or (now, done)
            speed = (done - before) / (now - begun) if now > begun else 0.0
            pace = f", {speed:.0f} tok/s, {(total - done) / speed:.0f} s left" if speed else ""
            self._progress.tasks[0].description = f"{self._what}, {done} of {total} tokens{pace}"

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
