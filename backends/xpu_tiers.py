"""Which kernel an operation runs on: candidates in the order of their tiers, each tried once against plain torch.

What a trial found is kept by device, driver and versions, so only the first start after a change pays for it. It knows
no kernel itself: what an operation is, and how it is tried, are the caller's.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from qrun.backends import kept
from qrun.backends.base import Trial
from qrun.backends.xpu_device import XPUCard
from qrun.errors import BackendError
from qrun.paths import cache_dir
from qrun.resident import ran_out

if TYPE_CHECKING:
    from qrun.backends.xpu_matrix import Placed

Tier = Literal["native", "ipex", "triton", "torch"]
TIERS: tuple[Tier, ...] = ("native", "ipex", "triton", "torch")
Multiply = Callable[[Tensor], Tensor]
"""x half [M, K], contiguous -> [M, N], half or float32."""


@dataclass(frozen=True, kw_only=True)
class LinearKernel:
    """One way to multiply by a weight.

    takes: whether it has a kernel for the weight, on the card, with activations of that type, from kinds, groups and
    dtypes alone. bind: the product without a bias. most: tokens it takes at most. fallback: it expands the weight.
    """

    tier: Tier
    name: str
    most: int | None
    takes: "Callable[[Placed, XPUCard, str], bool]"
    bind: "Callable[[Placed, XPUCard, str], Multiply]"
    fallback: bool = False


class Note(Protocol):
    """`Backend.note`."""

    def __call__(self, op: str, scheme: object, kernel: str, *, fallback: bool = False) -> None: ...


class Candidate(Protocol):
    """What can be chosen: it has a tier and a name that is unique among the candidates of an operation."""

    @property
    def tier(self) -> Tier: ...

    @property
    def name(self) -> str: ...


C = TypeVar("C", bound=Candidate)


class Tiers:
    """The order of the tiers on a card, ``first`` before the others, and the trials that were made.

    ``progress`` is told of each trial that is not known from an earlier start, for its kernel may be compiled for long.
    """

    def __init__(
        self,
        card: XPUCard,
        *,
        first: Tier | None = None,
        folder: Path | None = None,
        progress: Callable[[str], None] = lambda what: None,
    ) -> None:
        self.card = card
        self._progress = progress
        self.order = TIERS if first is None else (first, *(tier for tier in TIERS if tier != first))
        name = "".join(c if c.isalnum() else "-" for c in f"{card.name} {card.driver} {_versions()}")
        self._file = (folder or cache_dir() / "xpu") / f"{name}.json" if card.real else None
        self._known = {} if self._file is None else _known(self._file)
        self.trials: list[Trial] = []

    def choose(self, op: str, candidates: Sequence[C], trial: Callable[[C], tuple[float, float]]) -> C:
        """The first candidate, by tier, whose trial passes; the last one of all is not tried.

        ``op`` names the operation with all that its kernels depend on. ``trial`` gives the relative error and the bound
        that it must not exceed; whatever it raises is the candidate's failure, but that memory ran out.
        """
        ordered = sorted(candidates, key=lambda candidate: self.order.index(candidate.tier))
        for candidate in ordered[:-1]:
            if self._trial(op, candidate, trial).passed:
                return candidate
        return ordered[-1]

    def _trial(self, op: str, candidate: C, trial: Callable[[C], tuple[float, float]]) -> Trial:
        key = f"{op} | {candidate.tier} | {candidate.name}"
        found = self._known.get(key)
        if found is None:
            found = self._made(op, candidate, trial)
            self._known[key] = found
            if self._file is not None:
                kept.write(self._file, {name: vars(made) for name, made in self._known.items()})
        if found not in self.trials:
            self.trials.append(found)
        return found

    def _made(self, op: str, candidate: C, trial: Callable[[C], tuple[float, float]]) -> Trial:
        self._progress(f"trying kernels on this GPU, once: {candidate.name}, {op}")
        try:
            with torch.no_grad():
                error, bound = trial(candidate)
        except Exception as error:  # a kernel that this driver or torch does not have: anything
            if ran_out(error) is not None:
                raise  # says nothing of the kernel
            reason = (str(error).splitlines() or [""])[0][:160] or type(error).__name__
            return Trial(op, candidate.tier, candidate.name, None, reason)
        wrong = "" if error <= bound else f"wrong: its error is {error:.2g}, at most {bound:.2g} is right"
        return Trial(op, candidate.tier, candidate.name, error, wrong)


def tier_of(name: str | None) -> Tier | None:
    """A tier by its name. Raises BackendError for a name that none has."""
    known: dict[str | None, Tier | None] = {None: None, **{tier: tier for tier in TIERS}}
    if name not in known:
        raise BackendError(f"unknown tier {name!r}: use one of {', '.join(TIERS)}")
    return known[name]


def _versions() -> str:
    found = [f"torch {torch.__version__}"]
    for name in ("triton-xpu", "pytorch-triton-xpu", "triton", "intel-extension-for-pytorch", "qrun-llm"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return " ".join(found)


def _known(file: Path) -> dict[str, Trial]:
    try:
        return {key: Trial(**trial) for key, trial in kept.read(file).items()}
    except TypeError:  # of another version
        return {}
