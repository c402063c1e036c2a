"""Several prompts run together, so that each step reads the weights once for all of them. Token ids only, as an engine.

Nothing runs by itself: whoever takes a token from a stream moves all that are running on until that one has it, and
what the others were given waits for them. The engine's own conversation stays as it is, and lends its beginning.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qrun import memory
from qrun.cache import KVCache
from qrun.engine import Engine
from qrun.errors import QrunError, UsageError
from qrun.formats import kv_format
from qrun.generation import Stats
from qrun.logprobs import LogprobReader, TokenLogprob
from qrun.resident import let_go, ran_out
from qrun.sampler import Constraint, Sampling

WIDTH = 16
"""Conversations at once where nothing else is asked for."""
MOST = 64
"""Rows of a step that every device has kernels for."""
SHARE = 0.9
"""Of the memory that is free, what the conversations' caches may take."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and how to continue it: the arguments of `Engine.generate`."""

    ids: Sequence[int]
    max_tokens: int | None = None
    sampling: Sampling | None = None
    stop_ids: Collection[int] = ()
    loop_guard: bool = True
    constraint: Constraint | None = None
    logprobs: int | None = None


class Stream:
    """One request's reply: an iterator of token ids. ``finish_reason`` is none until it ends, then `Generation`'s.

    Taking a token raises what `Engine.generate` would have raised of the request, and DoesNotFitError where memory ran
    out. Seconds in ``stats`` are those of the steps that it was part of, with others or alone.
    """

    def __init__(self, batch: "Batch", request: Request) -> None:
        self.finish_reason: str | None = None
        self.stats = Stats()
        self.prefilled = 0
        self.running = False
        self.over = False
        self.cache: KVCache | None = None
        self._batch = batch
        self._end: str | None = None
        self._numbers: Callable[[], TokenLogprob] | None = None
        self._error: QrunError | None = None
        self._made: list[int] = []
        self._scores: list[TokenLogprob] = []
        self._logits: Tensor | None = None
        engine = batch.engine
        try:
            self._asked = engine.generate(
                request.ids, max_tokens=request.max_tokens, sampling=request.sampling, stop_ids=request.stop_ids,
                loop_guard=request.loop_guard, constraint=request.constraint, logprobs=request.logprobs,
            )  # fmt: skip
        except QrunError as error:
            self.fail(error)
            return
        asked = self._asked
        self._sampler = engine.sampler(asked.sampling, asked.prompt)
        self._reader = None
        if asked.alternatives is not None:
            self._reader = LogprobReader(asked.alternatives, engine.config.vocab, engine.backend.device)
        self.stats.seed = self._sampler.settings.seed or 0
        self.stats.prompt_tokens = len(asked.prompt)
        room = engine.context if asked.max_tokens is None else len(asked.prompt) + asked.max_tokens
        self.capacity = min(engine.context, room)

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        taken = self.stats.new_tokens
        while taken == len(self._made):
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            if self.over:
                self.finish_reason = self.finish_reason or self._end
                raise StopIteration
            self._batch.advance()
        self.stats.new_tokens = taken + 1
        return self._made[taken]

    def close(self) -> None:
        """Stop here; the next request takes its place. Harmless after the end."""
        del self._made[self.stats.new_tokens :]
        self.finish_reason = self.finish_reason or "cancelled"
        self._error = None
        self.over = True
        self._batch.leave()

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """One for each token taken so far, where they were asked for."""
        return self._scores[: self.stats.new_tokens]

    @property
    def ids(self) -> list[int]:
        """Prompt and reply, whose last token may still have to be run."""
        return self._asked.prompt + self._made

    @property
    def length(self) -> int:
        """How many ids there are."""
        return len(self._asked.prompt) + len(self._made)

    @property
    def last(self) -> int:
        """The last of the ids."""
        return (self._made or self._asked.prompt)[-1]

    def fail(self, error: QrunError) -> None:
        """End with an error, which is raised once what came before it has been taken."""
        self._error, self.over = error, True

    def begin(self, source: Sequence[int], cache: KVCache) -> None:
        """Read the prompt, taking from another conversation's ids and cache what they have in common."""
        begun = time.perf_counter()
        engine, prompt = self._batch.engine, self._asked.prompt
        mine = self.cache = self._batch.cache(self.capacity)
        shared = common(source, prompt)
        for layer, other in zip(mine.layers, cache.layers, strict=True):
            layer.k.take(other.k, shared)
            layer.v.take(other.v, shared)
        mine.length = self.prefilled = self.stats.reused_tokens = shared
        logits = None
        for start in range(shared, len(prompt), engine.backend.chunk):
            part = torch.tensor(prompt[start : start + engine.backend.chunk], device=engine.backend.device)
            logits = engine.decoder.forward(part, mine, last_only=True)
            self.prefilled = mine.length
        self._logits = logits
        self.stats.prefill_seconds += time.perf_counter() - begun
        self.running = True

    def choose(self) -> Tensor | None:
        """The next token [1] on the device, where the last one has been run; `accept` takes its value."""
        if self._logits is None:
            return None
        constraint = self._asked.constraint
        token = self._sampler(self._logits, None if constraint is None else constraint.allowed())
        self._numbers = None if self._reader is None else self._reader(self._logits, token)
        return token

    def accept(self, token: int) -> None:
        """Append a token that was chosen, or end."""
        asked, self._logits = self._asked, None
        if token in asked.stop_ids:
            self._end = "stop"
        else:
            if asked.constraint is not None:
                asked.constraint.push(token)
            if self._numbers is not None:
                self._scores.append(self._numbers())
            self._made.append(token)
            if asked.constraint is not None and asked.constraint.complete:
                self._end = "stop"
            elif asked.max_tokens is not None and len(self._made) >= asked.max_tokens:
                self._end = "length"
            elif asked.guard is not None and asked.guard.push(token):
                self._end = "loop"
            elif self.length > self._batch.engine.context:
                self._end = "context"
        self.over = self._end is not None

    def follow(self, logits: Tensor) -> None:
        """Take the logits [1, V] after the last token."""
        self._logits = logits


