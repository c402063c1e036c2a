"""The kernels of intel-extension-for-pytorch (IPEX), where one is installed that is built for this torch and for Intel
GPUs. They read the buffers that aten's kernels read. IPEX is discontinued: nothing needs it, and nothing imports it
before it is looked for."""

import contextlib
import functools
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from qrun.backends.xpu_device import XPUCard
from qrun.backends.xpu_matrix import Placed
from qrun.backends.xpu_tiers import LinearKernel, Multiply
from qrun.formats.packing import pack

_PACKAGE = "intel-extension-for-pytorch"
_SYMMETRIC = 8
_WHOLE_ROWS = 32
"""IPEX 2.8 on the CPU is silently wrong where the number of rows is no multiple of this."""


def available(card: XPUCard) -> bool:
    """Whether IPEX can be used on the card. A card that is none, a CPU in its stead, has use for IPEX's CPU build."""
    return not why_not(card)


def why_not(card: XPUCard) -> str:
    """In a line why IPEX is not used on the card; empty where it is."""
    return _loaded(card.real)[1]


@functools.cache
def _loaded(real: bool) -> tuple[Any, str]:
    """IPEX, or why it cannot be used. It may fail in any way when imported, and some ways are looked at before."""
    try:
        found = version(_PACKAGE)
    except PackageNotFoundError:
        return None, f"{_PACKAGE} is not installed"
    named = f"{_PACKAGE} {found}"
    if _minor(found) != _minor(torch.__version__):
        return None, f"{named} needs torch {_minor(found)}, this is torch {torch.__version__}"
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it prints
            ipex: Any = import_module("intel_extension_for_pytorch")
        if not real:
            return ipex, ""
        if not ipex._C._has_xpu():
            return None, f"{named} is the CPU build; the one for Intel GPUs comes from Intel's own package index"
        # Its other engine, the usual one on Arc A-series, expands the weights for more than one token.
        ipex.xpu.set_compute_eng(ipex.xpu.XPUComputeEng.ONEDNN)
    except (Exception, SystemExit) as error:
        said = (str(error).splitlines() or [""])[0][:160]
        return None, f"{named} cannot be imported: {type(error).__name__}{said and ': '}{said}"
    return ipex, ""


def _minor(release: str) -> str:
    """2.8 of 2.8.10+xpu."""
    return ".".join(release.split("+")[0].split(".")[:2])


def rms_norm(x: Tensor, weight: Tensor, eps: float, half: torch.dtype) -> Tensor:
    """x float32 [S, H], weight float32 [H] -> half [S, H], on a card where IPEX is available."""
    norm: Any = import_module("intel_extension_for_pytorch").llm.functional.rms_norm
    return norm(x, weight, eps).to(half)


def _takes(placed: Placed, card: XPUCard, activations: str) -> bool:
    """Integers of four bits with whole zeros and a scale for some columns, without padding."""
    return (
        placed.kind == "int4"
        and activations == "16"
        and placed.scale is not None
        and placed.scale.dtype == card.half
        and placed.offset is None
        and placed.k == placed.kp
        and placed.group % 32 == 0
        and placed.n % _WHOLE_ROWS == 0
        and available(card)
    )


def _takes_symmetric(placed: Placed, card: XPUCard, activations: str) -> bool:
    return _takes(placed, card, activations) and bool((_zeros(placed) == _SYMMETRIC).all())


def _takes_zeros(placed: Placed, card: XPUCard, activations: str) -> bool:
    """A checkpoint's zeros go up to 16, IPEX's have four bits."""
    return _takes(placed, card, activations) and bool((_zeros(placed) & ~15 == 0).all())


def _zeros(placed: Placed) -> Tensor:
    assert placed.zero is not None, "int4 has zeros"
    return placed.zero


def _bind_symmetric(placed: Placed, card: XPUCard, activations: str) -> Multiply:
    del card, activations
    return _scaled(_layer(placed, None), placed.factor)


def _bind_zeros(placed: Placed, card: XPUCard, activations: str) -> Multiply:
    del activations
    if not card.real:
        # The CPU build has no `mm_int4`; what both builds have takes zeros less one, and heeds them only on the CPU.
        return _scaled(_layer(placed, _nibbles((_zeros(placed) - 1) & 15)), placed.factor)
    codes, scale, zeros, group = placed.codes.t(), placed.scale, _nibbles(_zeros(placed)), placed.group
    multiply: Any = torch.ops.torch_ipex.mm_int4
    return _scaled(lambda x: multiply(x, codes, scale, zeros, group, None), placed.factor)


def _nibbles(zeros: Tensor) -> Tensor:
    """int8 [G, n] -> int32 [G, n/8], the first row lowest."""
    return pack(zeros.to(torch.uint8), 4).view(torch.int32)


def _layer(placed: Placed, zeros: Tensor | None) -> Any:
    """IPEX's layer over the codes; its CPU build packs them anew, the one for GPUs keeps them as they are.

    It transposes what it is given in place, so it is given other tensors over the same memory.
    """
    assert placed.scale is not None, "int4 has scales"
    quantization: Any = import_module("intel_extension_for_pytorch").llm.quantization
    return quantization.IPEXWeightOnlyQuantizedLinear.from_weight(
        placed.codes.t(),
        placed.scale.detach(),
        zeros,
        placed.k,
        placed.n,
        group_size=placed.group,
        quant_method=quantization.QuantMethod.GPTQ_GEMM,
        dtype=quantization.QuantDtype.INT4,
    )


def _scaled(multiply: Multiply, factor: Tensor | None) -> Multiply:
    return multiply if factor is None else lambda x: multiply(x).float() * factor


LINEARS: tuple[LinearKernel, ...] = (
    LinearKernel(tier="ipex", name="ipex int4", most=None, takes=_takes_symmetric, bind=_bind_symmetric),
    LinearKernel(tier="ipex", name="ipex int4 with zeros", most=None, takes=_takes_zeros, bind=_bind_zeros),
)
