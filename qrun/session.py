"""Messages in, text deltas out: template, prefix reuse, overflow policy. Knows text and token ids, no terminal.

The whole conversation is encoded for every turn, and the engine reuses the longest prefix its cache holds. A template
would re-encode the model's answers from text, which need not give the ids the model produced; so a session remembers
those ids and puts them back wherever the rendered text agrees. Then only the new message has to be read.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qrun.errors import ContextOverflowError, UsageError
from qrun.reasoning import CLOSE, OPEN, RESPONSE, RESPONSE_END, ReasoningSplitter, opens_inside
from qrun.reply import Prompt, Reply, TokenEngine, TokenStream
from qrun.template import Message
from qrun.tokenizer import Tokenizer
from qrun.transcript import read_transcript, write_transcript

if TYPE_CHECKING:
    from qrun.sampler import Sampling

OVERFLOW = ("stop", "roll")
_REMEMBERED = 32  # replies whose ids are kept
_CUT = 64  # ids at a reply's end that may be missing in its message (a stop string, an interrupt)


class Session:
    """A conversation with an engine. One reply at a time: beginning the next one ends the one before.

    ``sampling``, ``max_tokens``, ``stop``, ``overflow``, ``thinking`` and ``loop_guard`` may be changed between turns.
    """

    def __init__(
        self,
        engine: TokenEngine,
        *,
        tokenizer: Tokenizer | None = None,
        system: str | None = None,
        sampling: "Sampling | None" = None,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        overflow: str = "stop",
        thinking: bool | None = None,
        loop_guard: bool = True,
    ) -> None:
        """tokenizer: by default the one in the engine's checkpoint. sampling: by default the model's own.

        stop: strings that end an answer; they are not part of it. thinking: passed to templates that know it.
        overflow: when the context is full, "stop" ends the reply, and a prompt that does not fit is an error; "roll"
        forgets the oldest turns, never the system prompt, until half of the context is free, and goes on.
        UsageError, TokenizerError: an argument, or the checkpoint's tokenizer, cannot be used.
        """
        self.engine = engine
        self.tokenizer = tokenizer or Tokenizer.from_dir(engine.source, vocab_size=engine.config.vocab)
        self.sampling = sampling
        self.max_tokens = max_tokens
        self.stop = (stop,) if isinstance(stop, str) else tuple(stop)
        self.overflow = overflow
        self.thinking = thinking
        self.loop_guard = loop_guard
        self._system = system
        self._turns: list[Message] = []
        self._first = 0  # the oldest turn that is still read
        self._spoken: deque[tuple[Prompt, list[int]]] = deque(maxlen=_REMEMBERED)
        self._reply: Reply | None = None
        self._check()

    @property
    def system(self) -> str | None:
        """The system prompt."""
        return self._system

    @property
    def messages(self) -> list[Message]:
        """The conversation so far, system prompt first; also what a rolling context no longer reads."""
        return self._with_system(self._turns)

    def chat(self, text: str) -> Iterator[str]:
        """The answer to a message, in pieces. Errors as ``stream``; closing the iterator keeps what was said."""
        return _answers(self.stream(text))

    def stream(self, text: str) -> Reply:
        """The reply to a message, reasoning and answer told apart.

        Message and answer join the conversation when the reply ends; an interrupted one counts if it said anything.
        UsageError: the message is empty. ContextOverflowError: it does not fit. TemplateError: no usable template.
        """
        self._end_reply()
        if not text.strip():
            raise UsageError("the message is empty: say something")
        return self._answer([*self._turns, Message(role="user", content=text)])

    def complete(self, prompt: str) -> Reply:
        """Continue a text as it is: no template, no part of the conversation. Control strings in it count.

        UsageError: the prompt is empty. ContextOverflowError: it does not fit.
        """
        self._end_reply()
        if not prompt:
            raise UsageError("the prompt is empty: give a text to continue")
        self._check()
        ids = self.tokenizer.encode(prompt)
        self._check_room(len(ids), "the prompt has")
        self._reply = Reply(
            Prompt(prompt, ids),
            start=self._start,
            decoder=self.tokenizer.stream(after=ids),
            splitter=ReasoningSplitter(enabled=False),
            stop=self.stop,
            roll=lambda used: None,
            done=lambda reply: None,
        )
        return self._reply

    def regenerate(self) -> Reply:
        """Answer the last message again; the old answer is kept if the new one says nothing. UsageError: none yet."""
        self._end_reply()
        last = self._last_user(self._turns)
        if last is None:
            raise UsageError("there is no answer to make again yet: say something first")
        return self._answer(self._turns[: last + 1])

    def undo(self) -> str | None:
        """Forget the last message and its answer; returns the message, or None if there was none."""
        self._end_reply()
        last = self._last_user(self._turns)
        if last is None:
            return None
        removed = self._turns[last]["content"]
        self._turns = self._turns[:last]
        return removed

    def clear(self) -> None:
        """Forget the conversation, not the system prompt."""
        self._end_reply()
        self._turns, self._first = [], 0
        self._spoken.clear()

    def set_system(self, text: str | None) -> None:
        """Change the system prompt, None for none; the conversation goes on and is read again."""
        self._end_reply()
        self._system = text or None

    def save(self, path: str | Path) -> None:
        """Write the conversation to a file. QrunError: it cannot be written."""
        self._end_reply()
        write_transcript(path, self.messages)

    def load(self, path: str | Path) -> None:
        """Replace the conversation, system prompt included, by a saved one. UsageError: the file cannot be used."""
        messages = read_transcript(path)
        self.clear()
        system = [m["content"] for m in messages if m["role"] == "system"]
        self._system = "\n".join(system) or None
        self._turns = [m for m in messages if m["role"] != "system"]

    def _check(self) -> None:
        if self.overflow not in OVERFLOW:
            raise UsageError(f"overflow is {self.overflow!r}: it must be one of {', '.join(OVERFLOW)}")
        if "" in self.stop:
            raise UsageError("a stop string is empty: it would end every answer at once; leave it out")

    def _end_reply(self) -> None:
        if self._reply is not None:
            self._reply.close()
            self._reply = None

    def _with_system(self, turns: Sequence[Message]) -> list[Message]:
        system = [Message(role="system", content=self._system)] if self._system else []
        return [*system, *turns]

    @staticmethod
    def _last_user(turns: Sequence[Message]) -> int | None:
        return max((i for i, message in enumerate(turns) if message["role"] == "user"), default=None)

    def _answer(self, turns: list[Message]) -> Reply:
        self._check()
        prompt = self._fit(turns)
        tags = (self.tokenizer.token_id(tag) for tag in (OPEN, CLOSE, RESPONSE, RESPONSE_END))
        self._reply = Reply(
            prompt,
            start=self._start,
            decoder=self.tokenizer.stream(keep=[i for i in tags if i is not None]),
            splitter=ReasoningSplitter(enabled=self.tokenizer.thinks, inside=opens_inside(prompt.text)),
            stop=self.stop,
            roll=lambda used: self._roll_on(turns, used),
            done=lambda reply: self._commit(turns, reply),
        )
        return self._reply

    def _start(self, ids: Sequence[int], used: int) -> TokenStream:
        return self.engine.generate(
            ids,
            max_tokens=None if self.max_tokens is None else self.max_tokens - used,
            sampling=self.sampling,
            stop_ids=self.tokenizer.stop_ids,
            loop_guard=self.loop_guard,
        )

    def _commit(self, turns: list[Message], reply: Reply) -> None:
        if not reply.text and not reply.reasoning and reply.finish_reason in (None, "cancelled"):
            return
        message = Message(role="assistant", content=reply.text)
        if reply.reasoning:
            message["reasoning_content"] = reply.reasoning
        self._turns = [*turns, message]
        self._spoken.append((reply.prompt, reply.ids))

    def _fit(self, turns: list[Message]) -> Prompt:
        """The prompt for these turns, shortened if it must and may be."""
        self._first = min(self._first, self._last_user(turns) or 0)
        prompt = self._prompt(turns)
        if len(prompt.ids) >= self.engine.context and self.overflow == "roll":
            prompt = self._roll(turns, 0) or prompt
        self._check_room(len(prompt.ids), "with this message the conversation has")
        return prompt

    def _check_room(self, length: int, what: str) -> None:
        if length >= self.engine.context:
            roll = "" if self.overflow == "roll" else ", let the oldest turns go with --overflow roll"
            raise ContextOverflowError(
                f"{what} {length} tokens and the context holds {self.engine.context}, an answer included: "
                f"shorten it, start afresh with /clear{roll}, or give a larger context with -c"
            )

    def _roll(self, turns: list[Message], used: int) -> Prompt | None:
        """Forget oldest turns until prompt and ``used`` ids fill half the context, or one turn is left.

        None if there is nothing to forget.
        """
        prompt: Prompt | None = None
        for start in range(self._first + 1, len(turns)):
            if turns[start]["role"] == "user":
                self._first = start
                prompt = self._prompt(turns)
                if len(prompt.ids) + used <= self.engine.context // 2:
                    break
        return prompt

    def _roll_on(self, turns: list[Message], used: int) -> Prompt | None:
        """Within a reply: a prompt that leaves at least a quarter of the context, or None to end the reply."""
        if self.overflow != "roll":
            return None
        prompt = self._roll(turns, used)
        return prompt if prompt is not None and len(prompt.ids) + used <= self.engine.context * 3 // 4 else None

    def _prompt(self, turns: Sequence[Message]) -> Prompt:
        messages = self._with_system(turns[self._first :])
        text = self.tokenizer.render_marked(messages, thinking=self.thinking)
        return Prompt(text, self._encode(text))

    def _encode(self, text: str) -> list[int]:
        """Ids of a rendered conversation, with the ids of the latest reply that it still contains."""
        for prompt, ids in reversed(self._spoken):
            if not text.startswith(prompt.text):
                continue
            for length in range(len(ids), max(0, len(ids) - _CUT), -1):
                said = prompt.text + self.tokenizer.mark(
                    self.tokenizer.text_after(prompt.ids, ids[:length]), "assistant"
                )
                if text.startswith(said):
                    rest = self.tokenizer.encode_marked(text[len(said) :], continues=True)
                    return [*prompt.ids, *ids[:length], *rest]
        return self.tokenizer.encode_marked(text)


def _answers(reply: Reply) -> Iterator[str]:
    try:
        for delta in reply:
            if delta.kind == "answer":
                yield delta.text
    finally:
        reply.close()
