"""Products by aten's own kernels for Intel GPUs, which are oneDNN's: packed int4, int8 per channel, e4m3 and 16 bits.

Binding allocates next to nothing and waits for nothing, so that weights which are gathered for a step may be bound in
it. What an operation does not check, and reads memory by, is checked here. The older `_weight_int4pack_mm` is not used:
there it is slower, and wrong for one token where groups are larger than 32.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from qrun.backends.xpu_device import XPUCard
from qrun.backends.xpu_matrix import NIBBLES, Placed
from qrun.backends.xpu_tiers import LinearKernel, Multiply
from qrun.kernels import reference

FEW = 16
"""Tokens whose activations stay in 16 bits: their products wait for weights, and rounding them would only add to it."""
_UNIT = 2.0**-6
"""The scale that codes of a whole row have in the product: about what weights have, for the range of float16."""
_BLOCK = 128


def rounding(activations: str) -> Callable[[Tensor], Tensor]:
    """What rounds x [M, K] as activations of a type, where there are more than `FEW`."""
    if activations == "16":
        return lambda x: x
    return lambda x: x if x.shape[0] <= FEW else reference.round_activations(x, activations)


def padding(placed: Placed) -> Callable[[Tensor], Tensor]:
    """What gives x [M, k] the weight's padded columns, as zeros."""
    missing = placed.kp - placed.k
    return (lambda x: F.pad(x, (0, missing))) if missing else (lambda x: x)


