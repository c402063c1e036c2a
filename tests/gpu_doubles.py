"""Where the GPU kernels are tested: on the GPU where there is one, else under Triton's interpreter on the CPU."""

import torch

from qrun.backends.cuda_device import Card, find_card

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]
"""What kernels multiply in: the interpreter's bfloat16 arithmetic is wrong."""

SLACK = 8 if DEVICE == "cuda" else 1
"""How much further apart results may be in the blocks' BF16 on a GPU than in the interpreter's FP16."""


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """|found - wanted| / |wanted|; NaN where anything is."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return float((found.float() - wanted.float()).norm() / wanted.float().norm().clamp_min(1e-30))


def card() -> Card:
    """The GPU, or a card that the interpreter stands for."""
    if DEVICE == "cuda":
        return find_card()
    return Card(
        device=torch.device("cpu"), name="interpreter", capability=(9, 0), processors=2, memory=0, half=torch.float16,
        captures=False,
    )  # fmt: skip
