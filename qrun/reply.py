"""One reply in the making: the engine's ids become text deltas. Knows no messages, no template and no terminal."""

from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from qrun.reasoning import Delta, ReasoningSplitter, partial_suffix

if TYPE_CHECKING:
    from qrun.sampler import Sampling
    from qrun.tokenizer import StreamDecoder


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

    def generate(
        self,
        ids: Sequence[int],
        *,
        max_tokens: int | None = None,
        sampling: "Sampling | None" = None,
        stop_ids: Collection[int] = (),
        loop_guard: bool = True,
    ) -> TokenStream: ...


@dataclass(frozen=True)
class Prompt:
    """What a reply continues: the rendered text, control strings of messages in marks, and its ids."""

    text: str
    ids: list[int]


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
        roll: Callable[[int], Prompt | None],
        done: Callable[["Reply"], None],
    ) -> None:
        """start(ids, used): begin or go on generating. roll(used): a shorter prompt with room for more, or None.

        ``used`` counts the ids generated so far. done is called once, when a begun reply has ended in any way.
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
