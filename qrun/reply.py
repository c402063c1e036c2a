"""One reply in the making: the engine's ids become text deltas. Knows no messages, no template and no terminal."""

from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from qrun.reasoning import Delta, ReasoningSplitter, partial_suffix

if TYPE_CHECKING:
    from qrun.logprobs import TokenLogprob
    from qrun.sampler import Constraint, Sampling
    from qrun.tokenizer import StreamDecoder

_SPELLED = 8  # ids before one that may change what it prints


class ReplyStats(Protocol):
    """What the engine measures of a reply; seconds are wall clock, ``seed`` repeats it."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    prompt_tokens: int
    reused_tokens: int
    prefill_seconds: float
    new_tokens: int
    decode_seconds: float
    seed: int


class TokenStream(Protocol):
    """The engine's side of a reply: ids until it ends, and then why."""

    @property
    def finish_reason(self) -> str | None: ...
    @property
    def stats(self) -> ReplyStats: ...
    @property
    def logprobs(self) -> "Sequence[TokenLogprob]": ...
    @property
    def prefilled(self) -> int: ...
    def __iter__(self) -> Iterator[int]: ...
    def __next__(self) -> int: ...
    def close(self) -> None: ...


class VocabularySize(Protocol):
    """What a session asks of a model's config."""

    @property
    def vocab(self) -> int: ...


class TokenEngine(Protocol):
    """What a session needs of an engine; ``qrun.engine.Engine`` is one."""

    @property
    def context(self) -> int: ...
    @property
    def source(self) -> Path: ...
    @property
    def config(self) -> VocabularySize: ...
    @property
    def generation_defaults(self) -> Mapping[str, Any]: ...
    @property
    def cached_ids(self) -> Sequence[int]: ...
    def snapshot(self, path: Path) -> None: ...
    def restore(self, path: Path) -> int: ...

    def generate(
        self,
        ids: Sequence[int],
        *,
        max_tokens: int | None = None,
        sampling: "Sampling | None" = None,
        stop_ids: Collection[int] = (),
        loop_guard: bool = True,
        constraint: "Constraint | None" = None,
        logprobs: int | None = None,
    ) -> TokenStream: ...


@dataclass(frozen=True)
class Prompt:
    """What a reply continues: the rendered text, control strings of messages in marks, and its ids."""

    text: str
    ids: list[int]


@dataclass(frozen=True)
class TokenText:
    """A token as text (U+FFFD where it is a part of a character), and its natural log-probability."""

    token: int
    text: str
    logprob: float


@dataclass(frozen=True)
class Choice(TokenText):
    """A token that was chosen, and the likeliest ones at its place, best first."""

    top: tuple[TokenText, ...]


class StopStrings:
    """Ends a text at the first of some strings, wherever token borders fall; none of it from there on comes out."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is certain not to belong to a stop string."""
        if self.found:
            return ""
        self._held += text
        at = min((i for i in map(self._held.find, self._stops) if i >= 0), default=None)
        if at is None:
            at = len(self._held) - partial_suffix(self._held, self._stops)
        else:
            self.found = True
        out, self._held = self._held[:at], self._held[at:]
        return out

    def flush(self) -> str:
        """What was held back, now that nothing follows."""
        out = "" if self.found else self._held
        self._held = ""
        return out


