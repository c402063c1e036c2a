"""Tells a model's reasoning from its answer while the text streams; knows the tags, not the tokens.

Two manners are understood: ``<think>…</think>answer`` (Qwen3, DeepSeek-R1 and others) and ERNIE-4.5's thinking
variant, ``<think>…</think><response>answer</response>``. Generation may begin inside the reasoning, where the
template has already opened it.
"""

from dataclasses import dataclass
from typing import Literal

OPEN, CLOSE = "<think>", "</think>"
RESPONSE, RESPONSE_END = "<response>", "</response>"

Kind = Literal["reasoning", "answer"]


@dataclass(frozen=True)
class Delta:
    """A piece of a reply, to be shown at once."""

    kind: Kind
    text: str


def opens_inside(prompt: str) -> bool:
    """Whether a rendered prompt ends inside an open ``<think>``."""
    return prompt.rstrip().endswith(OPEN)


class ReasoningSplitter:
    """Text pieces in, deltas out: tags and the blank space around them removed, everything else kept in order.

    A piece that could be the beginning of a tag is held back until it is known.
    """

    def __init__(self, *, enabled: bool = True, inside: bool = False) -> None:
        """enabled: False lets everything through as the answer. inside: the text begins in the reasoning."""
        self._held = ""
        self._state = "thought" if inside else "start"
        if not enabled:
            self._state = "answer"
        self._bare = True  # nothing of the current part was emitted yet, so blank space is left out

    def push(self, text: str) -> list[Delta]:
        """The deltas that became certain with this text."""
        self._held += text
        deltas: list[Delta] = []
        while self._step(deltas):
            pass
        return deltas

    def flush(self) -> list[Delta]:
        """What is left at the end."""
        kind: Kind = "reasoning" if self._state == "thought" else "answer"
        text, self._held = self._held, ""
        if self._state != "answer" and self._state != "start":
            text = text.strip() if self._bare else text.rstrip()
        return [Delta(kind, text)] if text else []

    def _step(self, deltas: list[Delta]) -> bool:
        """Handle one part of what is held; False when more text is needed."""
        match self._state:
            case "start":
                return self._opening({OPEN: "thought", RESPONSE: "response"})
            case "thought":
                return self._closing(CLOSE, "reasoning", "gap", deltas)
            case "gap":
                return self._opening({RESPONSE: "response"})
            case "response":
                return self._closing(RESPONSE_END, "answer", "end", deltas)
            case "end":
                self._held = self._held.lstrip()
                self._state = "answer" if self._held else "end"
                return bool(self._held)
            case _:
                if self._held:
                    deltas.append(Delta("answer", self._held))
                    self._held = ""
                return False

    def _opening(self, tags: dict[str, str]) -> bool:
        """Before a part: a tag opens one of ``tags``, any other text begins the plain answer."""
        text = self._held.lstrip()
        for tag, state in tags.items():
            if text.startswith(tag):
                self._enter(state, text[len(tag) :])
                return True
        if any(tag.startswith(text) for tag in tags):  # so does blank space only
            return False
        self._enter("answer", self._held if self._state == "start" else text)
        return True

    def _closing(self, tag: str, kind: Kind, following: str, deltas: list[Delta]) -> bool:
        """Inside a part: emit up to ``tag``, without the blank space at both ends."""
        if self._bare:
            self._held = self._held.lstrip()
        body, found, rest = self._held.partition(tag)
        if found:
            out = body.rstrip()
        else:
            end = len(body) - partial_suffix(body, (tag,))
            out = body[:end].rstrip()
            rest = body[len(out) :]
        if out:
            deltas.append(Delta(kind, out))
            self._bare = False
        if found:
            self._enter(following, rest)
            return True
        self._held = rest
        return False

    def _enter(self, state: str, held: str) -> None:
        self._state, self._held, self._bare = state, held, True


def partial_suffix(text: str, targets: tuple[str, ...]) -> int:
    """Length of the longest end of ``text`` that begins, but does not complete, one of ``targets``."""
    longest = min(len(text), max((len(target) for target in targets), default=1) - 1)
    for length in range(longest, 0, -1):
        if text.endswith(tuple(target[:length] for target in targets if len(target) > length)):
            return length
    return 0
