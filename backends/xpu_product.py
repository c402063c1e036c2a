"""One weight bound to an Intel GPU's kernels: one for a few tokens, one for many. It knows a weight, not the block
around it."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from qrun.backends.base import BOUNDS
from qrun.backends.xpu_buckets import bucket
from qrun.backends.xpu_device import XPUCard
from qrun.backends.xpu_matrix import Placed, expand
from qrun.backends.xpu_pointwise import difference
from qrun.backends.xpu_tiers import LinearKernel, Tiers

FEW = 8
"""Tokens that a kernel for a few of them takes."""
TRIAL_ROWS = 256
"""Rows of a weight that kernels are tried on."""


def choose(
    placed: Placed, kernels: Sequence[LinearKernel], card: XPUCard, tiers: Tiers, activations: str
) -> tuple[LinearKernel, LinearKernel]:
    """The kernels for at most `FEW` and for more tokens, from those that take the weight; each tried on rows of it."""
    able = [kernel for kernel in kernels if kernel.takes(placed, card, activations)]

    def trial(kernel: LinearKernel, counts: tuple[int, ...]) -> tuple[float, float]:
        some = rows_of(placed, min(placed.n, TRIAL_ROWS))
        call = kernel.bind(some, card, activations)
        weight = expand(some, 0, some.n, torch.float32)
        random = torch.Generator().manual_seed(0)
        errors: list[float] = []
        for tokens in counts:
            x = torch.randn(tokens, placed.k, generator=random).to(card.device, card.half)
            errors.append(difference(call(x), x.float() @ weight.t()))
        return max(errors), BOUNDS[activations]

    key = describe(placed, card, activations)
    few = tiers.choose(f"{key}, few", able, lambda kernel: trial(kernel, (1, FEW)))
    many = tiers.choose(f"{key}, many", [k for k in able if k.most is None], lambda kernel: trial(kernel, (FEW, 40)))
    return few, many


def describe(placed: Placed, card: XPUCard, activations: str) -> str:
    """All that a kernel's being right depends on, in words."""
    marks = [name for name in ("zero", "offset", "factor") if getattr(placed, name) is not None]
    group = "channel" if placed.group >= placed.k else f"g{placed.group}"
    ragged = [f"{name} ragged" for name, size, whole in (("n", placed.n, 32), ("k", placed.k, 64)) if size % whole]
    half = str(card.half).removeprefix("torch.")
    return " ".join([placed.kind, group, *marks, half, f"A{activations}", *ragged])


def rows_of(placed: Placed, count: int) -> Placed:
    """The first rows of a weight, as a weight."""
    across = {name: getattr(placed, name) for name in ("scale", "zero", "offset")}
    cut = {name: None if tensor is None else tensor[:, :count].contiguous() for name, tensor in across.items()}
    return replace(placed, n=count, codes=placed.codes[:count], **cut)


class Product:
    """x half [S, K] -> x Wᵀ + bias [S, N], half or float32."""

    def __init__(
        self, placed: Placed, bias: Tensor | None, kernels: tuple[LinearKernel, LinearKernel], card: XPUCard,
        activations: str,
    ) -> None:  # fmt: skip
        few, many = kernels
        self._few = few.bind(placed, card, activations)
        self._many = self._few if many is few else many.bind(placed, card, activations)
        self._bias = None if bias is None else bias.float()
        self.kernel = few.name if many.name == few.name else f"{few.name}, many tokens {many.name}"
        self.fallback = few.fallback

    def __call__(self, x: Tensor) -> Tensor:
        tokens = x.shape[0]
        if tokens <= FEW:
            y = self._few(x)
        else:
            # Every new number of rows is compiled for, which takes longer than some rows more.
            y = self._many(F.pad(x, (0, 0, 0, bucket(tokens) - tokens)))[:tokens]
        return y if self._bias is None else y.float() + self._bias


def rounded(x: Tensor, half: torch.dtype) -> Tensor:
    """x as products take it."""
    return x.to(half).contiguous()
