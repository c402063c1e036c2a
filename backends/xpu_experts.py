"""A few tokens by their chosen experts on an Intel GPU, the experts gathered first or read where they lie. It knows no
router, and nothing of many tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qrun.backends.base import BOUNDS
from qrun.backends.xpu_device import XPUCard
from qrun.backends.xpu_pointwise import difference
from qrun.backends.xpu_product import describe
from qrun.backends.xpu_stack import Stack, axis_of
from qrun.backends.xpu_tiers import LinearKernel, Tier, Tiers
from qrun.backends.xpu_triton import usable
from qrun.kernels import reference

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]
"""h half [S, H], gates float32 and chosen int64 [S, k] -> the weighted sums of the chosen experts, float32 [S, H]."""


@dataclass(frozen=True, kw_only=True)
class Few:
    """One way for a few tokens. most: those up to which it is faster than gathering every expert. fallback: it expands
    the chosen ones."""

    tier: Tier
    name: str
    most: int
    call: Experts
    fallback: bool = False


def few(
    up: Stack, down: Stack, kernels: tuple[LinearKernel, LinearKernel], card: XPUCard, tiers: Tiers, *, slots: int
) -> Few:
    """The way that is right on this card for so many slots a token.

    In place before gathered: that reads each expert once, and gathering reads, writes and reads it.
    """
    names = dict.fromkeys(kernel.name for kernel in kernels)
    first = Few(
        tier="torch",
        name=f"{' and '.join(names)}, experts gathered",
        most=max(1, min(32, 2 * up.experts // slots)),
        call=gathered(up, down, kernels, card),
        fallback=any(kernel.fallback for kernel in kernels),
    )
    ways = [first]
    if usable(card) and "plain" not in (up.whole.kind, down.whole.kind):
        most = max(1, 4 * up.experts // slots)
        ways.append(Few(tier="triton", name="triton, experts in place", most=most, call=in_place(up, down)))

    def trial(way: Few) -> tuple[float, float]:
        random = torch.Generator().manual_seed(0)
        errors: list[float] = []
        for tokens in (1, 2):
            h = torch.randn(tokens, up.whole.k, generator=random).to(card.device, card.half)
            gates = torch.rand(tokens, slots, generator=random).to(card.device)
            chosen = torch.stack([torch.randperm(up.experts, generator=random)[:slots] for _ in range(tokens)])
            chosen = chosen.to(card.device)
            errors.append(difference(way.call(h, gates, chosen), first.call(h, gates, chosen)))
        return max(errors), 2 * BOUNDS["16"]

    return tiers.choose(f"experts {describe(up.whole, card, '16')}, {describe(down.whole, card, '16')}", ways, trial)


def gathered(up: Stack, down: Stack, kernels: tuple[LinearKernel, LinearKernel], card: XPUCard) -> Experts:
    """A token after the other: one product for all its gates and ups, one for the weighted sum of its downs."""
    kernel_up, kernel_down = kernels

    def one(h: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        slots = chosen.shape[0]
        both = kernel_up.bind(up.take(chosen), card, "16")(h).float().view(slots, -1)
        if up.ratio is not None:
            both = both * up.ratio.index_select(0, chosen)[:, None]
        inner = (reference.silu_mul(both) * gates[:, None]).to(card.half)
        multiply = kernel_down.bind(down.take(chosen), card, "16")
        if down.end_to_end:
            return multiply(widened(inner, down.width).view(1, -1)).float()
        # Every slot by every expert reads no more than each by its own, and is one product.
        each = multiply(inner).view(slots, slots, -1)
        return each.diagonal(dim1=0, dim2=1).sum(-1, dtype=torch.float32)[None]

    def call(h: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        if h.shape[0] == 1:
            return one(h, gates[0], chosen[0])
        return torch.cat([one(h[t : t + 1], gates[t], chosen[t]) for t in range(h.shape[0])])

    return call


def in_place(up: Stack, down: Stack) -> Experts:
    """All tokens in two launches of a Triton kernel that finds each slot's expert by its index."""
    from qrun.kernels.xpu_gemv import Matrix, Routed, gemv

    def matrix(experts: Stack, factor: Tensor | None) -> Matrix:
        one = experts.whole
        assert one.kind != "plain" and one.scale is not None, "plain weights have no codes"
        codes, across = axis_of("codes", experts.end_to_end), axis_of("scale", experts.end_to_end)
        return Matrix(
            kind=one.kind, n=one.n, k=one.k, kp=one.kp, group=one.group, codes=one.codes, scale=one.scale,
            zero=one.zero, offset=one.offset, table=one.table, factor=factor,
            codes_expert=one.codes.stride(codes), codes_row=one.codes.stride(1 - codes),
            scale_expert=one.scale.stride(across), scale_group=one.scale.stride(1 - across),
        )  # fmt: skip

    largest = up.whole.factor
    widen = matrix(up, largest if largest is None or up.ratio is None else largest * up.ratio)
    narrow = matrix(down, down.whole.factor)  # the ratios are in the gates

    def call(h: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        tokens, slots = chosen.shape
        flat = chosen.flatten()
        both = torch.empty(tokens * slots, up.whole.n, device=h.device)
        gemv(h, both, widen, routed=Routed(chosen=flat, slots=slots, shared_rows=True))
        out = torch.empty(tokens, down.whole.n, device=h.device)
        routed = Routed(chosen=flat, slots=slots, shared_rows=False, gates=gates.flatten())
        gemv(reference.silu_mul(both), out, narrow, routed=routed)
        return out

    return call


def widened(inner: Tensor, width: int) -> Tensor:
    """Zeros behind the columns."""
    return F.pad(inner, (0, width - inner.shape[-1])) if width > inner.shape[-1] else inner
