"""Prefill in chunks, then the decode loop, over one cache. Token ids only: it knows no text, files or terminal."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qrun import memory
from qrun.backends.base import Backend
from qrun.cache import KVCache
from qrun.errors import ContextOverflowError, DoesNotFitError, SnapshotError, UsageError
from qrun.formats import kv_format
from qrun.generation import Generation, Stats
from qrun.logprobs import check_count
from qrun.models.config import ModelConfig
from qrun.models.decoder import Decoder
from qrun.recipe import Recipe
from qrun.repetition import LoopGuard
from qrun.resident import let_go, ran_out
from qrun.runcard import RunCard
from qrun.sampler import Constraint, Sampler, Sampling
from qrun.snapshot import Origin, Snapshot
from qrun.snapshot import write as write_snapshot

__all__ = ["Engine", "Generation", "Stats"]


class Engine:
    """A loaded model and one conversation's cache. ``logits`` and ``generate`` share the cache, so one at a time."""

    def __init__(
        self, decoder: Decoder, backend: Backend, *, config: ModelConfig, recipe: Recipe, card: RunCard,
        source: Path, generation_defaults: Mapping[str, Any], context: int, identity: str | None = None,
    ) -> None:  # fmt: skip
        """identity: what the weights were made from, as `Checkpoint.identity` has it; none where nothing is kept."""
        self.decoder = decoder
        self.backend = backend
        self.config = config
        self.recipe = recipe
        self.card = card
        self.source = source
        self.generation_defaults = generation_defaults
        self.context = context
        self.identity = identity
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
        """Change the cache's formats, e.g. to ``int8`` or ``k8v4``; what it holds is encoded anew, a layer at a time.

        Raises RecipeError for a name that does not parse. DoesNotFitError: there is no room; where that is known before
        anything is done, all is as it was, else the cache has its former formats and is empty.
        """
        recipe = self.recipe.with_kv(kv)
        self._check_room(recipe)
        del self._step  # what was recorded reads the old layers
        try:
            self.cache.convert(kv_format(recipe.k), kv_format(recipe.v))
        except BaseException as error:
            let_go(error)
            del self.cache  # there is room for one
            self._use(self.recipe)
            if isinstance(error, MemoryError | RuntimeError):
                raise self.out_of_memory(error) from None
            raise
        self._capture()
        self.recipe = recipe
        self._describe_cache()

    def _check_room(self, recipe: Recipe) -> None:
        """Raises DoesNotFitError where the cache of another recipe is known not to fit beside the weights."""
        device = self.backend.device.type
        wanted = memory.forecast(self.config, recipe, self.context, device=device).kv
        # A CPU's memory is taken as positions are written.
        held = self.cache.bytes_per_token * (self.cache.length if device == "cpu" else self.context)
        room = memory.available(device) + held
        if wanted > room:
            raise DoesNotFitError(
                f"a cache in {recipe.kv} of {self.context} tokens needs {memory.human(wanted)}, "
                f"{memory.human(room)} are free: use a smaller --ctx-size or a smaller --kv such as int4"
            )

    def snapshot(self, path: Path) -> None:
        """Write the conversation's ids and what the cache holds of them to a file, for `restore`.

        Raises SnapshotError where it cannot be written.
        """
        write_snapshot(path, self.cache, self.ids, self._origin())

    def restore(self, path: Path) -> int:
        """Put a snapshot in the place of the conversation, in the cache's own formats; returns its number of tokens.

        Raises SnapshotError for one that is damaged, too long, or of another model, recipe or version. The
        conversation is then as it was, or gone where the damage lies behind the file's header.
        """
        found = Snapshot(path, self.cache, origin=self._origin(), vocab=self.config.vocab)
        self.reset()
        try:
            found.fill(self.cache)
        except (MemoryError, RuntimeError) as error:
            raise self.out_of_memory(error) from None
        self.cache.length = found.length
        self.ids[:] = found.ids
        return found.length

    def _origin(self) -> Origin:
        if self.identity is None:
            raise SnapshotError("this engine was not loaded from a checkpoint, so no snapshot can be known as its own")
        return Origin(self.identity, self.recipe.with_kv("bf16").label)

    def beside(self, kv: str) -> "Engine":
        """Another conversation with the same weights, its cache in the formats ``kv``.

        Raises RecipeError for a name that does not parse, DoesNotFitError where there is no room for it.
        """
        recipe = self.recipe.with_kv(kv)
        try:
            other = Engine(
                self.decoder, self.backend, config=self.config, recipe=recipe, card=self.card, source=self.source,
                generation_defaults=self.generation_defaults, context=self.context, identity=self.identity,
            )  # fmt: skip
        except (MemoryError, RuntimeError) as error:
            raise self.out_of_memory(error) from None
        other._describe_cache()
        return other

    def _describe_cache(self) -> None:
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

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Next-token logits [S, V] float32 after each of ids [S], from an empty cache, in chunks, through the cache."""
        try:
            return torch.cat(list(self.logits_chunks(ids)))
        except (MemoryError, RuntimeError) as error:
            raise self.out_of_memory(error) from None

    @torch.inference_mode()
    def logits_chunks(self, ids: Sequence[int], most: int | None = None) -> Iterator[Tensor]:
        """The same a chunk at a time, [at most ``most``, V] each, so that only one chunk's logits are ever held."""
        self._check(ids)
        self.reset()
        chunk = min(self.backend.chunk, most or self.backend.chunk)
        for a in range(0, len(ids), chunk):
            yield self._logits(ids[a : a + chunk])  # held by no name here while the next is made

    def _logits(self, ids: Sequence[int]) -> Tensor:
        try:
            return self._run(ids, last_only=False)
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
        constraint: Constraint | None = None,
        logprobs: int | None = None,
        **settings: Any,
    ) -> Generation:
        """Continue ids. Returns at once; the work is done as the tokens are taken from what it returns.

        ``sampling`` defaults to the model's own generation_config; any field of Sampling may be given as a keyword.
        ``constraint`` says which tokens may come, and is told those that do: one for each reply. ``logprobs`` asks for
        the chosen tokens' log probabilities and so many alternatives (0 … 20), in the result's ``logprobs``.
        A reply ends at a stop id (not yielded), when the constraint is complete, after max_tokens, at the end of the
        context, or in an endless loop.
        Raises UsageError for impossible arguments and ContextOverflowError for a prompt longer than the context.
        """
        ids = list(ids)
        self._check(ids)
        if max_tokens is not None and max_tokens < 1:
            raise UsageError(f"max_tokens is {max_tokens}: it must be 1 or more")
        if logprobs is not None:
            check_count(logprobs)
        chosen = sampling or Sampling.from_generation_config(self.generation_defaults)
        try:
            chosen = replace(chosen, **settings)
        except TypeError as error:
            raise UsageError(f"unknown sampling setting: {error}") from None
        guard = LoopGuard() if loop_guard else None
        return Generation(self, ids, chosen, max_tokens, frozenset(stop_ids), guard, constraint, logprobs)

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
