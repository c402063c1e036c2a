"""What a recipe costs in quality: perplexity on a text, and how far its next-token distributions are from a reference.

The text runs through the cache path in windows, the reference beside the quantized model and all its caches, chunk by
chunk, so the logits of two chunks are all that is ever held. It knows no number format and prints nothing.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from qrun.api import load
from qrun.engine import Engine
from qrun.errors import DoesNotFitError, UsageError
from qrun.gguf_tokenizer import open_tokenizer
from qrun.loader import Progress
from qrun.memory import available, human
from qrun.recipe import Recipe
from qrun.runcard import RunCard

HELD_OUT: Final = "heldout.txt"
"""A text that lies beside a model's weights and was no part of its training; the embedded model has one."""
BUILT_IN: Final = "built-in"
"""What a row calls the embedded model's text when another model reads it."""
WINDOW: Final = 512
CHUNK: Final = 512
"""Positions whose logits are held at a time."""
_ROWS: Final = 64  # positions whose distributions are compared at a time


@dataclass(frozen=True, kw_only=True)
class EvalRow:
    """One line of the table. ``size`` in bytes; divergences in nats a token, from the reference to this recipe."""

    model: str
    parameters: int
    recipe: str
    kv: str
    size: int
    bits_per_weight: float
    """Of the whole model, scales and what is never quantized included."""
    kv_bytes_per_token: int
    reference: str
    text: str
    """The file's name, ``built-in``, or nothing where the text itself was given."""
    window: int
    tokens: int
    perplexity: float
    perplexity_error: float
    """One standard error of the perplexity, from the spread over tokens."""
    kl_mean: float
    kl_median: float
    kl_p99: float
    top1: float
    """Share of positions at which both hold the same token to be the likeliest."""
    perplexity_by_quarter: tuple[float, ...]
    """Of the first to the last quarter of all windows: whether a cache gets worse as it fills."""
    kl_by_quarter: tuple[float, ...]
    """Means; like the perplexities, none where a window has fewer than 8 tokens."""


