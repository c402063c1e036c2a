"""A request as a JSON object: which fields there are, and what they may be. Knows neither streams nor a terminal."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

from qrun.cli.structure import Structure
from qrun.errors import ContextOverflowError, DoesNotFitError, QrunError, UsageError
from qrun.template import Message

if TYPE_CHECKING:
    from qrun.question import Question
    from qrun.session import Session

ROLES = ("system", "user", "assistant")
SAMPLING = ("temperature", "top_p", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a request leaves out, besides the session's settings: the command's own options."""

    raw: bool = False
    structure: Structure | None = None
    logprobs: int | None = None


def error_code(error: QrunError) -> str:
    """Return a word for a program to branch on; the message is for people."""
    match error:
        case ContextOverflowError():
            return "too_long"
        case DoesNotFitError():
            return "out_of_memory"
        case UsageError():
            return "bad_request"
        case _:
            return "failed"


def text_of(raw: bytes) -> str:
    """Return a line as text. UsageError: it is not UTF-8."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"the request is not UTF-8 (byte {error.start})") from None


def decode(raw: bytes) -> dict[str, Any]:
    """Return the object on a line.

    Raises:
        UsageError: it is not UTF-8, not JSON, or no object.
    """
    try:
        value: object = json.loads(text_of(raw))
    except (ValueError, RecursionError) as error:
        raise UsageError(f'the request is not JSON ({error}): write it like {{"id": 1, "prompt": "Hello"}}') from None
    if not isinstance(value, dict):
        raise UsageError('the request is no JSON object: write it like {"id": 1, "prompt": "Hello"}')
    return cast("dict[str, Any]", value)


class Fields:
    """The fields of a request, taken one by one; null counts as left out."""

    def __init__(self, given: Mapping[str, Any], where: str = "") -> None:
        self._left = {name: value for name, value in given.items() if value is not None}
        self._where = where
        self._known: list[str] = []

    def take(self, name: str, read: Callable[[Any], T | None], want: str) -> T | None:
        """Return a field as `read` makes it, None where it was left out; `read` returns None for what it refuses.

        Raises:
            UsageError: `read` refuses it; it must be what `want` says.
        """
        self._known.append(name)
        if name not in self._left:
            return None
        value = self._left.pop(name)
        found = read(value)
        if found is None:
            shown = json.dumps(value, ensure_ascii=False)
            raise UsageError(f"{self._where}{name} is {shown[:60]}{'…' * (len(shown) > 60)}: it must be {want}")
        return found

    def skip(self, name: str) -> Any:
        """Return a field, whatever it holds."""
        self._known.append(name)
        return self._left.pop(name, None)

    def text(self, name: str) -> str | None:
        """Return a text."""
        return self.take(name, _text, "a text")

    def flag(self, name: str) -> bool | None:
        """Return a truth value."""
        return self.take(name, lambda value: value if isinstance(value, bool) else None, "true or false")

    def whole(self, name: str, least: int = 0) -> int | None:
        """Return a whole number, `least` or more."""
        return self.take(
            name, lambda value: value if _is_int(value) and value >= least else None, f"a whole number from {least} on"
        )

    def number(self, name: str) -> float | None:
        """Return a number."""
        return self.take(name, lambda value: value if _is_int(value) or isinstance(value, float) else None, "a number")

    def end(self) -> None:
        """Raise UsageError if there are fields that nobody took."""
        if self._left:
            unknown = ", ".join(self._left)
            raise UsageError(f"{self._where}{unknown}: no such field; there are {', '.join(self._known)}")


def question(fields: Fields, session: "Session", defaults: Defaults) -> "Question":
    """Return what a request asks; its own fields come before the command's options.

    Raises:
        UsageError: a field is unknown, missing, impossible, or contradicts another.
    """
    from qrun.logprobs import check_count

    prompt, system, raw = fields.text("prompt"), fields.text("system"), fields.flag("raw")
    messages = fields.take("messages", _list, "a list of messages")
    given: dict[str, Any] = {
        "max_tokens": fields.whole("max_tokens", 1),
        "stop": fields.take("stop", _texts, "a text, or a list of texts, none of them empty"),
        "thinking": fields.flag("think"),
        "loop_guard": fields.flag("loop_guard"),
        "logprobs": fields.whole("logprobs"),
    }
    chosen = {name: fields.number(name) for name in SAMPLING} | {n: fields.whole(n) for n in ("top_k", "seed")}
    structures = [
        fields.take("json_schema", Structure.of_schema, "a JSON schema, as an object or as text"),
        fields.take("grammar", Structure.of_grammar, "a grammar in Lark's notation"),
    ]
    fields.end()
    if (prompt is None) == (messages is None):
        raise UsageError("the request has no prompt: give prompt or messages, and not both of them")
    if None not in structures:
        raise UsageError("json_schema and grammar contradict each other: give one of them")
    structure = next(filter(None, structures), defaults.structure)
    settings = {name: value for name, value in given.items() if value is not None}
    if defaults.logprobs is not None:
        settings.setdefault("logprobs", defaults.logprobs)
    if "logprobs" in settings:
        check_count(settings["logprobs"])
    if session.sampling is not None:
        settings["sampling"] = dataclasses.replace(
            session.sampling, **{name: value for name, value in chosen.items() if value is not None}
        )
    if structure is not None:
        settings["constraint"] = structure.constraint(session)
    raw = defaults.raw and messages is None if raw is None else raw
    if raw and (messages is not None or system is not None):
        raise UsageError(
            f"{'system' if messages is None else 'messages'} and raw contradict each other: raw is only text"
        )
    if raw:
        return session.question(prompt or "", raw=True, **settings)
    turns = [_message(entry, n) for n, entry in enumerate(messages or (), 1)]
    turns = turns or [Message(role="user", content=prompt or "")]
    if turns[-1]["role"] != "user":
        raise UsageError(f"the last message is the {turns[-1]['role']}'s: end with the one to answer, the user's")
    if system is not None:
        if any(turn["role"] == "system" for turn in turns):
            raise UsageError("system and a system message contradict each other: give one of them")
        turns.insert(0, Message(role="system", content=system))
    return session.question(turns, **settings)


def _message(entry: object, number: int) -> Message:
    where = f"message {number}: "
    if not isinstance(entry, dict):
        raise UsageError(f'{where}it is no object: write it like {{"role": "user", "content": "Hello"}}')
    fields = Fields(cast("dict[str, Any]", entry), where)
    role = fields.take("role", lambda value: value if value in ROLES else None, f"one of {', '.join(ROLES)}")
    content, reasoning = fields.text("content"), fields.text("reasoning_content")
    fields.end()
    if role is None or content is None:
        raise UsageError(f"{where}{'role' if role is None else 'content'} is missing")
    message = Message(role=role, content=content)
    if reasoning:
        message["reasoning_content"] = reasoning
    return message


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _list(value: object) -> list[object] | None:
    return cast("list[object]", value) if isinstance(value, list) and value else None


def _texts(value: object) -> tuple[str, ...] | None:
    texts = [value] if isinstance(value, str) else _list(value)
    return tuple(map(str, texts)) if texts and all(isinstance(text, str) and text for text in texts) else None
