"""The keyboard while qrun works: Ctrl-C ends a load, stops a reply, and twice quits; other keys wait. Knows no text."""

import _thread
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, Self

if sys.platform == "win32":
    ENDS = (signal.SIGTERM,)
else:
    import termios

    ENDS = (signal.SIGTERM, signal.SIGHUP)
"""What asks the program to end: another program, and a terminal that closes."""
PASTE_ON, PASTE_OFF = b"\x1b[?2004h", b"\x1b[?2004l"
"""Bracketed paste, which prompt_toolkit has on only while it reads."""
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
            self._again = threading.Timer(AGAIN_SECONDS, _interrupts(threading.get_ident()))
            self._again.start()
        else:
            self._before[1](lost)


def _interrupts(thread: int) -> Callable[[], None]:
    """What sends an interrupt to a thread, on Windows to the main one."""
    if sys.platform == "win32":
        return _thread.interrupt_main
    return lambda: signal.pthread_kill(thread, signal.SIGINT)


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
    """Keep what is typed while the body runs off the screen; it waits, key by key, for the next prompt."""
    if sys.platform == "win32":  # whose console shows nothing that is not read
        yield
        return
    with _mode(lambda given: given & ~termios.ICRNL, lambda given: given & ~(termios.ECHO | termios.ICANON)):
        yield


@contextmanager
def seen_keys() -> Generator[None]:
    """Give the keyboard to another program while the body runs, as a shell would."""
    if sys.platform == "win32":
        yield
        return
    with _mode(lambda given: given | termios.ICRNL, lambda given: given | termios.ECHO | termios.ICANON):
        yield


@contextmanager
def _mode(change_input: Callable[[int], int], change_local: Callable[[int], int]) -> Generator[None]:
    if sys.stdin is None or not sys.stdin.isatty():
        yield
        return
    handle = sys.stdin.fileno()
    before = termios.tcgetattr(handle)
    changed = termios.tcgetattr(handle)
    changed[0], changed[3] = change_input(changed[0]), change_local(changed[3])
    termios.tcsetattr(handle, termios.TCSANOW, changed)
    try:
        yield
    finally:
        with suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(handle, termios.TCSANOW, before)


@contextmanager
def marked_pastes() -> Generator[None]:
    """Let the terminal mark what is pasted while the body runs, so that its line ends will not send it."""
    _tell(PASTE_ON)
    try:
        yield
    finally:
        _tell(PASTE_OFF)


def _tell(sequence: bytes) -> None:
    if sys.stdin is not None and sys.stdin.isatty() and os.environ.get("TERM") != "dumb":
        with suppress(OSError):  # it can only be read, or is gone
            os.write(sys.stdin.fileno(), sequence)


@contextmanager
def ends_in_order() -> Generator[None]:
    """While the body runs, what asks the program to end raises SystemExit with 128 and the signal's number, once."""

    def leave(number: int, frame: FrameType | None) -> None:
        for each in ENDS:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in ENDS}
    for number in ENDS:
        if before[number] is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def unbroken() -> Generator[None]:
    """Let no signal interrupt the body; the first that came meanwhile is delivered after it."""
    came: list[int] = []
    before = {number: signal.signal(number, lambda n, frame: came.append(n)) for number in (signal.SIGINT, *ENDS)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came[:1]:
            signal.raise_signal(number)
