"""One option for each of several things, the cheapest together that a size allows. It knows no models.

Dynamic programming over sizes on a grid: exact where the grid has a cell for every size, else within a cell a thing,
and what the grid leaves over is spent on the best single changes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

CELLS: Final = 1 << 15


@dataclass(frozen=True)
class Option:
    size: int
    cost: float


def choose(things: Sequence[Sequence[Option]], limit: int) -> list[int] | None:
    """The index of the option of each thing, the sum of costs least with sizes of ``limit`` at most together.

    None if not even the smallest options fit.
    """
    smallest = [min(option.size for option in options) for options in things]
    room = limit - sum(smallest)
    if room < 0:
        return None
    extra = [[option.size - least for option in options] for options, least in zip(things, smallest, strict=True)]
    room = min(room, sum(max(sizes) for sizes in extra))
    unit = math.gcd(*(size for sizes in extra for size in sizes)) or 1
    step = max(unit, -(-room // CELLS))
    cells = room // step + 1
    best = torch.zeros(cells, dtype=torch.float64)  # by size in steps at most
    taken: list[torch.Tensor] = []
    for options, sizes in zip(things, extra, strict=True):
        sums = torch.full((len(options), cells), math.inf, dtype=torch.float64)
        for i, (option, size) in enumerate(zip(options, sizes, strict=True)):
            at = -(-size // step)
            if at < cells:
                sums[i, at:] = best[: cells - at] + option.cost
        best, which = sums.min(0)
        taken.append(which.to(torch.int16))
    chosen: list[int] = []
    at = cells - 1
    for which, sizes in zip(reversed(taken), reversed(extra), strict=True):
        chosen.append(int(which[at]))
        at -= -(-sizes[chosen[-1]] // step)
    chosen.reverse()
    return _spend(things, chosen, limit)


def _spend(things: Sequence[Sequence[Option]], chosen: list[int], limit: int) -> list[int]:
    """Change one thing after another to an option that costs less, as long as one fits; the largest saving first."""
    left = limit - sum(options[i].size for options, i in zip(things, chosen, strict=True))
    while True:
        savings = [
            (options[i].cost - option.cost, n, j)
            for n, (options, i) in enumerate(zip(things, chosen, strict=True))
            for j, option in enumerate(options)
            if option.cost < options[i].cost and option.size - options[i].size <= left
        ]
        if not savings:
            return chosen
        _, n, j = max(savings)
        left -= things[n][j].size - things[n][chosen[n]].size
        chosen[n] = j
