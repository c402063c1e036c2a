"""Conversations as JSON files: ``{"qrun_transcript": 1, "messages": [{"role": …, "content": …}, …], …}``."""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from qrun.errors import QrunError, UsageError
from qrun.template import Message

VERSION = 1
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """A conversation as it is kept.

    first: the oldest turn that was still read, counted without the system prompt. prompt_tokens: the length of the
    prompt of the last reply, which tells prompt and reply apart in a snapshot of the cache; 0 where it is not known.
    about: what the writer adds, such as the model's name; JSON values that nothing was checked of.
    """

    messages: list[Message]
    first: int = 0
    prompt_tokens: int = 0
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])


def write_transcript(path: str | Path, transcript: Transcript) -> None:
    """Write all or nothing. QrunError: the file cannot be written; what was there before is untouched."""
    file = Path(path).expanduser()
    content = {
        "qrun_transcript": VERSION,
        "about": transcript.about,
        "messages": transcript.messages,
        "first": transcript.first,
        "prompt_tokens": transcript.prompt_tokens,
    }
    text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
    beside: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        beside = Path(name)
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        beside.replace(file)
    except BaseException as error:
        if beside is not None:
            beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise QrunError(f"{file}: cannot save the conversation ({error.strerror}); choose another place") from error
        raise


def read_transcript(path: str | Path) -> Transcript:
    """A saved conversation. UsageError: no such file, or it is not a whole transcript."""
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
    about: object = data.get("about", {})
    if not isinstance(about, dict):
        raise UsageError(f"{file}: 'about' is no object; the file is damaged")
    return Transcript(
        messages=[_message(entry, f"{file}: message {n}") for n, entry in enumerate(cast("list[object]", entries), 1)],
        first=_count(data, "first", file),
        prompt_tokens=_count(data, "prompt_tokens", file),
        about=cast("dict[str, Any]", about),
    )


def _count(data: dict[str, Any], name: str, file: Path) -> int:
    value: object = data.get(name, 0)
    if not isinstance(value, int) or value < 0:
        raise UsageError(f"{file}: {name} is {value!r}, no count; the file is damaged")
    return value


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