class Batch:
    """Requests run together, at most ``width`` at once (by default 16, and what memory holds), in their order.

    ``streams``, one of each request, in order, are made as they are asked for; ``requests`` are read as there is room
    for more. A prompt is read once where requests that run at the same time begin alike. ``seconds``: wall clock spent
    computing so far.
    """

    def __init__(self, engine: Engine, requests: Iterable[Request], width: int | None = None) -> None:
        """Raises UsageError for a width outside 1 … 64."""
        if width is not None and not 1 <= width <= MOST:
            raise UsageError(f"width is {width}: from 1 to {MOST} prompts run together")
        self.engine = engine
        self.seconds = 0.0
        self._width = width or WIDTH
        self._room = SHARE * memory.available(engine.backend.device.type)
        self._requests = iter(requests)
        self._open: list[Stream] = []
        self._unclaimed: deque[Stream] = deque()
        self._last: Stream | None = None
        self._all_read = False
        self.streams: Iterator[Stream] = self._hand_out()

    def _hand_out(self) -> Iterator[Stream]:
        while self._unclaimed or self._read():
            yield self._unclaimed.popleft()

    def _read(self) -> bool:
        """Take the next request, if there is one."""
        for request in self._requests:
            stream = Stream(self, request)
            self._unclaimed.append(stream)
            if not stream.over:
                self._open.append(stream)
            return True
        self._all_read = True
        self.leave()
        return False

    def cache(self, capacity: int) -> KVCache:
        """Memory for one conversation."""
        config, recipe = self.engine.config, self.engine.recipe
        return KVCache(
            layers=config.layers, kv_heads=config.kv_heads, head_dim=config.head_dim, capacity=capacity,
            k=kv_format(recipe.k), v=kv_format(recipe.v), device=self.engine.backend.device,
        )  # fmt: skip

    @torch.inference_mode()
    def advance(self) -> None:
        """Read the prompt of the next request there is room for; where there is none, run one step of all."""
        begun = time.perf_counter()
        try:
            stream = self._next()
            if stream is None:
                self._step()
            else:
                self._begin(stream)
            self.leave()
        finally:
            self.seconds += time.perf_counter() - begun

    def _running(self) -> list[Stream]:
        return [stream for stream in self._open if stream.running and not stream.over]

    def leave(self) -> None:
        """Let go of those that are over; the last one's cache stays for who may have something in common with it."""
        for stream in self._open:
            if stream.over and stream.running:
                self._keep(stream)
        self._open = [stream for stream in self._open if not stream.over]
        if self._all_read and all(stream.running for stream in self._open):
            self._keep(None)

    def _keep(self, stream: Stream | None) -> None:
        if self._last is not None:
            self._last.cache = None
        self._last = stream

    def _next(self) -> Stream | None:
        """Who is to begin now."""
        running = self._running()
        if len(running) >= self._width:
            return None
        while len(self._open) == len(running):
            if not self._read():
                return None
        stream = next(stream for stream in self._open if not stream.running)
        each = self.engine.cache.bytes_per_token
        room = self._room - each * sum(other.capacity for other in [*running, stream])
        if self._last is not None and room < each * self._last.capacity:
            self._keep(None)
        return stream if room >= 0 or not running else None

    def _begin(self, stream: Stream) -> None:
        running = self._running()
        sources: list[tuple[Sequence[int], KVCache]] = [(self.engine.cached_ids, self.engine.cache)]
        for other in [*running, *([] if self._last is None else [self._last])]:
            if other.cache is not None:
                sources.append((other.ids[: other.cache.length], other.cache))
        ids = stream.ids
        try:
            stream.begin(*max(sources, key=lambda source: common(source[0], ids)))
        except (MemoryError, RuntimeError) as error:
            stream.cache = None
            if not running or ran_out(error) is None:
                stream.fail(self.engine.out_of_memory(error))
                return
            let_go(error)
            self._width = len(running)  # it waits until one of them ends

    def _step(self) -> None:
        """A token for everyone who runs, then one forward of those that go on."""
        begun = time.perf_counter()
        running = self._running()
        try:
            chosen = [(stream, token) for stream in running if (token := stream.choose()) is not None]
            if chosen:
                values: Any = torch.cat([token for _, token in chosen])
                for (stream, _), value in zip(chosen, values.tolist(), strict=True):
                    stream.accept(value)
            on = [stream for stream in running if not stream.over]
            if on:
                for stream, logits in zip(on, self._forward(on), strict=True):
                    stream.follow(logits)
        except (MemoryError, RuntimeError) as error:
            failure = self.engine.out_of_memory(error)
            for stream in running:
                stream.fail(failure)
                stream.cache = None
        seconds = time.perf_counter() - begun
        for stream in running:
            stream.stats.decode_seconds += seconds

    def _forward(self, streams: Sequence[Stream]) -> Iterable[Tensor]:
        """Run each one's last token; returns the logits [1, V] of each."""
        last: list[int] = []
        caches: list[KVCache] = []
        for stream in streams:
            assert stream.cache is not None
            last.append(stream.last)
            stream.cache.truncate(stream.length - 1)  # a step that was interrupted is run again
            caches.append(stream.cache)
        tokens = torch.tensor(last, device=self.engine.backend.device)
        if len(caches) == 1:
            return [self.engine.decoder.forward(tokens, caches[0], last_only=True)]
        return torch.split(self.engine.decoder.forward_many(tokens, caches), 1)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How long a beginning of b, short of its last token, is a's too: the last is run for its logits."""
    shared = 0
    for mine, theirs in zip(a, b[:-1], strict=False):
        if mine != theirs:
            break
        shared += 1
    return shared
