"""An Intel GPU that is a CPU: the same backend and kernels, on tensors that are here."""

import pytest
import torch

from qrun.backends import xpu_attention, xpu_experts, xpu_pointwise, xpu_triton
from qrun.backends.xpu_device import XPUCard


def card(half: torch.dtype = torch.bfloat16, *, dots: bool = True) -> XPUCard:
    """A card on the CPU."""
    return XPUCard(
        device=torch.device("cpu"), name="stand-in", driver="0", memory=1 << 34, integrated=False, half=half, dots=dots,
        real=False,
    )  # fmt: skip


def without_triton(patch: pytest.MonkeyPatch) -> None:
    """No kernel runs under Triton's interpreter, where a small one takes a second."""
    for module in (xpu_attention, xpu_experts, xpu_pointwise, xpu_triton):
        patch.setattr(module, "usable", lambda card: False)
