"""Prefill in chunks, then the decode loop, over one cache. Token ids only: it knows no text, files or terminal."""

import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qrun.backends.base import Backend
from qrun.cache import KVCache
from qrun.errors import ContextOverflowError, DoesNotFitError, UsageError
from qrun.formats import kv_format
from qrun.models.config import ModelConfig
from qrun.models.decoder import Decoder
from qrun.recipe import Recipe
from qrun.repetition import LoopGuard
from qrun.resident import let_go, ran_out
from qrun.runcard import RunCard
from qrun.sampler import Sampler, Sampling


@dataclass
class Stats:
    """One reply in numbers; seconds are wall clock. ``seed`` repeats it."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    prefill_seconds: float = 0.0
    new_tokens: int = 0
    decode_seconds: float = 0.0
    seed: int = 0


class Engine:
    """A loaded model and one conversation's cache. ``logits`` and ``generate`` share the cache, so one at a time."""

    def __init__(
        self, decoder: Decoder, backend: Backend, *, config: ModelConfig, recipe: Recipe, card: RunCard,
        source: Path, generation_defaults: Mapping[str, Any], context: int,
    ) -> None:  # fmt: skip
        self.decoder = decoder
        self.backend = backend
        self.config = config
        self.recipe = recipe
        self.card = card
        self.source = source
        self.generation_defaults = generation_defaults
        self.context = context
        self._use(recipe)

    def _use(self, recipe: Recipe) -> None:
        self.cache = KVCache(
            layers=self.config.layers,
            kv_heads=self.config.kv_heads,
            head_dim=self.config.head_dim,
            capacity=self.context,
            k=kv_format(recipe.k),
            v=kv_format(recipe.v),
            device=self.backend.device,
        )
        self.ids: list[int] = []
        self._capture()

    def _capture(self) -> None:
        decoder, cache = self.decoder, self.cache  # no reference to self: who drops an engine frees its memory at once
        self._step = self.backend.capture(
            lambda token, position, limit: decoder.forward(
                token, cache, last_only=True, positions=position, limit=limit
            ),
            cache,
        )

    def out_of_memory(self, error: Exception) -> DoesNotFitError:
        """What to raise for an error that came while running, the engine being fit for another, smaller attempt.

        Raises the error again where it is not that memory ran out.
        """
        used_up = ran_out(error)
        if used_up is None:
            raise error
        let_go(error)
        self._capture()  # without what was recorded, for it may be half of it
        self.cache.truncate(len(self.ids))
        return DoesNotFitError(
            f"{used_up} ran out in a context of {self.context} tokens, {len(self.ids)} of them read: use a smaller "
            "--ctx-size, a smaller --kv such as int8, or a smaller --quant"
        )

    @property
    def cached_ids(self) -> Sequence[int]:
        """The tokens the cache holds, in order."""
        return tuple(self.ids)

    def set_kv(self, kv: str) -> None:
        """Change the cache's formats, e.g. ``int8`` or ``k8v4``; the conversation is read again at the next prompt.

        Raises RecipeError for a name that does not parse.
        """
        before, self.recipe = self.recipe, self.recipe.with_kv(kv)
        del self._step, self.cache  # there is room for one
        try:
            self._use(self.recipe)
        except (MemoryError, RuntimeError) as error:
            let_go(error)
            self.recipe = before
            self._use(before)
            raise self.out_of_memory(error) from None
        self.card = replace(
            self.card, recipe=self.recipe.label, kv=self.recipe.kv, kv_bytes_per_token=self.cache.bytes_per_token
        )

    def reset(self) -> None:
        """Forget the conversation."""
        self._truncate(0)

    def rehearse(self) -> None:
        """Run what a first conversation runs, and forget it: long and short prompts, a step, both ways to choose."""
        # Prompts of each length class that a device may have a kernel of its own for.
        for tokens, temperature in ((self.backend.chunk, 0.0), (48, 0.0), (24, 0.0), (12, 0.0), (6, 0.8)):
            prompt = [0] * max(1, min(tokens, self.context - 2))
            list(self.generate(prompt, max_tokens=2, temperature=temperature, top_k=40, loop_guard=False))
            self.reset()

    def _truncate(self, length: int) -> None:
        self.cache.truncate(length)
        del self.ids[length:]

    def _check(self, ids: Sequence[int]) -> None:
        if not ids:
            raise UsageError("the prompt is empty: give at least one token")
        if not all(0 <= i < self.config.vocab for i in ids):
            raise UsageError(f"a token id is outside 0 … {self.config.vocab - 1}, the model's vocabulary")
        if len(ids) > self.context:
            raise ContextOverflowError(
                f"the prompt has {len(ids)} tokens and the context {self.context}: "
                f"shorten it or give a larger one with -c (the model takes up to {self.config.positions})"
            )

    def _run(self, ids: Sequence[int], *, last_only: bool) -> Tensor:
        logits = self.decoder.forward(torch.tensor(ids, device=self.backend.device), self.cache, last_only=last_only)
        self.ids.extend(ids)
        return logits

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """Next-token logits [S, V] float32 after each of ids [S], from an empty cache, in chunks, through the cache."""
        self._check(ids)
        self.reset()
        chunk = self.backend.chunk
        try:
            return torch.cat([self._run(ids[a : a + chunk], last_only=False) for a in range(0, len(ids), chunk)])
        except (MemoryError, RuntimeError) as error:
            raise self.out_of_memory(error) from None

    def generate(
        self,
        ids: Sequence[int],
        *,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop_ids: Collection[int] = (),
        loop_guard: bool = True,
        **settings: Any,
    ) -> "Generation":
        """Continue ids. Returns at once; the work is done as the tokens are taken from what it returns.

        ``sampling`` defaults to the model's own generation_config; any field of Sampling may be given as a keyword.
        A reply ends at a stop id (not yielded), after max_tokens, at the end of the context, or in an endless loop.
        Raises UsageError for impossible arguments and ContextOverflowError for a prompt longer than the context.
        """
        ids = list(ids)
        self._check(ids)
        if max_tokens is not None and max_tokens < 1:
            raise UsageError(f"max_tokens is {max_tokens}: it must be 1 or more")
        chosen = sampling or Sampling.from_generation_config(self.generation_defaults)
        try:
            chosen = replace(chosen, **settings)
        except TypeError as error:
            raise UsageError(f"unknown sampling setting: {error}") from None
        return Generation(self, ids, chosen, max_tokens, frozenset(stop_ids), LoopGuard() if loop_guard else None)

    def rewind(self, ids: Sequence[int]) -> int:
        """Keep of the cache only the longest prefix it shares with ids, short of its last token; returns its length."""
        shared = 0
        for mine, theirs in zip(
            self.ids, ids[:-1], strict=False
        ):  # the last is run again: its logits are what is wanted
            if mine != theirs:
                break
            shared += 1
        self._truncate(shared)
        return shared

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int]) -> Iterator[Tensor]:
        """Append ids to the cache in chunks; after each chunk, yields the logits [1, V] of its last token."""
        chunk = self.backend.chunk
        for a in range(0, len(ids), chunk):
            yield self._run(ids[a : a + chunk], last_only=True)

    @torch.inference_mode()
    def step(self, token: Tensor) -> Tensor:
        """One decode step: a token [1] -> the next logits [1, V], which the next step may overwrite.

        The cache has the token then, ``ids`` not yet: who knows its value appends it, or truncates the cache.
        """
        return self._step(token)

    def sampler(self, sampling: Sampling, prompt: Sequence[int]) -> Sampler:
        """What chooses a reply's tokens, on the device's own kernel where it has one."""

        def choose(seeded: Sampling) -> Callable[[Tensor], Tensor] | None:
            return self.backend.chooser(
                self.config.vocab, temperature=seeded.temperature, top_k=seeded.top_k, top_p=seeded.top_p,
                min_p=seeded.min_p, seed=seeded.seed or 0,
            )  # fmt: skip

        return Sampler(sampling, prompt, self.config.vocab, self.backend.device, choose=choose)


