"""`qrun generate --jsonl`: a co-process. Requests come a line each on stdin, events go a line each to stdout.

The protocol, version 1; every event is flushed at once:

    {"event": "ready", "protocol": 1, "model": …, "recipe": …, "context": …}      first of all, once
    {"id": …, "event": "reasoning", "text": …}    a piece of the reasoning ┐ neither comes for
    {"id": …, "event": "delta", "text": …}        a piece of the answer    ┘ "stream": false
    {"id": …, "event": "done", …}                 last of a request: what --json prints
    {"id": …, "event": "error", "code": …, "message": …, "line": …}    instead: the request cannot be answered

Requests are answered in order, one at a time, so that a conversation sent again with its answer and a new message is
only read from there on. {"id": …, "cancel": true} ends a request that is running or still waits; its finish_reason is
"cancelled". So does Ctrl-C with the one that runs, and twice, or between requests, it ends the process with 130. The
end of stdin ends it with 0, once all is answered.
"""

import json
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qrun.cli import report
from qrun.cli.console import Console
from qrun.cli.interrupt import StopOnce
from qrun.cli.lines import LONGEST, Line, Lines
from qrun.cli.prompt_cache import PromptCache
from qrun.cli.requests import Defaults, Fields, decode, error_code, question
from qrun.errors import QrunError, UsageError

if TYPE_CHECKING:
    from qrun.engine import Engine
    from qrun.session import Session

PROTOCOL = 1
MOST_WAITING = 4 * LONGEST
"""Bytes of requests that are read ahead."""


@dataclass
class Job:
    """A line of the input: the fields of its request, or what is wrong with it already."""

    line: int
    size: int
    given: dict[str, Any] = field(default_factory=dict[str, Any])
    error: UsageError | None = None
    cancelled: bool = False

    @property
    def id(self) -> Any:
        """The id its sender gave it, of any kind; None where there is none."""
        return self.given.get("id")

    @property
    def key(self) -> str:
        """The id as something to look it up by."""
        return json.dumps(self.id, sort_keys=True)


def job(line: Line) -> Job:
    """Return the job of a line."""
    size = len(line.text or b"")
    try:
        return Job(line.number, size, decode(line.whole()))
    except UsageError as error:
        return Job(line.number, size, error=error)


class Inbox:
    """What came in on stdin, read by a thread of its own, so that a cancel is noticed while a reply runs."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._open: dict[str, Job] = {}
        self._size = 0
        self._ended = False
        threading.Thread(target=self._read, daemon=True).start()

    def next(self) -> Job | None:
        """Wait for the next job; None once the input has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ended)
            if not self._waiting:
                return None
            found = self._waiting.popleft()
            self._size -= found.size
            self._changed.notify_all()
            return found

    def done(self, job: Job) -> None:
        """Take a job off what can be cancelled."""
        with self._changed:
            if self._open.get(job.key) is job:
                del self._open[job.key]

    def _read(self) -> None:
        try:
            for line in self._lines:
                self._put(job(line))
        except OSError:
            pass  # a terminal that is gone: its end
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _put(self, job: Job) -> None:
        with self._changed:
            if job.error is None and job.given.get("cancel") is True:
                if job.key in self._open:
                    self._open[job.key].cancelled = True
                return
            self._changed.wait_for(lambda: self._size <= MOST_WAITING)
            self._size += job.size
            self._waiting.append(job)
            self._open[job.key] = job
            self._changed.notify_all()


class CoProcess:
    """The answering side: one request after the other, on one engine and its cache."""

    def __init__(
        self, engine: "Engine", session: "Session", console: Console, *, defaults: Defaults, cache: PromptCache
    ) -> None:
        self._engine = engine
        self._session = session
        self._console = console
        self._defaults = defaults
        self._cache = cache

    def run(self, inbox: Inbox) -> None:
        """Answer requests until the input ends.

        Raises:
            KeyboardInterrupt: Ctrl-C between two requests, or twice in one.
            BrokenPipeError: nobody reads any more.
        """
        card = self._engine.card
        about = {"model": card.model, "recipe": card.recipe, "context": self._engine.context}
        self._emit({"event": "ready", "protocol": PROTOCOL, **about})
        while (job := inbox.next()) is not None:
            try:
                self._answer(job)
            except QrunError as error:
                self._emit(
                    {"id": job.id, "event": "error", "code": error_code(error), "message": str(error), "line": job.line}
                )
            inbox.done(job)

    def _answer(self, job: Job) -> None:
        if job.error is not None:
            raise job.error
        fields = Fields(job.given)
        fields.skip("id")
        streams = fields.flag("stream") is not False
        reply = self._session.ask(question(fields, self._session, self._defaults))
        with StopOnce() as interrupt:
            try:
                for delta in () if job.cancelled else reply:
                    interrupt.reading = False
                    if streams:
                        kind = "delta" if delta.kind == "answer" else delta.kind
                        self._emit({"id": job.id, "event": kind, "text": delta.text})
                    if job.cancelled or interrupt.requested:
                        break
            except KeyboardInterrupt:
                pass  # told of below
            finally:
                reply.close()
        self._emit({"id": job.id, "event": "done", **report.report(self._engine.card, [reply])})
        if interrupt.again:
            raise KeyboardInterrupt
        self._cache.keep(reply)

    def _emit(self, event: dict[str, Any]) -> None:
        self._console.raw(report.line(event))
