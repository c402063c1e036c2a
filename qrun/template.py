"""A checkpoint's chat template: finds it, renders messages with it, refuses what it may not do. Knows no token ids.

Templates are untrusted programs. They run in Jinja's immutable sandbox inside ``template_worker``, a process that is
started at the first rendering, kept for the next ones, and killed when it exceeds a bound.
"""

import json
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from qrun.errors import TemplateError

_MAX_SOURCE = 256 * 1024  # characters; the largest published templates have about 20,000
_MAX_OUTPUT = 16 * 1024 * 1024  # characters
_MAX_MEMORY = 512 * 1024 * 1024  # bytes of address space
_START_SECONDS = 60.0  # starting Python and importing jinja2 from a cold disk

# Around a control string that a message contains, so that it can be told from those the template writes. Two of
# Unicode's noncharacters, which are reserved for such private use and are not text.
MARK_OPEN, MARK_CLOSE = "\ufdd0", "\ufdd1"


class Message(TypedDict):
    """One message of a conversation; ``role`` is "system", "user" or "assistant"."""

    role: str
    content: str
    reasoning_content: NotRequired[str]


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the special tokens it may print.

    source: Jinja text. name: the file it came from, for messages. variables: ``bos_token`` and the like.
    seconds: what a rendering may take.
    """

    source: str
    name: str
    variables: Mapping[str, str] = field(default_factory=dict[str, str])
    seconds: float = 5.0
    _worker: "_Worker" = field(default_factory=lambda: _Worker(), repr=False, compare=False)

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, thinking: bool | None = None
    ) -> str:
        """The conversation as one text, equal to transformers' ``apply_chat_template(tokenize=False)``.

        thinking: passed to the template as ``enable_thinking``; None leaves it undefined. TemplateError: the template
        fails, or exceeds a bound on time, memory or output; the conversation's roles may be what it objects to.
        """
        variables: dict[str, Any] = {
            **self.variables,
            "messages": list(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        if thinking is not None:
            variables["enable_thinking"] = thinking
        request = {"source": self.source, "variables": variables, "output": _MAX_OUTPUT, "seconds": self.seconds}
        answer = self._worker.ask(request, self.name)
        if answer is None:
            raise TemplateError(
                f"{self.name}: the chat template took more than {self.seconds:g} s or too much memory and was stopped; "
                "it may be hostile: compare it with the model's published one"
            )
        if "refused" in answer:
            raise TemplateError(
                f"{self.name}: the chat template refuses this conversation: {answer['refused']}; "
                "a system prompt, or the order of the roles, may be what it does not take"
            )
        if "error" in answer:
            raise TemplateError(
                f"{self.name}: the chat template failed: {answer['error']}; compare it with the model's published one"
            )
        return answer["text"]


def find_template(directory: Path, tokenizer_config: Mapping[str, Any], variables: Mapping[str, str]) -> ChatTemplate:
    """The chat template of a checkpoint directory: chat_template.jinja, chat_template.json, tokenizer_config.json.

    TemplateError: there is none, it is too large, or it cannot be read.
    """
    file = directory / "chat_template.jinja"
    if file.is_file():
        return _checked(_read(file), file, variables)
    file = directory / "chat_template.json"
    if file.is_file():
        try:
            held: object = json.loads(_read(file))
        except ValueError as error:
            raise TemplateError(f"{file}: not valid JSON ({error}); fetch the file again") from error
        value = cast("dict[str, Any]", held).get("chat_template") if isinstance(held, dict) else None
        return _checked(_choose(value, file), file, variables)
    file = directory / "tokenizer_config.json"
    value = tokenizer_config.get("chat_template")
    if value is None:
        raise TemplateError(
            f"{directory}: no chat template, so this is probably a base model that cannot chat; "
            "complete plain text with `qrun generate --raw` (in Python: Session.complete), or use its chat variant"
        )
    return _checked(_choose(value, file), file, variables)


def mark(text: str, control: Collection[str]) -> str:
    """``text`` with every control string in it wrapped in marks; marks already there are dropped."""
    plain = without_marks(text)
    if not any(string in plain for string in control):
        return plain
    return _pattern(control).sub(f"{MARK_OPEN}\\g<0>{MARK_CLOSE}", plain)


def without_marks(text: str) -> str:
    """A text as the model reads it."""
    return text.replace(MARK_OPEN, "").replace(MARK_CLOSE, "")


def split_marked(text: str, control: Collection[str]) -> list[tuple[str, bool]]:
    """The pieces of a rendered text, each with whether it is a control string that a message spelled out.

    A lone mark (the template cut the string in two) ends a piece too, so that its halves cannot join.
    """
    if MARK_OPEN not in text and MARK_CLOSE not in text:
        return [(text, False)]
    marked = re.compile(f"{MARK_OPEN}({_pattern(control).pattern}){MARK_CLOSE}|[{MARK_OPEN}{MARK_CLOSE}]")
    pieces: list[tuple[str, bool]] = []
    for index, piece in enumerate(marked.split(text)):
        if piece:
            pieces.append((piece, index % 2 == 1))
    return pieces


def _pattern(control: Collection[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(string) for string in sorted(control, key=len, reverse=True)))


def _read(file: Path) -> str:
    try:
        if file.stat().st_size > 4 * _MAX_SOURCE:
            raise TemplateError(f"{file}: larger than any chat template should be; refused")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"{file}: cannot be read ({error}); fetch the file again") from error


def _choose(value: object, file: Path) -> str:
    """One template of a field that is a text, a list of {name, template}, or a dictionary by name."""
    if isinstance(value, str):
        return value
    named: dict[str, str] = {}
    if isinstance(value, list):
        for entry in cast("list[Any]", value):
            if isinstance(entry, dict):
                item = cast("dict[str, Any]", entry)
                named[str(item.get("name"))] = str(item.get("template"))
    elif isinstance(value, dict):
        named = {str(name): str(text) for name, text in cast("dict[Any, Any]", value).items()}
    if "default" in named:
        return named["default"]
    if len(named) == 1:
        return next(iter(named.values()))
    raise TemplateError(
        f"{file}: chat_template holds no template named 'default' (it has {', '.join(sorted(named)) or 'none'}); "
        "write the one to use to chat_template.jinja beside it"
    )


def _checked(source: str, file: Path, variables: Mapping[str, str]) -> ChatTemplate:
    if len(source) > _MAX_SOURCE:
        raise TemplateError(f"{file}: the chat template has {len(source)} characters, more than {_MAX_SOURCE}; refused")
    return ChatTemplate(source, str(file), variables)


class _Worker:
    """The rendering process: started when needed, replaced when it died, ended with its owner."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def ask(self, request: dict[str, Any], name: str) -> dict[str, str] | None:
        """The answer to a request, or None if the worker exceeded a bound and is gone."""
        with self._lock:
            answer = None
            try:
                process = self._process or self._start(name)
                answer = _exchange(process, request, 2 * request["seconds"])
            finally:
                if answer is None:
                    self._stop()  # dead, or interrupted, which leaves an answer in the pipe
            return answer

    def _start(self, name: str) -> "subprocess.Popen[str]":
        script = Path(__file__).with_name("template_worker.py")
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C in the terminal is ours, not its
            )
        except OSError as error:
            raise TemplateError(f"{name}: cannot start Python to render the chat template ({error})") from error
        self._process = process
        weakref.finalize(self, _end, process)
        if _exchange(process, {"path": sys.path, "memory": _MAX_MEMORY}, _START_SECONDS) is None:
            raise TemplateError(f"{name}: the process that renders chat templates does not start; reinstall jinja2")
        return process

    def _stop(self) -> None:
        if self._process is not None:
            _end(self._process)
            self._process = None


def _exchange(process: "subprocess.Popen[str]", request: dict[str, Any], seconds: float) -> dict[str, str] | None:
    """One exchange; None if the process died or had to be killed."""
    assert process.stdin is not None and process.stdout is not None
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except BrokenPipeError:
        return None
    finally:
        timer.cancel()
    return json.loads(line) if line else None


def _end(process: "subprocess.Popen[str]") -> None:
    """Kill, reap, and close the pipes. Safe to call twice."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except OSError:  # unsent bytes for a process that is gone
                continue
