"""Replies held to a JSON schema or a grammar, by llguidance: which tokens may come next. It knows tokenizers and bits,
no model and no device."""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np

from qrun.errors import QrunError, UsageError
from qrun.reasoning import CLOSE, OPEN

if TYPE_CHECKING:
    from torch import Tensor

    from qrun.sampler import Constraint
    from qrun.tokenizer import Tokenizer

JSON_SPACE: Final = r" ?|\n {0,40}"
"""Between the parts of JSON: nothing, a space, or a line break and an indentation. Endless space is valid JSON too."""


def check_json_schema(schema: str | Mapping[str, Any]) -> str:
    """A JSON schema, as text or as what it says, in llguidance's terms. Needs no tokenizer.

    UsageError: it is no JSON, no schema, or uses what llguidance does not have; or llguidance is not installed.
    """
    value: object = schema
    if isinstance(schema, str):
        try:
            value = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"the JSON schema is not valid JSON ({error}): correct it") from error
    if not isinstance(value, Mapping):
        raise UsageError(f"the JSON schema is {json.dumps(value)[:40]}: it must be an object, as {{}} for any JSON")
    text = json.dumps({"x-guidance": {"whitespace_pattern": JSON_SPACE}, **cast(Mapping[str, Any], value)})
    return _checked(_llguidance().LLMatcher.grammar_from_json_schema(text), "JSON schema")


def check_grammar(text: str) -> str:
    """A grammar in llguidance's variant of Lark's notation, in llguidance's terms. Needs no tokenizer.

    UsageError: it is not a valid one; or llguidance is not installed.
    """
    return _checked(_llguidance().LLMatcher.grammar_from_lark(text), "grammar")


def json_schema(
    tokenizer: "Tokenizer", vocab: int, schema: str | Mapping[str, Any], stop_ids: Collection[int]
) -> "Constraint":
    """Holds one reply to a JSON schema. ``vocab`` is the model's, at least the tokenizer's.

    UsageError as `check_json_schema`.
    """
    return _constraint(tokenizer, vocab, check_json_schema(schema), stop_ids)


def grammar(tokenizer: "Tokenizer", vocab: int, text: str, stop_ids: Collection[int]) -> "Constraint":
    """Holds one reply to a grammar. ``vocab`` is the model's, at least the tokenizer's.

    UsageError as `check_grammar`.
    """
    return _constraint(tokenizer, vocab, check_grammar(text), stop_ids)


def after_reasoning(
    constraint: "Constraint", tokenizer: "Tokenizer", *, vocab: int, stop_ids: Collection[int], inside: bool
) -> "Constraint":
    """The constraint on the answer alone. ``inside``: the reply begins within the reasoning, which its prompt opens.

    A model that may open it by itself may do so first. Reasoning says what it likes, but does not end the reply.
    """
    opening = tokenizer.token_id(OPEN) if tokenizer.thinks else None
    if not inside and opening is None:
        return constraint
    closing = tokenizer.token_id(CLOSE)
    text = tokenizer.stream(keep=[] if closing is None else [closing])
    return AfterReasoning(constraint, text.push, vocab=vocab, stop_ids=stop_ids, opening=None if inside else opening)


class AfterReasoning:
    """A constraint that begins where the text has come to ``</think>``."""

    def __init__(
        self, constraint: "Constraint", text: Callable[[int], str], *, vocab: int, stop_ids: Collection[int],
        opening: int | None,
    ) -> None:  # fmt: skip
        """text: a token id -> the text it adds. opening: the token of ``<think>``, or none where it was opened."""
        import torch

        self._constraint = constraint
        self._text = text
        self._opening = opening
        self._state = "thought" if opening is None else "start"
        self._tail = ""
        self._free = torch.ones(vocab, dtype=torch.bool)
        self._free[list(stop_ids)] = False

    @property
    def complete(self) -> bool:
        return self._state != "thought" and self._constraint.complete

    def allowed(self) -> "Tensor | None":
        if self._state == "thought":
            return self._free
        allowed = self._constraint.allowed()
        if self._state == "start" and allowed is not None and self._opening is not None:
            allowed[self._opening] = True
        return allowed

    def push(self, token: int) -> None:
        if self._state == "start":
            self._state = "thought" if token == self._opening else "answer"
        elif self._state == "thought":
            self._tail = self._tail[-len(CLOSE) :] + self._text(token)
            self._state = "answer" if CLOSE in self._tail else "thought"
            return
        if self._state == "answer":
            self._constraint.push(token)


class _Matched:
    """One reply's place in a grammar."""

    def __init__(self, matcher: Any, vocab: int, stop_ids: Collection[int]) -> None:
        self._matcher = matcher
        self._vocab = vocab
        self._stop_ids = list(stop_ids)

    @property
    def complete(self) -> bool:
        return self._matcher.is_stopped()

    def allowed(self) -> "Tensor":
        import torch

        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        bits = np.unpackbits(words, count=self._vocab, bitorder="little")
        bits[self._stop_ids] = self._matcher.is_accepting()
        if self._matcher.is_error() or not bits.any():
            reason = _line(self._matcher.get_error()) or "no token of this model's goes on from here"
            raise QrunError(f"the reply cannot be held to its grammar any further ({reason}): simplify the grammar")
        return torch.as_tensor(bits).view(torch.bool)

    def push(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            raise QrunError(
                f"the reply has left its grammar at token {token} ({_line(self._matcher.get_error())}): simplify it"
            )


@dataclass(frozen=True)
class _Vocabulary:
    """Whose tokens; equal where the directory and the numbers are."""

    tokenizer: "Tokenizer" = field(compare=False)
    directory: Any
    vocab: int
    stop_ids: frozenset[int]


@lru_cache(maxsize=2)
def _tables(of: _Vocabulary) -> Any:
    """The tokens as llguidance searches them: a second's work for 150,000, done once."""
    try:
        return _llguidance().LLTokenizer(
            of.tokenizer.to_json(), n_vocab=of.vocab, eos_token=min(of.stop_ids, default=None)
        )
    except ValueError as error:
        raise QrunError(
            f"{of.directory}: llguidance cannot use this tokenizer ({_line(str(error))}): do without schema and grammar"
        ) from error


def _constraint(tokenizer: "Tokenizer", vocab: int, checked: str, stop_ids: Collection[int]) -> "Constraint":
    tables = _tables(_Vocabulary(tokenizer, tokenizer.directory, vocab, frozenset(stop_ids)))
    matcher = _llguidance().LLMatcher(tables, checked, log_level=0)
    if matcher.is_error():
        raise UsageError(f"the grammar does not go with this model: {_line(matcher.get_error())}")
    return _Matched(matcher, vocab, stop_ids)


def _checked(text: str, what: str) -> str:
    wrong = _llguidance().LLMatcher.validate_grammar(text)
    if wrong and not wrong.startswith("WARNING"):
        raise UsageError(f"the {what} cannot be used: {_line(wrong)}")
    return text


def _line(message: str) -> str:
    """What a message says before it shows the parser's insides."""
    return " ".join(message.partition("<state>")[0].split())[:300]


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise UsageError(
            'JSON schemas and grammars need llguidance, which is not installed: pip install "qrun-llm[grammar]"'
        ) from None
    return llguidance