def checked(placed: Placed, half: torch.dtype) -> Placed:
    """The weight itself, whose tensors have the shapes and dtypes that operations read them by.

    Raises:
        ValueError: one has not.
    """
    width = placed.k if placed.kind == "plain" else placed.kp
    wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    codes = {"int4": torch.int32, "codebook": torch.int32, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
    stored = width // 8 if placed.kind in NIBBLES else width
    wanted["codes"] = ((placed.n, stored), codes.get(placed.kind, half))
    if placed.kind != "plain":
        across = (width // placed.group, placed.n)
        wide = placed.kind == "fp8" or placed.group == width
        wanted["scale"] = (across, torch.float32 if wide else half)
        if placed.kind == "int4":
            wanted["zero"] = (across, torch.int8)
        if placed.offset is not None:
            wanted["offset"] = (across, half)
    if placed.k > width or (placed.group and width % placed.group):
        raise ValueError(f"{width} columns in groups of {placed.group} hold no weight of {placed.k}")
    for name, (shape, dtype) in wanted.items():
        found: Tensor | None = getattr(placed, name)
        if found is None or tuple(found.shape) != shape or found.dtype != dtype or not found.is_contiguous():
            what = None if found is None else f"{found.dtype} {tuple(found.shape)} of strides {found.stride()}"
            raise ValueError(f"the {name} of a placed weight must be {dtype} {shape}, contiguous; found {what}")
    return placed


def _finished(placed: Placed, after: Tensor | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """What makes x [M, kp] @ ((codes - zero) * scale)ᵀ the product with the weight; ``after`` float32 [n] or none is a
    scale of its rows that is still missing."""
    offset, factor, group = placed.offset, placed.factor, placed.group
    whole = group == placed.kp

    def call(x: Tensor, y: Tensor) -> Tensor:
        if after is not None:
            y = y * after
        if offset is not None and whole:
            y = torch.addcmul(y.float(), x.sum(1, keepdim=True, dtype=torch.float32), offset.float())
        elif offset is not None:
            # What is left of zeros is half a step of the codes or less, but for minima out of their range: 16 bits of
            # these sums are enough.
            sums = x.view(x.shape[0], -1, group).sum(2, dtype=torch.float32)
            y = torch.addmm(y, sums.to(offset.dtype), offset)
        return y if factor is None else y * factor.view(1)  # with a dimension, so that the result is float32

    return call


def _takes_int4(placed: Placed, card: XPUCard, activations: str) -> bool:
    return placed.kind == "int4" and placed.group % 32 == 0


def _int4(placed: Placed, card: XPUCard, activations: str) -> Multiply:
    checked(placed, card.half)
    assert placed.scale is not None and placed.zero is not None, "checked"
    codes, group, scale, zero = placed.codes, placed.group, placed.scale, placed.zero
    after: Tensor | None = None
    if group == placed.kp:
        # The operation has kernels for scales of the dtype of x. Float32 ones are left for the product.
        after = scale.view(-1) * (1 / _UNIT)
        scale = torch.full_like(scale, _UNIT, dtype=card.half)
    pad, rounded, finished = padding(placed), rounding(activations), _finished(placed, after)
    # It reads [kp/group, n] scales and zeros without a look at how many groups there are, and zeros as int8 alone.
    product = torch.ops.aten._weight_int4pack_mm_with_scales_and_zeros

    def call(x: Tensor) -> Tensor:
        x = pad(rounded(x))
        return finished(x, product(x, codes, group, scale, zero))

    return call


def _takes_int8(placed: Placed, card: XPUCard, activations: str) -> bool:
    return placed.kind == "int8" and placed.group == placed.kp


def _int8(placed: Placed, card: XPUCard, activations: str) -> Multiply:
    checked(placed, card.half)
    assert placed.scale is not None, "checked"
    codes, scale = placed.codes, placed.scale.view(-1)  # float32, else it is converted in every call
    pad, rounded, finished = padding(placed), rounding(activations), _finished(placed)

    def call(x: Tensor) -> Tensor:
        x = pad(rounded(x))
        return finished(x, torch.ops.aten._weight_int8pack_mm(x, codes, scale))

    return call


def _takes_w8a8(placed: Placed, card: XPUCard, activations: str) -> bool:
    return activations == "int8" and _takes_int8(placed, card, activations)


def _w8a8(placed: Placed, card: XPUCard, activations: str) -> Multiply:
    few = _int8(placed, card, "16")
    assert placed.scale is not None, "checked"
    codes, scale, pad = placed.codes.t(), placed.scale, padding(placed)
    finished = _finished(placed)

    def call(x: Tensor) -> Tensor:
        if x.shape[0] <= FEW:
            return few(x)
        rows, each = reference.quantize_int8_rows(x)
        rows = pad(rows)
        y = torch.ops.aten._int_mm(rows, codes).float() * scale  # of any M, N and K there; CUDA's is not
        # Sums of the codes are exact; the scale of a token is for them as well.
        return finished(rows, y) * each

    return call


def _takes_fp8(placed: Placed, card: XPUCard, activations: str) -> bool:
    """N and K in sixteens; scales of rows, or of 128 columns of them; an operation of torch 2.13 there."""
    return (
        activations == "fp8"
        and placed.kind == "fp8"
        and placed.group in (placed.kp, _BLOCK)
        and placed.n % 16 == 0
        and _TORCH >= (2, 13)
    )


def _fp8(placed: Placed, card: XPUCard, activations: str) -> Multiply:
    checked(placed, card.half)
    assert placed.scale is not None, "checked"
    codes, scale, group, half = placed.codes.t(), placed.scale, placed.group, card.half
    pad, finished = padding(placed), _finished(placed)

    def call(x: Tensor) -> Tensor:
        # Both must have scales of rows, or both of 128 columns: the operation knows no other pairs of such. The weight
        # is column-major as it is; M may be anything, for N and K are what must be in sixteens.
        rows, each = reference.quantize_fp8_rows(pad(x), group)
        return finished(x, torch.ops.aten._scaled_mm(rows, codes, each, scale, out_dtype=half))

    return call


def _takes_plain(placed: Placed, card: XPUCard, activations: str) -> bool:
    return placed.kind == "plain"


def _plain(placed: Placed, card: XPUCard, activations: str) -> Multiply:
    codes = checked(placed, card.half).codes
    rounded, finished = rounding(activations), _finished(placed)
    return lambda x: finished(x, F.linear(rounded(x), codes))


_TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])

LINEARS: tuple[LinearKernel, ...] = (
    LinearKernel(tier="native", name="aten int8 W8A8", most=None, takes=_takes_w8a8, bind=_w8a8),
    LinearKernel(tier="native", name="aten int8", most=None, takes=_takes_int8, bind=_int8),
    LinearKernel(tier="native", name="aten int4", most=None, takes=_takes_int4, bind=_int4),
    LinearKernel(tier="native", name="aten fp8", most=None, takes=_takes_fp8, bind=_fp8),
    LinearKernel(tier="native", name="aten matmul", most=None, takes=_takes_plain, bind=_plain),
)
