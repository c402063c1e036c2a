"""`qrun generate --batch`: a file of prompts run together, an answer a line on stdout. Knows lines, not how they run.

Answers come in the order of the lines, each with its line's number and the id its sender gave it. What cannot be
answered has an `error` in place of an answer. Blank lines are skipped. The file is read as there is room for more, so
it may be of any length; and what is on stdout is whole at any time, so that an interrupted run goes on with the line
after the last one answered: `tail -n +LINE FILE | qrun generate --batch -`.
"""

import itertools
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qrun.cli import report
from qrun.cli.console import Console
from qrun.cli.interrupt import StopOnce
from qrun.cli.lines import Line, Lines
from qrun.cli.requests import Defaults, Fields, decode, error_code, question, text_of
from qrun.errors import QrunError, UsageError

if TYPE_CHECKING:
    from qrun.engine import Engine
    from qrun.question import Prepared
    from qrun.reply import Reply
    from qrun.session import Session


@dataclass(frozen=True)
class Place:
    """Where an answer belongs: its line, the bytes up to the line's end, and the id its sender gave it."""

    line: int
    end: int
    id: Any = None


class BatchRun:
    """One run over a file, or standard input."""

    def __init__(
        self, engine: "Engine", session: "Session", console: Console, *, defaults: Defaults, width: int | None
    ) -> None:
        self._engine = engine
        self._session = session
        self._console = console
        self._defaults = defaults
        self._width = width
        self._open: deque[tuple[Place, QrunError | None]] = deque()
        self._answered = self._failed = self._tokens = 0
        self._told = 0  # the last line that was answered
        self._interrupt = StopOnce()

    def run(self, path: str, lines: Lines) -> None:
        """Answer every line.

        Raises:
            KeyboardInterrupt: Ctrl-C; the answers written are whole.
            QrunError: some requests failed; all others are answered.
        """
        from qrun.question import together

        begun = time.monotonic()
        try:
            with self._interrupt, self._console.waiting("reading", bar=True) as waiting:
                for reply in together(self._engine, self._prepared(path, lines), self._width):
                    self._tell_errors()
                    for _ in reply:
                        pass
                    place, _ = self._open.popleft()
                    self._tell(place, reply)
                    speed = self._tokens / (time.monotonic() - begun)
                    waiting.update(f"{self._answered} answered, {speed:.0f} tok/s", place.end, lines.size)
                self._tell_errors()
        except KeyboardInterrupt:
            self._console.note(f"stopped after line {self._told}: `tail -n +{self._told + 1}` gives the rest")
            raise
        seconds = time.monotonic() - begun
        self._console.note(
            f"{self._answered} answered · {self._tokens} tokens in {seconds:.1f} s, {self._tokens / seconds:.1f} tok/s"
        )
        if self._failed:
            every = self._answered + self._failed
            raise QrunError(f"{self._failed} of {every} requests failed: their lines say why")

    def _prepared(self, path: str, lines: Lines) -> "Iterator[Prepared]":
        """The questions of the lines, each with its place noted; what is wrong with the others is told in its turn."""
        every = iter(lines)
        first = next(every, None)
        if first is None:
            raise UsageError(f"--batch {path} has no lines: give a prompt, or a request object, a line")
        objects = path.endswith(".jsonl") or (first.text or b"").startswith(b"{")
        for line in itertools.chain([first], every):
            place = Place(line.number, line.end)
            try:
                fields = self._fields(line, objects)
                place = Place(line.number, line.end, fields.skip("id"))
                prepared = self._session.prepare(question(fields, self._session, self._defaults))
            except QrunError as error:
                self._open.append((place, error))
                if len(self._open) == 1:
                    self._tell_errors()
                continue
            self._open.append((place, None))
            yield prepared

    def _fields(self, line: Line, objects: bool) -> Fields:
        raw = line.whole()
        return Fields(decode(raw)) if objects else Fields({"prompt": text_of(raw)})

    def _tell_errors(self) -> None:
        """Write the errors that come before the next answer."""
        while self._open and (error := self._open[0][1]) is not None:
            place, _ = self._open.popleft()
            self._failed += 1
            told = {"code": error_code(error), "message": str(error)}
            self._write(place, {"error": told})

    def _tell(self, place: Place, reply: "Reply") -> None:
        self._answered += 1
        self._tokens += reply.stats.new_tokens
        self._write(place, report.report(self._engine.card, [reply]))

    def _write(self, place: Place, what: dict[str, Any]) -> None:
        """Write a line, which a first Ctrl-C does not cut."""
        self._interrupt.reading = False
        self._console.raw(report.line({"line": place.line, "id": place.id, **what}))
        self._told = place.line
        self._interrupt.reading = True
        if self._interrupt.requested:
            raise KeyboardInterrupt
