"""`--prompt-cache`: what the engine has read, kept in a file, so that the next run need not read its beginning again.

Knows when a file is worth reading or writing, not what is in it. It never fails a run that could do without it.
"""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from qrun.cli.console import Console
from qrun.errors import QrunError, UsageError

if TYPE_CHECKING:
    from qrun.engine import Engine
    from qrun.reply import Reply

HEAD = 1 << 20
"""Bytes at a file's beginning in which its kind is named."""


def check(path: str) -> None:
    """Refuse a place where the file cannot be written, or where something else would be lost to it.

    Raises:
        UsageError: the path is no file's or another file's, or its directory is missing or not ours to write.
    """
    file = Path(path).expanduser()
    if file.exists() and not _ours(file):
        raise UsageError(f"--prompt-cache {path} is something else and would be overwritten: give a name of its own")
    if not file.parent.is_dir():
        raise UsageError(f"--prompt-cache {path}: there is no directory {file.parent}: make it first")
    try:
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise UsageError(
            f"--prompt-cache {path}: nothing can be written in {file.parent} ({error.strerror}): choose another place"
        ) from None


def _ours(file: Path) -> bool:
    """Return whether a file is empty or begins as those written here do; a damaged one may be replaced."""
    if not file.is_file():
        return False
    with file.open("rb") as head:
        begin = head.read(HEAD)
    return not begin or b"qrun-kv" in begin


class PromptCache:
    """The file of one run, or none."""

    def __init__(self, path: str | None, engine: "Engine", console: Console) -> None:
        """Let the engine know what the file holds, if it is there and fits; say so on stderr if it does not."""
        self._file = None if path is None else Path(path).expanduser()
        self._engine = engine
        self._console = console
        if self._file is None or not self._file.exists():
            return
        try:
            engine.restore(self._file)
        except QrunError as error:
            console.warn(f"--prompt-cache is not used: {error}")

    def keep(self, reply: "Reply") -> None:
        """Write the file after a reply, once, if the prompt was read and less than half of it had been known."""
        stats = reply.stats
        read, total = reply.progress
        if self._file is None or read < total:
            return
        if 2 * stats.reused_tokens < stats.prompt_tokens:
            try:
                self._engine.snapshot(self._file)
            except QrunError as error:
                self._console.warn(f"--prompt-cache was not written: {error}")
        self._file = None
