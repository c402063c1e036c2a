"""Conversations as JSON files: ``{"qrun_transcript": 1, "messages": [{"role": …, "content": …}, …]}``."""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from qrun.errors import QrunError, UsageError
from qrun.template import Message

VERSION = 1
_ROLES = ("system", "user", "assistant")


def write_transcript(path: str | Path, messages: Sequence[Message]) -> None:
    """Write all or nothing. QrunError: the file cannot be written; what was there before is untouched."""
    file = Path(path).expanduser()
    text = json.dumps({"qrun_transcript": VERSION, "messages": list(messages)}, ensure_ascii=False, indent=1) + "\n"
    beside: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        beside = Path(name)
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        beside.replace(file)
    except OSError as error:
        if beside is not None:
            beside.unlink(missing_ok=True)
        raise QrunError(f"{file}: cannot save the conversation ({error.strerror}); choose another place") from error


def read_transcript(path: str | Path) -> list[Message]:
    """The messages of a saved conversation. UsageError: no such file, or it is not a whole transcript."""
    file = Path(path).expanduser()
    try:
        value: object = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{file}: cannot open the conversation ({error.strerror}); check the path") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file}: not a saved conversation, or damaged ({error}); save it again") from error
    data = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    version = data.get("qrun_transcript")
    if version != VERSION:
        known = f"transcript version {version!r}, this qrun reads {VERSION}" if version else "not a qrun transcript"
        raise UsageError(f"{file}: {known}; only files written by /save can be loaded")
    entries: object = data.get("messages")
    if not isinstance(entries, list):
        raise UsageError(f"{file}: 'messages' is missing; the file is damaged")
    return [_message(entry, f"{file}: message {n}") for n, entry in enumerate(cast("list[object]", entries), 1)]


def _message(entry: object, where: str) -> Message:
    item = cast("dict[str, Any]", entry) if isinstance(entry, dict) else {}
    role, content, reasoning = item.get("role"), item.get("content"), item.get("reasoning_content", "")
    if role not in _ROLES:
        raise UsageError(f"{where}: role is {role!r}, not one of {', '.join(_ROLES)}; the file is damaged")
    if not isinstance(content, str) or not isinstance(reasoning, str):
        raise UsageError(f"{where}: content is no text; the file is damaged")
    message = Message(role=role, content=content)
    if reasoning:
        message["reasoning_content"] = reasoning
    return message
