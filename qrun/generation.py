"""A reply in the making: from the first chunk of its prompt to why it ended. Token ids only, as its engine."""

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from qrun.logprobs import LogprobReader, TokenLogprob
from qrun.repetition import LoopGuard
from qrun.sampler import Constraint, Sampling

if TYPE_CHECKING:
    from qrun.engine import Engine


@dataclass
class Stats:
    """One reply in numbers; seconds are wall clock. ``seed`` repeats it."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    prefill_seconds: float = 0.0
    new_tokens: int = 0
    decode_seconds: float = 0.0
    seed: int = 0


@dataclass
class Generation:
    """An iterator of token ids. ``finish_reason`` is none until it ends.

    stop: a stop id, or the constraint is complete; length: max_tokens; context: the cache is full; loop: the guard;
    cancelled: ``close`` was called.
    """

    engine: "Engine"
    prompt: list[int]
    sampling: Sampling
    max_tokens: int | None
    stop_ids: frozenset[int]
    guard: LoopGuard | None
    constraint: Constraint | None = None
    alternatives: int | None = None
    finish_reason: str | None = None
    stats: Stats = field(default_factory=Stats)
    logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    """One for each token so far, where they were asked for."""
    prefilled: int = 0
    """Prompt tokens in the cache so far, reused ones included; another thread may look while the prompt is read."""

    def __post_init__(self) -> None:
        self._tokens = self._work()

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        return next(self._tokens)

    def close(self) -> None:
        """Stop here. The cache keeps what was run, so the conversation can go on."""
        self._tokens.close()
        self.finish_reason = self.finish_reason or "cancelled"

    def _work(self) -> Generator[int]:
        stats, engine = self.stats, self.engine
        try:
            yield from self._generate(engine, stats)
        except (KeyboardInterrupt, GeneratorExit):
            self.finish_reason = self.finish_reason or "cancelled"
            raise
        except (MemoryError, RuntimeError) as error:
            raise engine.out_of_memory(error) from None
        finally:
            engine.cache.truncate(len(engine.ids))

    @torch.inference_mode()
    def _generate(self, engine: "Engine", stats: Stats) -> Generator[int]:
        sampler = engine.sampler(self.sampling, self.prompt)
        reader = None
        if self.alternatives is not None:
            reader = LogprobReader(self.alternatives, engine.config.vocab, engine.backend.device)
        stats.seed = sampler.settings.seed or 0
        stats.prompt_tokens = len(self.prompt)
        begun = time.perf_counter()
        logits = torch.empty(0)
        self.prefilled = stats.reused_tokens = engine.rewind(self.prompt)
        for after_chunk in engine.prefill(self.prompt[stats.reused_tokens :]):
            logits = after_chunk
            self.prefilled = len(engine.ids)
        stats.prefill_seconds = time.perf_counter() - begun
        while True:
            begun = time.perf_counter()
            token = sampler(logits, None if self.constraint is None else self.constraint.allowed())
            numbers = None if reader is None else reader(logits, token)
            # Where that does not wait, the next step is begun before the token is known; it may turn out not to count.
            last = self.max_tokens is not None and stats.new_tokens + 1 >= self.max_tokens
            ahead = engine.backend.runs_ahead and not last and len(engine.ids) < engine.context
            value = engine.backend.fetch(token)
            if ahead:
                logits = engine.step(token)
            chosen = value()
            stats.decode_seconds += time.perf_counter() - begun
            if chosen in self.stop_ids:
                self.finish_reason = "stop"
                return
            if self.constraint is not None:
                self.constraint.push(chosen)
            if numbers is not None:
                self.logprobs.append(numbers())
            stats.new_tokens += 1
            yield chosen
            if self.constraint is not None and self.constraint.complete:
                self.finish_reason = "stop"
            elif self.max_tokens is not None and stats.new_tokens >= self.max_tokens:
                self.finish_reason = "length"
            elif self.guard is not None and self.guard.push(chosen):
                self.finish_reason = "loop"
            elif len(engine.ids) >= engine.context:
                self.finish_reason = "context"
            if self.finish_reason is not None:
                return
            if not ahead:
                begun = time.perf_counter()
                logits = engine.step(token)
                stats.decode_seconds += time.perf_counter() - begun
            engine.ids.append(chosen)
