"""The cheapest path through a trellis of two-bit codes, for many rows at once.

A weight's value is looked up by six bits: its own code and the two that follow. So four codes are open at each step
whatever came before, and sixteen survivors hold all that the past can mean. Knows no layouts and no scales.
"""

from typing import Final

import torch
from torch import Tensor

STATES: Final = 64
"""Windows of three codes: code i lowest, then i + 1 and i + 2."""
_SURVIVORS: Final = STATES // 4
_NEVER: Final = 1e30


def cheapest(target: Tensor, scale: Tensor, table: Tensor, *, after: Tensor | None = None, end: bool = True) -> Tensor:
    """The states s [R, K], u8, of least Σ_k (target − table[s] · scale)² in each row, whose codes are ``s & 3``.

    Args:
        target: [R, K] float32. ``scale`` is alike; a step counts as the square of what multiplies both.
        table: the value of each state, float32 [64].
        after: the states u8 [R] that precede the first; without them any may begin.
        end: whether two codes of 0 follow the last one, otherwise any may.
    """
    if target.device.type != "cpu":
        return in_torch(target, scale, table, after, end)
    from qrun.kernels.cpu_viterbi import search  # not before it is needed: the compiler takes its time to import

    first = torch.empty(0, dtype=torch.uint8) if after is None else after
    states = torch.empty(target.shape, dtype=torch.uint8)
    parts = (target, scale, table, first)
    search(*(part.contiguous().numpy() for part in parts), end, states.numpy())
    return states


def in_torch(target: Tensor, scale: Tensor, table: Tensor, after: Tensor | None, end: bool) -> Tensor:
    """The same on any device, all rows a step at a time."""
    rows, steps = target.shape
    targets, scales = target.t().contiguous(), scale.t().contiguous()
    values = table.view(STATES, 1)
    least = target.new_zeros(_SURVIVORS, rows)
    if after is not None:
        least.fill_(_NEVER).scatter_(0, (after.long() >> 2)[None], 0.0)
    branches = torch.arange(4, dtype=torch.int32, device=target.device).view(4, 1)
    cost, miss = target.new_empty(4, _SURVIVORS, rows), target.new_empty(STATES, rows)
    came = torch.empty(steps, _SURVIVORS, rows, dtype=torch.uint8, device=target.device)
    for k in range(steps):
        if k:
            # Costs are positive, so their bits sort as they do: the lowest two make room for where each came from.
            marked = cost.view(torch.int32).view(_SURVIVORS, 4, rows).bitwise_and_(-4).bitwise_or_(branches)
            torch.amin(marked, 1, out=least.view(torch.int32))
            came[k] = least.view(torch.int32) & 3
        torch.addcmul(targets[k], values, scales[k], value=-1, out=miss)
        torch.mul(miss, miss, out=miss)
        torch.add(least, miss.view(4, _SURVIVORS, rows), out=cost)
    states = torch.empty(steps, rows, dtype=torch.uint8, device=target.device)
    state = cost.view(STATES, rows)[: 4 if end else STATES].argmin(0)
    for k in range(steps - 1, -1, -1):
        states[k] = state
        survivor = state & (_SURVIVORS - 1)
        state = (survivor << 2) | came[k].gather(0, survivor[None])[0]
    return states.t().contiguous()
