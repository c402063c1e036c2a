"""How likely a model itself held each token of a reply, before any constraint, penalty or temperature. Numbers only."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qrun.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

MOST = 20
"""Alternatives a token may come with."""


@dataclass(frozen=True)
class TokenLogprob:
    """A chosen token, the natural logarithm of its probability, and the likeliest tokens with theirs, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class LogprobReader:
    """Takes log probabilities from logits where they lie and brings them over together with the token."""

    def __init__(self, count: int, vocab: int, device: object) -> None:
        """count: alternatives a token, from 0 to `MOST`. Raises UsageError for another number."""
        import torch

        check_count(count)
        self._count = min(count, vocab)
        pinned = torch.device(str(device)).type != "cpu"  # else a copy would wait for the step that is under way
        self._values = torch.empty(self._count + 1, pin_memory=pinned)
        self._ids = torch.empty(self._count + 1, dtype=torch.long, pin_memory=pinned)

    def __call__(self, logits: "Tensor", token: "Tensor") -> Callable[[], TokenLogprob]:
        """Of logits [1, V] float32 and the token [1] chosen from them; what is returned gives the numbers.

        It may be called once the token has arrived by a fetch that began after this. The logits may be overwritten by
        what is launched later.
        """
        import torch

        chances = logits[0].log_softmax(-1)
        values, ids = chances.topk(self._count)
        self._values.copy_(torch.cat((chances[token], values)), non_blocking=True)
        self._ids.copy_(torch.cat((token, ids)), non_blocking=True)
        return self._read

    def _read(self) -> TokenLogprob:
        kept: Any = self._ids, self._values
        ids: list[int] = kept[0].tolist()
        values: list[float] = kept[1].tolist()
        return TokenLogprob(ids[0], values[0], tuple(zip(ids[1:], values[1:], strict=True)))


def check_count(count: int) -> None:
    """Raises UsageError unless 0 … `MOST` alternatives are asked for."""
    if not 0 <= count <= MOST:
        raise UsageError(f"logprobs is {count}: it must be from 0 to {MOST}, the alternatives shown for each token")
