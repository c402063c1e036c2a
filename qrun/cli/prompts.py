"""The prompt of a scripted command: standard input, then files, then the argument. Knows streams, no models."""

import os
import select
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

from qrun.cli.console import Console
from qrun.errors import UsageError

PATIENCE = 3.0
"""Seconds to wait for a silent pipe before saying that it is being waited for."""


def stdin_is_piped() -> bool:
    """Return whether standard input is open and no terminal, so that there is something to read."""
    return sys.stdin is not None and not sys.stdin.closed and not sys.stdin.isatty()


def read_stdin(console: Console) -> str:
    """Return all of standard input; says so on stderr if a pipe stays silent.

    Raises:
        UsageError: it is not UTF-8, or closed.
    """
    if sys.stdin is None:
        raise UsageError("the standard input is closed: give the prompt with -p TEXT or -f FILE")
    _mention_silence(console)
    return decode(sys.stdin.buffer.read(), "the standard input")


def _mention_silence(console: Console) -> None:
    try:
        handle = sys.stdin.fileno()
        waits = stat.S_ISFIFO(os.fstat(handle).st_mode) and not select.select([handle], [], [], PATIENCE)[0]
    except (OSError, ValueError):  # a stream without a file behind it
        return
    if waits:
        console.note("reading the prompt from the standard input (give </dev/null to have none)")


def decode(raw: bytes, what: str) -> str:
    """Return `raw` as text, without a byte order mark; `what` names it in the error.

    Raises:
        UsageError: it is not UTF-8.
    """
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{what} is not UTF-8 (byte {error.start}): convert it first, e.g. with iconv") from None


def read_file(path: str) -> str:
    """Return the text of a file.

    Raises:
        UsageError: it cannot be read, or is not UTF-8.
    """
    try:
        return decode(Path(path).expanduser().read_bytes(), path)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from None


def gather(prompt: str | None, files: Sequence[str], console: Console, *, dash: bool = False) -> str:
    """Return the prompt: standard input if it is a pipe or asked for with `-`, then the files, then the argument.

    Raises:
        UsageError: there is no prompt at all, or a part of it cannot be read.
    """
    dash = dash or prompt == "-" or "-" in files
    parts: list[str] = []
    if dash or stdin_is_piped():
        parts.append(read_stdin(console).removesuffix("\n"))
    parts += [read_file(path).removesuffix("\n") for path in files if path != "-"]
    if prompt is not None and prompt != "-":
        parts.append(prompt)
    text = clean("\n\n".join(part for part in parts if part))
    if not text.strip():
        raise UsageError('the prompt is empty: give -p "a question", -f FILE, or pipe text in')
    return text


def clean(text: str) -> str:
    """Return `text` with bytes of another encoding, which Python keeps as surrogates, replaced."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