class Reply:
    """An iterator of ``Delta``; made by ``Session``. Nothing is computed before the first delta is taken.

    text, reasoning: what has been emitted so far, by kind. ids: every generated id, stop ids excluded.
    finish_reason: None until the end, then "stop" (the model ended, or a stop string), "length" (max_tokens),
    "loop" (endless repetition), "context" (no room left) or "cancelled" (closed or interrupted).
    """

    def __init__(
        self,
        prompt: Prompt,
        *,
        start: Callable[[Sequence[int], int], TokenStream],
        decoder: "StreamDecoder",
        splitter: ReasoningSplitter,
        stop: Sequence[str],
        text_after: Callable[[Sequence[int], Sequence[int]], str],
        roll: Callable[[int], Prompt | None],
        done: Callable[["Reply"], None],
    ) -> None:
        """start(ids, used): begin or go on generating. roll(used): a shorter prompt with room for more, or None.

        ``used`` counts the ids generated so far. text_after(before, ids): what ids print. done is called once, when a
        begun reply has ended in any way.
        """
        self.prompt = prompt
        self.ids: list[int] = []
        self.text = ""
        self.reasoning = ""
        self.finish_reason: str | None = None
        self._start = start
        self._decoder = decoder
        self._splitter = splitter
        self._stops = StopStrings(stop)
        self._text_after = text_after
        self._roll = roll
        self._done = done
        self._streams = [start(prompt.ids, 0)]
        self._deltas = self._run()

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        return next(self._deltas)

    def close(self) -> None:
        """Stop here and keep what was said. Harmless after the end."""
        self._deltas.close()
        self.finish_reason = self.finish_reason or "cancelled"

    @property
    def stats(self) -> ReplyStats:
        """The engine's numbers, at any time; summed where the context rolled."""
        first, *more = (stream.stats for stream in self._streams)
        for stats in more:
            first = replace(
                first,
                prefill_seconds=first.prefill_seconds + stats.prefill_seconds,
                new_tokens=first.new_tokens + stats.new_tokens,
                decode_seconds=first.decode_seconds + stats.decode_seconds,
            )
        return first

    @property
    def progress(self) -> tuple[int, int]:
        """How many of the prompt's tokens have been read, and of how many; may be asked from another thread."""
        return self._streams[-1].prefilled, len(self.prompt.ids)

    @property
    def logprobs(self) -> list[Choice]:
        """Every generated token with its log-probability, reasoning included; empty where they were not asked for."""
        choices: list[Choice] = []
        before = self.prompt.ids[-_SPELLED:]
        for scored in (scored for stream in self._streams for scored in stream.logprobs):
            top = (TokenText(token, self._text_after(before, [token]), logprob) for token, logprob in scored.top)
            text = self._text_after(before, [scored.token])
            choices.append(Choice(scored.token, text, scored.logprob, tuple(top)))
            before = [*before, scored.token][-_SPELLED:]
        return choices

    def _run(self) -> Generator[Delta]:
        try:
            yield from self._write()
        except (GeneratorExit, KeyboardInterrupt):
            self.finish_reason = self.finish_reason or "cancelled"
            raise
        finally:
            self._streams[-1].close()
            self._done(self)

    def _write(self) -> Iterator[Delta]:
        reason: str | None = "context"
        while reason == "context":
            for token in self._streams[-1]:
                self.ids.append(token)
                yield from self._emit(self._splitter.push(self._decoder.push(token)))
                if self._stops.found:
                    self.finish_reason = "stop"
                    return
            reason = self._streams[-1].finish_reason
            if reason == "context":
                shorter = self._roll(len(self.ids))
                if shorter is None:
                    break
                self.prompt = shorter
                self._streams.append(self._start([*shorter.ids, *self.ids], len(self.ids)))
        rest = self._splitter.push(self._decoder.flush()) + self._splitter.flush()
        yield from self._emit(rest)
        held = self._stops.flush()
        if held:
            yield self._count(Delta("answer", held))
        self.finish_reason = "stop" if self._stops.found else reason

    def _emit(self, deltas: list[Delta]) -> Iterator[Delta]:
        """Stop strings count in the answer only: reasoning may say what it likes."""
        for delta in deltas:
            text = self._stops.push(delta.text) if delta.kind == "answer" else delta.text
            if text:
                yield self._count(Delta(delta.kind, text))

    def _count(self, delta: Delta) -> Delta:
        if delta.kind == "answer":
            self.text += delta.text
        else:
            self.reasoning += delta.text
        return delta
