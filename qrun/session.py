"""Messages in, text deltas out: template, prefix reuse, overflow policy. Knows text and token ids, no terminal.

The whole conversation is encoded for every turn, with the ids that earlier answers really had, and the engine reuses
the longest prefix its cache holds. Then only the new message has to be read.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qrun.errors import ContextOverflowError, UsageError
from qrun.gguf_tokenizer import open_tokenizer
from qrun.question import Prepared, Question, prepared, together
from qrun.recall import Recall
from qrun.reply import Prompt, Reply, TokenEngine
from qrun.template import Message, without_marks
from qrun.tokenizer import Tokenizer
from qrun.transcript import Transcript, read_transcript, write_transcript

if TYPE_CHECKING:
    from qrun.engine import Engine
    from qrun.sampler import Constraint, Sampling

OVERFLOW = ("stop", "roll")


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
        self.tokenizer = tokenizer or open_tokenizer(engine.source, vocab_size=engine.config.vocab)
        self.sampling = sampling
        self.max_tokens = max_tokens
        self.stop = (stop,) if isinstance(stop, str) else tuple(stop)
        self.overflow = overflow
        self.thinking = thinking
        self.loop_guard = loop_guard
        self._system = system
        self._turns: list[Message] = []
        self._first = 0  # the oldest turn that is still read
        self._prompt_tokens = 0  # of the last reply's prompt
        self._recall = Recall(self.tokenizer)
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

    def stream(self, text: str, *, constraint: "Constraint | None" = None, logprobs: int | None = None) -> Reply:
        """The reply to a message, reasoning and answer told apart.

        constraint: what the answer is held to, not the reasoning before it. logprobs: fills ``Reply.logprobs``, with so
        many alternatives a token. Message and answer join the conversation when the reply ends; an interrupted one
        counts if it said anything.
        UsageError: the message is empty. ContextOverflowError: it does not fit. TemplateError: no usable template.
        """
        self._end_reply()
        if not text.strip():
            raise UsageError("the message is empty: say something")
        return self._answer([*self._turns, Message(role="user", content=text)], constraint, logprobs)

    def complete(self, prompt: str, *, constraint: "Constraint | None" = None, logprobs: int | None = None) -> Reply:
        """Continue a text as it is: no template, no part of the conversation. Control strings in it count.

        UsageError: the prompt is empty. ContextOverflowError: it does not fit.
        """
        return self.ask(self.question(prompt, raw=True, constraint=constraint, logprobs=logprobs))

    def question(self, said: str | Sequence[Message], *, raw: bool = False, **more: Any) -> Question:
        """A prompt of its own with the session's settings: a message, or a conversation that ends with one.

        The system prompt comes first, unless there is another. raw: continue the text as it is. more: fields of
        ``Question``.
        """
        settings = self._settings() | more
        if raw:
            return Question(text=str(said), **settings)
        turns = [Message(role="user", content=said)] if isinstance(said, str) else list(said)
        has_system = any(turn["role"] == "system" for turn in turns)
        return Question(messages=turns if has_system else self._with_system(turns), **settings)

    def prepare(self, question: Question) -> Prepared:
        """A question ready to be asked.

        UsageError: it is empty. ContextOverflowError: it does not fit. TemplateError: no usable template.
        """
        self._check()
        chat = bool(question.messages)
        if not (question.messages[-1]["content"].strip() if chat else question.text):
            raise UsageError("the prompt is empty: give a text to answer or to continue")
        if chat:
            prompt = self._prompt(question.messages, question.thinking)
        else:
            prompt = Prompt(question.text, self.tokenizer.encode(question.text))
        self._check_room(len(prompt.ids), "the prompt has")
        return prepared(question, prompt, self.tokenizer, self.engine.config.vocab)

    def ask(self, question: Question) -> Reply:
        """The reply to a prompt of its own; the conversation is not told. Errors as ``prepare``."""
        self._end_reply()
        self._reply = self.prepare(question).reply(
            self.engine.generate,
            done=lambda reply: self._recall.remember(reply.prompt, reply.ids) if question.messages else None,
        )
        return self._reply

    def together(self, texts: Iterable[str], *, width: int | None = None) -> Iterator[Reply]:
        """The replies to texts that know nothing of each other or the conversation, in order, ``width`` at once.

        A reply whose context is full ends. Errors as ``prepare``.
        """
        self._end_reply()
        return together(cast("Engine", self.engine), (self.prepare(self.question(text)) for text in texts), width)

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
        self._turns, self._first, self._prompt_tokens = [], 0, 0
        self._recall.clear()

    def set_system(self, text: str | None) -> None:
        """Change the system prompt, None for none; the conversation goes on and is read again."""
        self._end_reply()
        self._system = text or None

    def save(self, path: str | Path, *, about: Mapping[str, Any] | None = None) -> None:
        """Write the conversation to a file, with ``about`` beside it as JSON. QrunError: it cannot be written."""
        self._end_reply()
        kept = Transcript(
            messages=self.messages, first=self._first, prompt_tokens=self._prompt_tokens, about=about or {}
        )
        write_transcript(path, kept)

    def load(self, path: str | Path) -> None:
        """Replace the conversation, system prompt included, by a saved one. UsageError: the file cannot be used."""
        saved = read_transcript(path)
        self.clear()
        system = [m["content"] for m in saved.messages if m["role"] == "system"]
        self._system = "\n".join(system) or None
        self._turns = [m for m in saved.messages if m["role"] != "system"]
        self._first, self._prompt_tokens = min(saved.first, self._last_user(self._turns) or 0), saved.prompt_tokens

    def snapshot(self, path: str | Path) -> None:
        """Write what the engine's cache holds to a file, for ``restore``. SnapshotError: it cannot be written."""
        self._end_reply()
        self.engine.snapshot(Path(path).expanduser())

    def restore(self, path: str | Path) -> int:
        """After ``load``, fill the engine's cache from a snapshot, so that less is read again; returns its tokens.

        SnapshotError: it does not fit this model, or is damaged. The conversation stays, and will be read again.
        """
        self._end_reply()
        count = self.engine.restore(Path(path).expanduser())
        ids, asked = list(self.engine.cached_ids), self._prompt_tokens
        last = self._last_user(self._turns)
        if last is not None and 0 < asked < len(ids):
            heard = self._with_system(self._turns[self._first : last + 1])
            text = self.tokenizer.render_marked(heard, thinking=self.thinking)
            if self.tokenizer.text_after([], ids[:asked]).lstrip() == without_marks(text).lstrip():
                self._recall.remember(Prompt(text, ids[:asked]), ids[asked:])
        return count

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

    def _settings(self) -> dict[str, Any]:
        return {
            "sampling": self.sampling,
            "max_tokens": self.max_tokens,
            "stop": self.stop,
            "thinking": self.thinking,
            "loop_guard": self.loop_guard,
        }

    def _answer(
        self, turns: list[Message], constraint: "Constraint | None" = None, logprobs: int | None = None
    ) -> Reply:
        self._check()
        question = Question(messages=turns, constraint=constraint, logprobs=logprobs, **self._settings())
        ready = prepared(question, self._fit(turns), self.tokenizer, self.engine.config.vocab)
        self._reply = ready.reply(
            self.engine.generate,
            roll=lambda used: self._roll_on(turns, used),
            done=lambda reply: self._commit(turns, reply),
        )
        return self._reply

    def _commit(self, turns: list[Message], reply: Reply) -> None:
        if not reply.text and not reply.reasoning and reply.finish_reason in (None, "cancelled"):
            return
        message = Message(role="assistant", content=reply.text)
        if reply.reasoning:
            message["reasoning_content"] = reply.reasoning
        self._turns, self._prompt_tokens = [*turns, message], len(reply.prompt.ids)
        self._recall.remember(reply.prompt, reply.ids)

    def _fit(self, turns: list[Message]) -> Prompt:
        """The prompt for these turns, shortened if it must and may be."""
        self._first = min(self._first, self._last_user(turns) or 0)
        prompt = self._prompt(self._with_system(turns[self._first :]), self.thinking)
        if len(prompt.ids) >= self.engine.context and self.overflow == "roll":
            prompt = self._roll(turns, 0) or prompt
        roll = "" if self.overflow == "roll" else "let the oldest turns go with --overflow roll, "
        self._check_room(len(prompt.ids), "with this message the conversation has", f"start afresh with /clear, {roll}")
        return prompt

    def _check_room(self, length: int, what: str, instead: str = "") -> None:
        if length >= self.engine.context:
            raise ContextOverflowError(
                f"{what} {length} tokens and the context holds {self.engine.context}, an answer included: "
                f"shorten it, {instead}or give a larger context with -c"
            )

    def _roll(self, turns: list[Message], used: int) -> Prompt | None:
        """Forget oldest turns until prompt and ``used`` ids fill half the context, or one turn is left.

        None if there is nothing to forget.
        """
        prompt: Prompt | None = None
        for start in range(self._first + 1, len(turns)):
            if turns[start]["role"] == "user":
                self._first = start
                prompt = self._prompt(self._with_system(turns[self._first :]), self.thinking)
                if len(prompt.ids) + used <= self.engine.context // 2:
                    break
        return prompt

    def _roll_on(self, turns: list[Message], used: int) -> Prompt | None:
        """Within a reply: a prompt that leaves at least a quarter of the context, or None to end the reply."""
        if self.overflow != "roll":
            return None
        prompt = self._roll(turns, used)
        return prompt if prompt is not None and len(prompt.ids) + used <= self.engine.context * 3 // 4 else None

    def _prompt(self, messages: Sequence[Message], thinking: bool | None) -> Prompt:
        text = self.tokenizer.render_marked(messages, thinking=thinking)
        return Prompt(text, self._recall.encode(text))


def _answers(reply: Reply) -> Iterator[str]:
    try:
        for delta in reply:
            if delta.kind == "answer":
                yield delta.text
    finally:
        reply.close()
