"""Lines of bytes from a descriptor, as they arrive, none longer than a bound. Knows nothing of what they hold."""

import io
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from qrun.errors import UsageError

LONGEST = 16 * 1024 * 1024
"""Bytes of the longest line that is taken."""

_BLOCK = 1 << 16


@dataclass(frozen=True)
class Line:
    """A line without its end. number: from 1. end: the bytes up to its end. text: None if it was too long to take."""

    number: int
    end: int
    text: bytes | None

    def whole(self) -> bytes:
        """Return the text. UsageError: it was too long to take."""
        if self.text is None:
            raise UsageError(f"the line is longer than {LONGEST >> 20} MiB: send less at once")
        return self.text


class Lines:
    """The lines of a file, or of standard input for ``-``, once; blank ones are left out, a byte order mark too.

    size: the bytes of all, 0 where that is unknown. It reads the descriptor itself: whoever waits here holds no lock
    that Python needs in order to exit.
    """

    def __init__(self, path: str) -> None:
        """UsageError: the file cannot be read."""
        if path == "-" and sys.stdin is None:
            raise UsageError("the standard input is closed: there is nothing to read requests from")
        try:
            place = sys.stdin.fileno() if path == "-" else Path(path).expanduser()
            self._file = io.FileIO(place, closefd=path != "-")
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
        self.size = os.fstat(self._file.fileno()).st_size

    def __iter__(self) -> Iterator[Line]:
        with self._file:
            yield from self._read()

    def _read(self) -> Iterator[Line]:
        held, kept, number, end = bytearray(), True, 0, 0
        while block := cast("bytes", self._file.read(_BLOCK)):
            *ended, rest = block.split(b"\n")
            for piece in ended:
                number, end = number + 1, end + len(piece) + 1
                kept = kept and len(held) + len(piece) <= LONGEST
                yield from _line(number, end, bytes(held + piece) if kept else None)
                held, kept = bytearray(), True
            end += len(rest)
            kept = kept and len(held) + len(rest) <= LONGEST
            held += rest
            if not kept:
                held.clear()
        yield from _line(number + 1, end, bytes(held) if kept else None)


def _line(number: int, end: int, text: bytes | None) -> Iterator[Line]:
    if number == 1 and text is not None:
        text = text.removeprefix(b"\xef\xbb\xbf")
    if text is None or text.strip():
        yield Line(number, end, text)
