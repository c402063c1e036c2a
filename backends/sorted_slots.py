"""Which tokens each expert has, in blocks that a GPU takes without the host looking. It knows no weights."""

import torch
from torch import Tensor


def sorted_slots(chosen: Tensor, experts: int, columns: int) -> tuple[Tensor, Tensor]:
    """Slots by expert in blocks of columns, from chosen [M, slots]: order int32 [blocks, columns] and owners [blocks].

    Every block has one expert; what is left of its columns, and of the blocks, is -1. Their number depends on shapes
    alone, so that nothing waits for the device.
    """
    flat = chosen.flatten().long()
    blocks = -(-flat.shape[0] // columns) + experts
    slot = torch.argsort(flat, stable=True)
    expert = flat[slot]
    counts = torch.zeros(experts, dtype=torch.long, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))
    ends = ((counts + columns - 1) // columns).cumsum(0)  # of each expert's blocks
    starts = ends - (counts + columns - 1) // columns
    rank = torch.arange(flat.shape[0], device=flat.device) - (counts.cumsum(0) - counts)[expert]
    order = torch.full((blocks * columns,), -1, dtype=torch.int32, device=flat.device)
    order[starts[expert] * columns + rank] = slot.int()
    owners = torch.searchsorted(ends, torch.arange(blocks, device=flat.device), right=True).clamp_(max=experts - 1)
    return order.view(blocks, columns), owners.int()
