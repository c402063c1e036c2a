"""Mixture-of-experts blocks on an Intel GPU without the host looking at which experts were chosen: a token's are
gathered and multiplied as one weight, those of many tokens one after the other. It knows no kernel itself."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qrun.backends.base import MoESpec, MoEWeights
from qrun.backends.sorted_slots import sorted_slots
from qrun.backends.xpu_buckets import bucket
from qrun.backends.xpu_device import XPUCard
from qrun.backends.xpu_experts import few, widened
from qrun.backends.xpu_matrix import places
from qrun.backends.xpu_product import choose
from qrun.backends.xpu_stack import joins, stack
from qrun.backends.xpu_tiers import LinearKernel, Multiply, Note, Tiers
from qrun.formats import QTensor
from qrun.kernels import reference

SLOTS = 1 << 27
"""Numbers that the chosen experts of all tokens may give at once, 256 MiB; more tokens go one part after the other."""
GATHER_ROWS = 512
"""Rows that an expert multiplies in the time that gathering it and launching its kernels takes: hundreds of µs, where
a row of a few million weights takes a part of one."""


def stacks(weights: MoEWeights) -> bool:
    """Whether `MoEBlock` can have the experts: both matrices in formats that are placed."""
    return places(weights.gate_up[0]) and places(weights.down[0])


class MoEBlock:
    """x float32 [S, H] -> x + the chosen experts' weighted sum + the shared experts, all of norm(x).

    Shapes depend on S, the number of experts and of chosen ones alone, and nothing is copied to the host.
    """

    recordable = True
    """Whether a step of one token can be recorded and replayed."""

    def __init__(
        self, eps: float, spec: MoESpec, weights: MoEWeights, card: XPUCard, tiers: Tiers, note: Note, *,
        kernels: Sequence[LinearKernel], shared: Multiply | None,
    ) -> None:  # fmt: skip
        """``shared``, or none, is what the shared experts make of norm(x)."""
        self._eps, self._spec, self._card, self._shared = eps, spec, card, shared
        self._norm = weights.norm.float().contiguous()
        self._router = weights.router.float().contiguous()
        self._correction = None if weights.correction is None else weights.correction.float().contiguous()
        # Products are bound in every step, for which IPEX's would repack the weight.
        kernels = [kernel for kernel in kernels if kernel.tier != "ipex"]
        slots = torch.arange(spec.top_k, device=weights.norm.device)

        def chosen(weight: QTensor, *, end_to_end: bool) -> tuple[LinearKernel, LinearKernel]:
            some = stack(weight[: spec.top_k], card.half, end_to_end=end_to_end).take(slots)
            able = [each for each in kernels if end_to_end or each.most is None or each.most >= spec.top_k]
            return choose(some, able, card, tiers, "16")

        end_to_end = joins(weights.down[0], card.half)
        one_up, self._widen = chosen(weights.gate_up, end_to_end=False)
        one_down, self._narrow = chosen(weights.down, end_to_end=end_to_end)
        self._up = stack(weights.gate_up, card.half, end_to_end=False)
        self._down = stack(weights.down, card.half, end_to_end=end_to_end)
        self._few = few(self._up, self._down, (one_up, one_down), card, tiers, slots=spec.top_k)
        self._most = max(1, SLOTS // (spec.top_k * self._down.whole.n))
        for op, weight, many in (
            ("experts gate_up", weights.gate_up, self._widen), ("experts down", weights.down, self._narrow)
        ):  # fmt: skip
            note(op, weight.format, f"{self._few.name}; many tokens {many.name}", fallback=self._few.fallback)

    def __call__(self, x: Tensor) -> Tensor:
        spec = self._spec
        h = reference.rms_norm(x, self._norm, self._eps)
        gates, chosen = reference.route(
            h, self._router, self._correction, spec.top_k, normalise=spec.normalise, norm_min=spec.norm_min
        )
        if self._down.ratio is not None:
            gates = gates * self._down.ratio[chosen]
        h = h.to(self._card.half)
        out = x if self._shared is None else x + self._shared(h)
        if x.shape[0] <= self._few.most:
            return out + self._few.call(h, gates, chosen)
        parts = (torch.split(each, self._most) for each in (h, gates, chosen))
        each = [self._many(*part) for part in zip(*parts, strict=True)]
        return out + (each[0] if len(each) == 1 else torch.cat(each))

    def _many(self, h: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        """As `Experts`, of h [S, H], gates and chosen [S, k]: slots by expert, in blocks gathered one by one."""
        card, up, down = self._card, self._up, self._down
        slots = chosen.shape[1]
        # Every new shape is compiled for: tokens are as many as in a bucket, those that are not there with gates of 0.
        tokens = bucket(h.shape[0])
        more, count = tokens - h.shape[0], tokens * slots
        chosen = F.pad(chosen, (0, 0, 0, more))
        order, owners = sorted_slots(chosen, up.experts, _columns(count, up.experts))
        order, owners = order[:count], owners[:count]  # what is used comes first, and no block of it is empty
        order = torch.where(order < 0, count, order.long())  # what is left of a block: one row more of zeros
        gates = F.pad(gates.flatten(), (0, more * slots + 1))[order]
        x = F.pad(h, (0, 0, 0, more + 1))
        each = torch.empty(count + 1, down.whole.n, dtype=card.half, device=h.device)
        for i in range(order.shape[0]):
            block, expert = order[i], owners[i : i + 1]
            both = self._widen.bind(up.take(expert), card, "16")(x.index_select(0, block // slots)).float()
            if up.ratio is not None:
                both = both * up.ratio.index_select(0, expert)
            inner = (reference.silu_mul(both) * gates[i, :, None]).to(card.half)
            y = self._narrow.bind(down.take(expert), card, "16")(widened(inner, down.width))
            each.index_copy_(0, block, y.to(card.half))
        return each[: h.shape[0] * slots].view(h.shape[0], slots, -1).sum(1, dtype=torch.float32)


def _columns(slots: int, experts: int) -> int:
    """Columns of a block, a power of two: with slots/columns + experts blocks, the least time is near the root of what
    gathering is worth in columns times an expert's slots."""
    return 1 << max(4, round(math.log2(GATHER_ROWS * slots / experts) / 2))
