"""A prompt of its own and how to answer it, and the replies to many at once. Knows no conversation and no terminal."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qrun.reasoning import CLOSE, OPEN, RESPONSE, RESPONSE_END, ReasoningSplitter, opens_inside
from qrun.reply import Prompt, Reply, TokenStream

if TYPE_CHECKING:
    from qrun.engine import Engine
    from qrun.sampler import Constraint, Sampling
    from qrun.template import Message
    from qrun.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt and how to answer it: ``messages`` for the chat template or, without them, a ``text`` to continue.

    stop: strings that end an answer; they are not part of it. thinking: passed to templates that know it.
    constraint: what the answer must look like. logprobs: how many of the likeliest tokens to tell at each place.
    """

    messages: Sequence["Message"] = ()
    text: str = ""
    sampling: "Sampling | None" = None
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    thinking: bool | None = None
    loop_guard: bool = True
    constraint: "Constraint | None" = None
    logprobs: int | None = None


@dataclass(frozen=True)
class Prepared:
    """A question whose prompt has been rendered and encoded, and fits the context. Made by ``Session.prepare``."""

    question: Question
    prompt: Prompt
    tokenizer: "Tokenizer"

    def settings(self, used: int = 0) -> dict[str, Any]:
        """What ``TokenEngine.generate`` and a batch's ``Request`` take besides ids, after ``used`` ids of the reply."""
        asked = self.question
        return {
            "max_tokens": None if asked.max_tokens is None else asked.max_tokens - used,
            "sampling": asked.sampling,
            "stop_ids": self.tokenizer.stop_ids,
            "loop_guard": asked.loop_guard,
            "constraint": asked.constraint,
            "logprobs": asked.logprobs,
        }

    def reply(
        self,
        generate: Callable[..., TokenStream],
        *,
        roll: Callable[[int], Prompt | None] = lambda used: None,
        done: Callable[[Reply], None] = lambda reply: None,
    ) -> Reply:
        """The reply that ``generate``, a function like ``TokenEngine.generate``, begins. roll, done: see ``Reply``."""
        tags = (self.tokenizer.token_id(tag) for tag in (OPEN, CLOSE, RESPONSE, RESPONSE_END))
        chat = bool(self.question.messages)
        return Reply(
            self.prompt,
            start=lambda ids, used: generate(ids, **self.settings(used)),
            decoder=self.tokenizer.stream(keep=[i for i in tags if i is not None])
            if chat
            else self.tokenizer.stream(after=self.prompt.ids),
            splitter=ReasoningSplitter(
                enabled=chat and self.tokenizer.thinks, inside=chat and opens_inside(self.prompt.text)
            ),
            stop=self.question.stop,
            text_after=self.tokenizer.text_after,
            roll=roll,
            done=done,
        )


def prepared(question: Question, prompt: Prompt, tokenizer: "Tokenizer", vocab: int) -> Prepared:
    """A question with its prompt; in a chat, its constraint leaves the reasoning alone. vocab: the model's."""
    if question.constraint is not None and question.messages:
        from qrun.grammar import after_reasoning

        held = after_reasoning(
            question.constraint,
            tokenizer,
            vocab=vocab,
            stop_ids=tokenizer.stop_ids,
            inside=opens_inside(prompt.text),
        )
        question = replace(question, constraint=held)
    return Prepared(question, prompt, tokenizer)


def together(engine: "Engine", questions: Iterable[Prepared], width: int | None = None) -> Iterator[Reply]:
    """The replies to questions, in order, computed up to ``width`` at once; questions are taken as there is room."""
    from qrun.batch import Batch, Request

    taken: deque[Prepared] = deque()

    def requests() -> Iterator[Request]:
        for prepared in questions:
            taken.append(prepared)
            yield Request(ids=prepared.prompt.ids, **prepared.settings())

    def begun(stream: TokenStream) -> Callable[..., TokenStream]:
        return lambda *ids, **settings: stream

    for stream in Batch(engine, requests(), width).streams:
        yield taken.popleft().reply(begun(stream))
