"""Trellis codes whose errors make up for each other: GPTQ, where a path is chosen instead of a nearest value.

Columns are taken in short blocks. A block's path is searched as if the columns after it were to be decided with it, a
few of which are; then its errors are spread over those that follow. Knows neither layers nor files.
"""

from typing import Final

import torch
from torch import Tensor

from qrun.formats import QTensor, from_tensors
from qrun.formats.base import pad_columns
from qrun.formats.packing import unpack
from qrun.formats.trellis import GROUP, TrellisFormat, encode, store
from qrun.formats.viterbi import cheapest
from qrun.quantize.gptq import Hessian, inverse_root

_BLOCK: Final = 8
"""Columns that are settled at a time."""
_AHEAD: Final = 12
"""Further ones that the search looks at."""


def trellis_gptq(w: Tensor, hessian: Hessian) -> QTensor:
    """w [N, K] float32 as `TrellisFormat`, the error of its outputs on the observed inputs made small.

    Scales are those of the format's own search, with each column's error counted by the importance of its input.
    """
    (n, k), form = w.shape, TrellisFormat()
    seen = hessian.count > 0 and bool(hessian.sum.any())
    first = encode(w, hessian.importance if seen else None)
    if not seen:
        return from_tensors(form, (n, k), first)
    steps, row = unpack(first["scale"], 4).float(), first["scale2"].float()
    scale = (steps * row).repeat_interleave(GROUP, 1)  # [N, Kp]
    work = pad_columns(w, 2 * GROUP).clone()
    width = work.shape[1]
    inverse = torch.eye(width, device=w.device)
    inverse[:k, :k] = inverse_root(hessian.sum)
    # What an error in a column costs once the others have made up for it. What padding holds costs nothing.
    cost = inverse.diagonal().amin() / inverse.diagonal()
    cost[k:] = 0
    table = form.table(w.device)
    states = torch.empty(n, width, dtype=torch.uint8, device=w.device)
    after: Tensor | None = None
    for start in range(0, width, _BLOCK):
        stop, seen_to = start + _BLOCK, min(start + _BLOCK + _AHEAD, width)
        target, each = (part[:, start:seen_to] * cost[start:seen_to] for part in (work, scale))
        path = cheapest(target, each, table, after=after, end=seen_to == width)[:, :_BLOCK]
        after = path[:, -1]
        states[:, start:stop] = path
        values = table.index_select(0, path.reshape(-1).int()).view(n, _BLOCK) * scale[:, start:stop]
        errors = (work[:, start:stop] - values) @ inverse[start:stop, start:stop].inverse()
        work[:, stop:].addmm_(errors, inverse[start:stop, stop:], alpha=-1)
    return from_tensors(form, (n, k), store(states, steps, row))