def evaluate(
    model: str | Path | None = None,
    quants: Sequence[str | Recipe] = ("bf16",),
    kvs: Sequence[str | None] = (None,),
    text: str | Path | None = None,
    *,
    reference: str | Recipe = "bf16",
    against: str | Path | None = None,
    window: int = WINDOW,
    max_tokens: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> list[EvalRow]:
    """One row per recipe and cache format, each against ``reference``.

    Args:
        kvs: cache formats for every recipe; None is the recipe's own.
        against: the model whose predictions at ``reference`` count, as the one that ``model`` was quantized from; by
            default the model itself.
        text: the text itself as a string, or the path of a UTF-8 file; by default the held-out text of the model, or
            of the embedded one.
        window: tokens a window, up to the model's positions; windows do not overlap, and the first token of each is not
            predicted.
        max_tokens: stop after so many tokens of the text.
        options: go to `qrun.load` (device, threads, cache, offline …).

    Raises:
        QrunError: whatever loading raises; UsageError for a missing, unreadable or too short text; DoesNotFitError for
            more caches of this window than there is memory for.
    """
    return list(_evaluate(model, quants, kvs, text, reference, against, window, max_tokens, progress, options))


def _evaluate(
    model: str | Path | None,
    quants: Sequence[str | Recipe],
    kvs: Sequence[str | None],
    text: str | Path | None,
    reference: str | Recipe,
    against: str | Path | None,
    window: int,
    max_tokens: int | None,
    progress: Progress | None,
    options: dict[str, Any],
) -> Iterator[EvalRow]:
    if window < 2 or not quants or not kvs:
        raise UsageError("nothing to evaluate: give at least one recipe and a window of 2 tokens or more")
    say: Progress = progress or (lambda what, done, total: None)
    base_recipe, recipes = _recipe(reference), [_recipe(quant) for quant in quants]
    options["context"] = window
    base = load(model if against is None else against, quant=base_recipe, progress=progress, **options)
    name, ids = _read(base, text)
    windows = _windows(ids[:max_tokens], window)
    for recipe in recipes:
        same = (
            against is None
            and not recipe.own
            and recipe.schemes() == base_recipe.schemes()
            and recipe.activations == base_recipe.activations
        )
        names = [f"k{recipe.k}v{recipe.v}" if kv is None else kv for kv in kvs]
        # Held by no variable of this frame, so that it is gone before the next one is loaded.
        found = _compare(
            base,
            _caches(
                base.beside(names[0]) if same else load(model, recipe, names[0], progress=progress, **options),
                names[1:],
            ),
            windows,
            say=lambda done, total, what=recipe.name: say(f"evaluating {what}", done, total),
        )
        for card, score in found:
            yield score.row(card, base_recipe, text=name, window=window)


def _compare(
    base: Engine, engines: Sequence[Engine], windows: Sequence[Sequence[int]], *, say: Callable[[int, int], None]
) -> "list[tuple[RunCard, _Score]]":
    """Run all of them over the windows side by side, and score each against the first."""
    scores = [_Score(len(windows[0])) for _ in engines]
    for engine in engines:
        if engine.config.vocab != base.config.vocab:
            raise UsageError(
                f"{engine.card.model} has a vocabulary of {engine.config.vocab}, {base.card.model} one of "
                f"{base.config.vocab}: compare models of one tokenizer"
            )
    done, total = 0, sum(map(len, windows))
    for ids in windows:
        start = 0
        streams = [engine.logits_chunks(ids, CHUNK) for engine in engines]
        for expected in base.logits_chunks(ids, CHUNK):
            say(done, total)
            for score, stream in zip(scores, streams, strict=True):
                score.add(expected, next(stream), ids, start)
            start += len(expected)
            done += len(expected)
    return [(engine.card, score) for engine, score in zip(engines, scores, strict=True)]


def _recipe(quant: str | Recipe) -> Recipe:
    return quant if isinstance(quant, Recipe) else Recipe.parse(quant)


def _caches(engine: Engine, kvs: Sequence[str]) -> list[Engine]:
    """The engine, and others on its weights whose caches have these formats.

    Raises DoesNotFitError where they are too much together.
    """
    made = [engine, *(engine.beside(kv) for kv in kvs)]
    need, free = sum(each.card.kv_bytes_per_token for each in made) * engine.context, available()
    if engine.backend.device.type == "cpu" and need > free:  # which is taken from the system as they are filled
        raise DoesNotFitError(
            f"{len(made)} caches of {engine.context} tokens need {human(need)}, {human(free)} are free: "
            "give fewer formats with --kv, or a smaller --window"
        )
    return made


def _read(engine: Engine, text: str | Path | None) -> tuple[str, list[int]]:
    """The text's name and ids."""
    name = ""
    if text is None:
        text = engine.source / HELD_OUT
        if not text.exists():
            # Of a conversation its marks are another model's; what was said is text.
            said = (files("qrun.spark") / HELD_OUT).read_text(encoding="utf-8")
            name, text = BUILT_IN, said.replace("<|begin_of_sentence|>", "").replace("<|end_of_sentence|>", "\n")
    if isinstance(text, Path):
        name = text.name
        try:
            text = text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read {text}: {error}; give a UTF-8 text file") from error
    return name, open_tokenizer(engine.source, vocab_size=engine.config.vocab).encode(text)


def _windows(ids: Sequence[int], window: int) -> list[Sequence[int]]:
    """The ids in pieces of ``window``; a last piece too short to predict anything is left out."""
    if len(ids) < 2:
        raise UsageError(f"the text has {len(ids)} tokens: give one with 2 or more")
    pieces = [ids[at : at + window] for at in range(0, len(ids), window)]
    return [piece for piece in pieces if len(piece) > 1]


def _floats(values: Any) -> list[float]:
    found: list[float] = values.tolist()
    return found


@dataclass
class _Score:
    """What was found at the positions seen so far, by quarters of windows of ``length``: losses of the known next
    token, and divergences."""

    length: int
    losses: list[list[float]] = field(default_factory=lambda: [[], [], [], []])
    divergences: list[list[float]] = field(default_factory=lambda: [[], [], [], []])
    agreed: int = 0

    def add(self, expected: Tensor, logits: Tensor, ids: Sequence[int], start: int) -> None:
        """Compare two [S, V] tensors of logits, those after the tokens of a window ids from ``start`` on."""
        for at in range(0, len(expected), _ROWS):
            p = torch.log_softmax(expected[at : at + _ROWS].float(), -1)
            q = torch.log_softmax(logits[at : at + _ROWS].float(), -1)
            first = start + at
            for i, divergence in enumerate(_floats((p.exp() * (p - q)).sum(-1).clamp_min(0))):
                self.divergences[4 * (first + i) // self.length].append(divergence)
            self.agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
            following = torch.tensor(ids[first + 1 : first + 1 + len(q)], device=q.device)
            for i, loss in enumerate(_floats(-q[: len(following)].gather(1, following[:, None])[:, 0])):
                self.losses[4 * (first + i) // self.length].append(loss)

    def row(self, card: RunCard, reference: Recipe, *, text: str, window: int) -> EvalRow:
        losses, ordered = list(chain(*self.losses)), sorted(chain(*self.divergences))
        error = statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else 0.0
        apart = self.length >= 8
        return EvalRow(
            model=card.model,
            parameters=card.parameters,
            recipe=card.recipe,
            kv=card.kv,
            size=card.weight_bytes,
            bits_per_weight=8 * card.weight_bytes / card.parameters,
            kv_bytes_per_token=card.kv_bytes_per_token,
            reference=reference.label,
            text=text,
            window=window,
            tokens=len(losses),
            perplexity=_perplexity(losses),
            perplexity_error=_perplexity(losses) * error,
            kl_mean=statistics.fmean(ordered),
            kl_median=statistics.median(ordered),
            kl_p99=ordered[min(len(ordered) - 1, math.ceil(0.99 * len(ordered)) - 1)],
            top1=self.agreed / len(ordered),
            perplexity_by_quarter=tuple(map(_perplexity, self.losses)) if apart else (),
            kl_by_quarter=tuple(map(statistics.fmean, self.divergences)) if apart else (),
        )


def _perplexity(losses: Sequence[float]) -> float:
    return math.exp(min(statistics.fmean(losses), 700.0))