@dataclass
class Generation:
    """A reply in the making: an iterator of token ids. ``finish_reason`` is none until it ends.

    stop: a stop id; length: max_tokens; context: the cache is full; loop: the guard; cancelled: ``close`` was called.
    """

    engine: Engine
    prompt: list[int]
    sampling: Sampling
    max_tokens: int | None
    stop_ids: frozenset[int]
    guard: LoopGuard | None
    finish_reason: str | None = None
    stats: Stats = field(default_factory=Stats)
    prefilled: int = 0  # prompt tokens in the cache so far, for who shows progress

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
    def _generate(self, engine: Engine, stats: Stats) -> Generator[int]:
        sampler = engine.sampler(self.sampling, self.prompt)
        stats.seed = sampler.settings.seed or 0
        stats.prompt_tokens = len(self.prompt)
        begun = time.perf_counter()
        logits = torch.empty(0)
        stats.reused_tokens = engine.rewind(self.prompt)
        for after_chunk in engine.prefill(self.prompt[stats.reused_tokens :]):
            logits = after_chunk
            self.prefilled = len(engine.ids)
        stats.prefill_seconds = time.perf_counter() - begun
        while True:
            begun = time.perf_counter()
            token = sampler(logits)
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
            stats.new_tokens += 1
            yield chosen
            if self.max_tokens is not None and stats.new_tokens >= self.max_tokens:
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
