"""Triton's place on an Intel GPU: whether its kernels run there, and products of a few tokens bound to them."""

import os
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch import Tensor

from qrun.backends.xpu_device import XPUCard
from qrun.backends.xpu_matrix import Placed
from qrun.backends.xpu_tiers import LinearKernel, Multiply

MOST = 8
"""Tokens of a product."""
PACKAGES = ("triton-xpu", "pytorch-triton-xpu")
"""What the Triton that torch's XPU wheels bring is called; the plain one compiles nothing for Intel."""


def usable(card: XPUCard) -> bool:
    """Whether Triton kernels run on the card: by Intel's compiler, or, where a CPU stands in for it, interpreted."""
    if find_spec("triton") is None:
        return False
    if not card.real:
        return os.environ.get("TRITON_INTERPRET") == "1"
    return any(map(_installed, PACKAGES))


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _linear(kind: str) -> LinearKernel:
    def takes(placed: Placed, card: XPUCard, activations: str) -> bool:
        # So few tokens stay in 16 bits: their products wait for weights, and rounding them would only add to it.
        return placed.kind == kind and usable(card)

    return LinearKernel(tier="triton", name=f"triton {kind}", most=MOST, takes=takes, bind=_bind)


def _bind(placed: Placed, card: XPUCard, activations: str) -> Multiply:
    from qrun.kernels.xpu_gemv import Matrix, gemv

    assert placed.kind != "plain" and placed.scale is not None
    w = Matrix(
        kind=placed.kind,
        n=placed.n,
        k=placed.k,
        kp=placed.kp,
        group=placed.group,
        codes=placed.codes,
        scale=placed.scale,
        zero=placed.zero,
        offset=placed.offset,
        table=placed.table,
        factor=placed.factor,
        codes_row=placed.codes.stride(0),
        scale_group=placed.scale.stride(0),
    )

    def multiply(x: Tensor) -> Tensor:
        out = torch.empty(x.shape[0], w.n, dtype=torch.float32, device=x.device)
        gemv(x, out, w)
        return out

    return multiply


LINEARS: tuple[LinearKernel, ...] = tuple(map(_linear, ("int4", "int8", "fp8", "codebook")))
