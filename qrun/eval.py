"""What a recipe costs in quality: perplexity on a text, and how far its next-token distributions are from a reference.

The text runs through the cache path in windows, the reference beside the quantized model, so only one window's logits
are ever held. It knows no number format and prints nothing.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from qrun.api import load
from qrun.engine import Engine
from qrun.errors import UsageError
from qrun.loader import Progress
from qrun.recipe import Recipe
from qrun.tokenizer import Tokenizer

HELD_OUT: Final = "heldout.txt"
"""A text that lies beside a model's weights and was no part of its training; the embedded model has one."""
WINDOW: Final = 512
_ROWS: Final = 64  # positions whose distributions are compared at a time


@dataclass(frozen=True, kw_only=True)
class EvalRow:
    """One line of the table. ``size`` in bytes; divergences in nats a token, from the reference to this recipe."""

    model: str
    recipe: str
    kv: str
    size: int
    kv_bytes_per_token: int
    reference: str
    tokens: int
    perplexity: float
    perplexity_error: float
    """One standard error of the perplexity, from the spread over tokens."""
    kl_mean: float
    kl_median: float
    kl_p99: float
    top1: float
    """Share of positions at which both hold the same token to be the likeliest."""


def evaluate(
    model: str | Path | None = None,
    quants: Sequence[str | Recipe] = ("bf16",),
    kvs: Sequence[str | None] = (None,),
    text: str | Path | None = None,
    *,
    reference: str | Recipe = "bf16",
    window: int = WINDOW,
    max_tokens: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> list[EvalRow]:
    """One row per recipe and cache format, each against ``reference``.

    Args:
        kvs: cache formats for every recipe; None is the recipe's own.
        text: the text itself as a string, or the path of a UTF-8 file; by default the held-out text of the model.
        window: tokens a window; windows do not overlap, and the first token of each is not predicted.
        max_tokens: stop after so many tokens of the text.
        options: go to `qrun.load` (device, threads, cache, offline …).

    Raises:
        QrunError: whatever loading raises; UsageError for a missing, unreadable or too short text.
    """
    return list(_evaluate(model, quants, kvs, text, reference, window, max_tokens, progress, options))


def _evaluate(
    model: str | Path | None,
    quants: Sequence[str | Recipe],
    kvs: Sequence[str | None],
    text: str | Path | None,
    reference: str | Recipe,
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
    base = load(model, quant=base_recipe, progress=progress, **options)
    windows = _windows(base, text, window, max_tokens)
    for recipe in recipes:
        same = recipe.schemes() == base_recipe.schemes() and recipe.activations == base_recipe.activations
        engine = base if same else load(model, quant=recipe, progress=progress, **options)
        names = [_kv_name(recipe) if kv is None else kv for kv in kvs]
        scores = [_Score() for _ in names]
        for done, ids in enumerate(windows):
            say(f"evaluating {recipe.name}", done, len(windows))
            expected = _logits(base, _kv_name(base_recipe), ids)
            for name, score in zip(names, scores, strict=True):
                score.add(expected, _logits(engine, name, ids), ids)
        for name, score in zip(names, scores, strict=True):
            engine.set_kv(name)
            yield score.row(engine, base_recipe)
        del engine


def _recipe(quant: str | Recipe) -> Recipe:
    return quant if isinstance(quant, Recipe) else Recipe.parse(quant)


def _kv_name(recipe: Recipe) -> str:
    return f"k{recipe.k}v{recipe.v}"


def _logits(engine: Engine, kv: str, ids: Sequence[int]) -> Tensor:
    if _kv_name(engine.recipe) != _kv_name(engine.recipe.with_kv(kv)):
        engine.set_kv(kv)
    return engine.logits(ids)


def _windows(engine: Engine, text: str | Path | None, window: int, limit: int | None) -> list[list[int]]:
    """The text's ids in pieces of ``window``; a last piece too short to predict anything is left out."""
    if text is None:
        text = engine.source / HELD_OUT
        if not text.exists():
            raise UsageError(f"{engine.card.model} has no held-out text of its own: give a text file with --text")
    if isinstance(text, Path):
        try:
            text = text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read {text}: {error}; give a UTF-8 text file") from error
    ids = Tokenizer.from_dir(engine.source, vocab_size=engine.config.vocab).encode(text)[:limit]
    if len(ids) < 2:
        raise UsageError(f"the text has {len(ids)} tokens: give one with 2 or more")
    pieces = [ids[at : at + window] for at in range(0, len(ids), window)]
    return [piece for piece in pieces if len(piece) > 1]


def _floats(values: Any) -> list[float]:
    found: list[float] = values.tolist()
    return found


@dataclass
class _Score:
    """Sums over the positions seen so far: losses of the known next token, and divergences."""

    losses: list[float] = field(default_factory=list[float])
    divergences: list[float] = field(default_factory=list[float])
    agreed: int = 0

    def add(self, expected: Tensor, logits: Tensor, ids: Sequence[int]) -> None:
        """Compare two [S, V] tensors of logits for ids [S]."""
        for start in range(0, len(ids), _ROWS):
            p = torch.log_softmax(expected[start : start + _ROWS].float(), -1)
            q = torch.log_softmax(logits[start : start + _ROWS].float(), -1)
            self.divergences += _floats((p.exp() * (p - q)).sum(-1).clamp_min(0))
            self.agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
            following = torch.tensor(ids[start + 1 : start + 1 + _ROWS], device=q.device)
            self.losses += _floats(-q[: len(following)].gather(1, following[:, None])[:, 0])

    def row(self, engine: Engine, reference: Recipe) -> EvalRow:
        loss = statistics.fmean(self.losses)
        error = statistics.stdev(self.losses) / math.sqrt(len(self.losses)) if len(self.losses) > 1 else 0.0
        ordered = sorted(self.divergences)
        perplexity = math.exp(min(loss, 700.0))
        return EvalRow(
            model=engine.card.model,
            recipe=engine.card.recipe,
            kv=engine.card.kv,
            size=engine.card.weight_bytes,
            kv_bytes_per_token=engine.card.kv_bytes_per_token,
            reference=reference.label,
            tokens=len(self.losses),
            perplexity=perplexity,
            perplexity_error=perplexity * error,
            kl_mean=statistics.fmean(ordered),
            kl_median=statistics.median(ordered),
            kl_p99=ordered[min(len(ordered) - 1, math.ceil(0.99 * len(ordered)) - 1)],
            top1=self.agreed / len(ordered),
        )
