"""The chats that keep themselves: a folder of transcripts, one a chat. Knows files and options, no model, no terminal.

A chat's file is locked while the chat lasts, so two at once never write to the same one.
"""

import dataclasses
import difflib
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrun import locks
from qrun.cli.options import SUGAR, ModelOptions
from qrun.errors import QrunError, UsageError
from qrun.paths import state_dir
from qrun.transcript import Transcript, read_transcript

if TYPE_CHECKING:
    from qrun.session import Session

KEPT = 50
"""Chats that are kept; a new one takes the oldest one's place."""
KEPT_SNAPSHOTS = 5
"""Of these, the ones whose snapshot of the cache is kept: it may have gigabytes."""


def folder() -> Path:
    """Where the chats are."""
    return state_dir() / "chats"


def snapshot_of(path: Path) -> Path:
    """Return where the cache of a saved conversation is kept, if it is."""
    return path.with_name(f"{path.name}.kv")


def saved() -> list[Path]:
    """Return the kept chats, the latest first."""
    return sorted(folder().glob("*.json"), key=_spoken_in, reverse=True)


def _spoken_in(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # another chat has just removed it
        return 0.0


def latest() -> Path:
    """Return the chat that was last spoken in.

    Raises:
        UsageError: there is none.
    """
    for path in saved():
        return path
    raise UsageError("there is no chat to continue yet: begin one with qrun chat")


def find(name: str) -> Path:
    """Return a kept chat by its name, or the file that `/save` has written.

    Raises:
        UsageError: there is none.
    """
    kept, file = folder() / f"{name}.json", Path(name).expanduser()
    for path in (file,) if "/" in name else (kept, file):
        if path.is_file():
            return path
    near = difflib.get_close_matches(name, [path.stem for path in saved()], 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UsageError(f"there is no saved chat {name!r}: {hint}qrun chat --sessions lists them")


def described(limit: int = 10) -> Iterator[str]:
    """Yield a line on each of the latest chats: name, model, number of messages, the first words."""
    for path in saved()[:limit]:
        try:
            transcript = read_transcript(path)
        except UsageError:
            yield f"{path.stem}  damaged"
            continue
        asked = [message["content"] for message in transcript.messages if message["role"] == "user"]
        first = " ".join(asked[0].split()) if asked else ""
        yield f"{path.stem}  {transcript.about.get('model', '?')}, {len(transcript.messages)} messages: {first[:60]}"


def resumed(options: ModelOptions, transcript: Transcript, typed: Collection[str]) -> ModelOptions:
    """Return the options of the chat that goes on: its own, except for what was typed this time.

    Raises:
        UsageError: what the file says of them is no text.
    """
    about = transcript.about
    values: dict[str, Any] = {name: about[name] for name in ("model", "quant", "kv", "ctx_size") if about.get(name)}
    for name, value in values.items():
        if not isinstance(value, str):
            raise UsageError(f"the saved chat's {name} is {value!r}, no text: its file is damaged")
    if "quant" in values:
        if not {"quant", *SUGAR}.isdisjoint(typed):
            del values["quant"]
        else:
            values |= dict.fromkeys(SUGAR, False)
    return dataclasses.replace(options, **{name: value for name, value in values.items() if name not in typed})


def about(options: ModelOptions) -> dict[str, Any]:
    """Return what `resumed` needs to know: the options as typed, a directory by its whole path."""
    place = Path(options.model).expanduser()
    return {
        "model": str(place.resolve()) if place.is_dir() else options.model,
        "quant": options.precision(),
        "kv": options.kv,
        "ctx_size": options.ctx_size,
    }


class ChatFile:
    """Where one chat is kept; nothing is written before something was said.

    Attributes:
        path: the file, or none yet.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self._lock: int | None = None

    def resume(self, path: Path) -> bool:
        """Go on with a kept chat. False if it is open elsewhere, cannot be locked, or is no kept one."""
        if path.parent == folder():
            with suppress(OSError):
                self._lock = locks.take(_lock_of(path.stem))
                self.path = path if self._lock is not None else None
        return self.path is not None

    def save(self, session: "Session", about: Mapping[str, Any]) -> None:
        """Write the conversation; one without messages leaves no file.

        Raises:
            QrunError: it cannot be written.
        """
        try:
            if not any(message["role"] == "user" for message in session.messages):
                self.remove()
                return
            path = self.path or self._begin()
        except OSError as error:
            raise QrunError(f"{folder()}: cannot keep the chat ({error.strerror})") from error
        session.save(path, about=about)

    def leave(self) -> None:
        """Begin another file with the next message, and let others have this one."""
        if self._lock is not None and self.path is not None:
            locks.let_go(_lock_of(self.path.stem), self._lock)
        self.path = self._lock = None

    def remove(self) -> None:
        """Delete what was kept of this chat."""
        if self.path is not None:
            _delete(self.path)

    def _begin(self) -> Path:
        folder().mkdir(parents=True, exist_ok=True, mode=0o700)
        now, count = f"{datetime.now():%Y%m%d-%H%M}", 1
        name = now
        while (folder() / f"{name}.json").exists() or (lock := locks.take(_lock_of(name))) is None:
            count += 1
            name = f"{now}-{count}"
        self._lock, self.path = lock, folder() / f"{name}.json"
        _prune(KEPT - 1)
        return self.path


def _delete(path: Path) -> None:
    path.unlink(missing_ok=True)
    snapshot_of(path).unlink(missing_ok=True)


def _prune(keep: int) -> None:
    """Delete the oldest chats but `keep`, though never one that is open, or that cannot be read."""
    chats = saved()
    for path in chats[KEPT_SNAPSHOTS:]:
        snapshot_of(path).unlink(missing_ok=True)
    for path in chats[keep:]:
        lock = locks.take(_lock_of(path.stem))
        if lock is None:
            continue
        try:
            read_transcript(path)
            _delete(path)
        except UsageError:
            continue
        finally:
            locks.let_go(_lock_of(path.stem), lock)


def _lock_of(name: str) -> Path:
    return folder() / f".{name}.lock"
