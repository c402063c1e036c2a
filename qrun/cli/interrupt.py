"""The keyboard while qrun works: Ctrl-C ends a load, stops a reply, and twice quits; other keys wait. Knows no text."""

import signal
import sys
import termios
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

AGAIN_SECONDS = 0.05
"""After this, an interrupt that a library swallowed is delivered once more."""


class Abandon:
    """While entered, Ctrl-C raises KeyboardInterrupt, also out of libraries that lose it.

    A compiler calls back into Python, where an interrupt is reported and forgotten; what it left half done then fails
    with an error of its own. So a lost interrupt is sent again, and an error after one counts as the interrupt.
    """

    def __init__(self) -> None:
        self._requested = False
        self._again: threading.Timer | None = None
        self._before: Any = None

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._handle), sys.unraisablehook
        sys.unraisablehook = self._lost
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._again is not None:
            self._again.cancel()
        handler, sys.unraisablehook = self._before
        signal.signal(signal.SIGINT, handler)
        if self._requested:
            raise KeyboardInterrupt from None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        raise KeyboardInterrupt

    def _lost(self, lost: "sys.UnraisableHookArgs") -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            self._again = threading.Timer(AGAIN_SECONDS, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
            self._again.start()
        else:
            self._before[1](lost)


class StopOnce:
    """While entered, the first Ctrl-C sets `requested`, so that the reply ends at a token; the second interrupts.

    Attributes:
        requested: Ctrl-C was pressed.
        again: it was pressed a second time.
        reading: nothing has been written yet. A prompt may take long to read and yields nothing meanwhile, so here
            already the first Ctrl-C interrupts; the engine's cache stands that.
    """

    def __init__(self) -> None:
        self.requested = False
        self.again = False
        self.reading = True
        self._before: Any = None

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.again, self.requested = self.requested, True
        if self.again or self.reading:
            raise KeyboardInterrupt


@contextmanager
def unseen_keys() -> Generator[None]:
    """Keep what is typed while the body runs off the screen; it waits for the next prompt."""
    if sys.stdin is None or not sys.stdin.isatty():
        yield
        return
    handle = sys.stdin.fileno()
    before = termios.tcgetattr(handle)
    quiet = termios.tcgetattr(handle)
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(handle, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(handle, termios.TCSANOW, before)
