"""Products in plain torch for what no kernel of an Intel GPU reads: some rows are expanded, multiplied, and let go."""

import torch
import torch.nn.functional as F
from torch import Tensor

from qrun.backends.base import TILE
from qrun.backends.xpu_device import XPUCard
from qrun.backends.xpu_matrix import Placed, expand
from qrun.backends.xpu_native import rounding
from qrun.backends.xpu_tiers import LinearKernel, Multiply


def _bind(placed: Placed, card: XPUCard, activations: str) -> Multiply:
    rounded, half = rounding(activations), card.half
    if placed.kind == "plain" and placed.factor is None:
        return lambda x: F.linear(rounded(x), placed.codes)
    step = max(1, TILE // placed.kp)

    def call(x: Tensor) -> Tensor:
        x = rounded(x)
        out = torch.empty(x.shape[0], placed.n, dtype=half, device=x.device)
        for start in range(0, placed.n, step):
            stop = min(start + step, placed.n)
            out[:, start:stop] = F.linear(x, expand(placed, start, stop, half))
        return out

    return call


LINEARS: tuple[LinearKernel, ...] = (
    LinearKernel(
        tier="torch", name="torch matmul", most=None, bind=_bind,
        takes=lambda placed, card, activations: placed.kind == "plain",
    ),
    LinearKernel(
        tier="torch", name="torch expand + matmul", most=None, bind=_bind, fallback=True,
        takes=lambda placed, card, activations: placed.kind != "plain",
    ),
)  # fmt: skip
