"""The experts of one matrix on an Intel GPU, laid out so that some of them are one weight after a single gather.

It knows where their parts lie, not what multiplies by them.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qrun.backends.xpu_matrix import Placed, place
from qrun.formats import QTensor

PARTS = ("codes", "scale", "zero", "offset")


@dataclass(frozen=True, kw_only=True, eq=False)
class Stack:
    """Experts [E, n, k], whose chosen ones become one weight: [s·n, k], or [n, s·kp] where it is ``end_to_end``.

    ``whole`` is a `Placed` of one expert's n and k but all experts' tensors, with an axis of experts: codes [E, n, ·]
    and scale, zero, offset [G, E, n]; end to end codes [n, E, ·] and the others [E, G, n]. Its factor is the largest of
    the experts', ``ratio`` [E] each one's part of it; none where they have no factors.
    """

    whole: Placed
    end_to_end: bool
    ratio: Tensor | None

    @property
    def experts(self) -> int:
        return self.whole.codes.shape[axis_of("codes", self.end_to_end)]

    @property
    def width(self) -> int:
        """Columns of each expert: what its x is padded to."""
        return self.whole.kp if self.end_to_end else self.whole.k

    def take(self, experts: Tensor) -> Placed:
        """The experts [s] as one weight. Shapes depend on s alone."""
        parts: dict[str, Tensor] = {}
        for name in PARTS:
            tensor = getattr(self.whole, name)
            if tensor is not None:
                axis = axis_of(name, self.end_to_end)
                raw = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor  # gathered anywhere
                parts[name] = raw.index_select(axis, experts).flatten(axis, axis + 1).view(tensor.dtype)
        count = experts.shape[0]
        if self.end_to_end:
            return replace(self.whole, k=count * self.width, **parts)
        return replace(self.whole, n=count * self.whole.n, **parts)


def joins(one: QTensor, half: torch.dtype) -> bool:
    """Whether experts like this one stay a weight end to end: not with one float32 scale a row, which kernels apply to
    the product."""
    placed = place(one, half)
    return placed.kind in ("fp8", "plain") or (placed.scale is not None and placed.scale.dtype == half)


def stack(weight: QTensor, half: torch.dtype, *, end_to_end: bool) -> Stack:
    """The experts [E, n, k] of a weight, placed one after the other.

    Where the codes stay as they are, they are the weight's own. Else there are two copies of this matrix's codes until
    the caller lets go of the weight, never more: all else is one expert's at a time.
    """
    first = place(weight[0], half)
    experts = weight.shape[0]
    parts: dict[str, Tensor] = {}
    if not end_to_end and _same_memory(first.codes, weight.codes):
        parts["codes"] = weight.codes.view(first.codes.dtype).view(experts, *first.codes.shape)
    fresh = [name for name in PARTS if name not in parts and getattr(first, name) is not None]
    for name in fresh:
        shape = list(getattr(first, name).shape)
        shape.insert(axis_of(name, end_to_end), experts)
        parts[name] = torch.empty(shape, dtype=getattr(first, name).dtype, device=weight.device)
    factors: list[Tensor | None] = []
    for e in range(experts):
        one = first if e == 0 else place(weight[e], half)
        for name in fresh:
            parts[name].select(axis_of(name, end_to_end), e).copy_(getattr(one, name))
        factors.append(one.factor)
    if all(factor is None for factor in factors):
        return Stack(whole=replace(first, **parts), end_to_end=end_to_end, ratio=None)
    none = torch.ones((), device=weight.device)
    each = torch.stack([none if factor is None else factor.reshape(()) for factor in factors])
    largest = each.max()
    return Stack(whole=replace(first, factor=largest, **parts), end_to_end=end_to_end, ratio=each / largest)


def axis_of(name: str, end_to_end: bool) -> int:
    """Where the experts are in a part; the other one of the first two axes is the rows of codes, the groups else."""
    return int(end_to_end) if name == "codes" else int(not end_to_end)


def _same_memory(placed: Tensor, codes: Tensor) -> bool:
    return placed.data_ptr() == codes.data_ptr() and placed.nbytes * codes.shape[0] == codes.nbytes
