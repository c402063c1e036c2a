"""aten's operations that only Intel GPUs have, on the CPU, as particular about their arguments as they are there."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from qrun.formats.packing import unpack

HALVES = (torch.bfloat16, torch.float16)
E4M3 = torch.float8_e4m3fn


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def int4(a: Tensor, b: Tensor, group: int, scale: Tensor, zeros: Tensor) -> Tensor:
    """a [M, K] @ ((nibbles of b [N, K/8]) - zeros) * scale, both [K/group, N]; sums in float32, the result as a.

    Of the shapes there, only the number of groups is not checked: memory is read past the end.
    """
    _need(a.dtype in HALVES and a.dim() == 2 and a.is_contiguous(), "A must be 16 bits, 2-D, contiguous")
    _need(b.dtype == torch.int32 and b.dim() == 2 and b.stride(1) == 1, "B must be int32, 2-D")
    _need(a.shape[1] == 8 * b.shape[1], f"B has {8 * b.shape[1]} columns, A {a.shape[1]}")
    _need(zeros.dtype == torch.int8, "zeros must be int8")
    _need(group > 1 and group % 32 == 0, f"groups must be multiples of 32, not {group}")
    _need(a.shape[1] % group == 0, f"{a.shape[1]} columns do not come in groups of {group}")
    _need(scale.dtype == a.dtype, f"the kernel is for scales of {a.dtype}, not {scale.dtype}")
    for name, tensor in (("scale", scale), ("zeros", zeros)):
        _need(tuple(tensor.shape) == (a.shape[1] // group, b.shape[0]), f"{name} is {tuple(tensor.shape)}")
        _need(tensor.is_contiguous(), f"{name} must be contiguous")
    codes = unpack(b.contiguous().view(torch.uint8), 4).float()
    each = [tensor.float().t().repeat_interleave(group, 1) for tensor in (zeros, scale)]
    return (a.float() @ ((codes - each[0]) * each[1]).t()).to(a.dtype)


def int8(a: Tensor, b: Tensor, scales: Tensor) -> Tensor:
    """a [M, K] @ (b int8 [N, K] * scales [N])ᵀ; the CPU's own wants scales as a, there they are float32."""
    _need(a.dtype in HALVES and a.dim() == 2 and a.stride(1) == 1, "A must be 16 bits, 2-D, rows contiguous")
    _need(b.dtype == torch.int8 and b.is_contiguous() and b.shape[1] == a.shape[1], "B must be int8 [N, K], contiguous")
    _need(scales.dim() == 1 and scales.shape[0] == b.shape[0], f"scales are {tuple(scales.shape)}")
    _need(scales.dtype == torch.float32 and scales.is_contiguous(), "scales are converted in every call")
    return ((a.float() @ b.float().t()) * scales).to(a.dtype)


def scaled(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    scale_result: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    """(a * scale_a) @ (b * scale_b), e4m3 [M, K] and column-major [K, N], scales float32 of rows or of 128 columns."""
    _need(a.dtype == b.dtype == E4M3 and a.dim() == b.dim() == 2, "both must be e4m3 matrices")
    _need(a.is_contiguous() and b.t().is_contiguous(), "one must be row-major, the other column-major")
    k, n = b.shape
    _need(a.shape[1] == k and k % 16 == 0 and n % 16 == 0, f"K {k} and N {n} must be multiples of 16")
    _need(bias is None and scale_result is None and not use_fast_accum, "not supported there, or not without a warning")
    groups = scale_b.shape[0]
    _need(groups in (1, -(-k // 128)), f"{groups} groups of {k} columns")
    for tensor, shape in ((scale_a, (a.shape[0], groups)), (scale_b, (groups, n))):
        _need(tuple(tensor.shape) == shape and tensor.dtype == torch.float32, f"a scale is not float32 {shape}")
        _need(tensor.is_contiguous(), "scales must be contiguous")
    group = k if groups == 1 else 128
    wide = [s.repeat_interleave(group, 1)[:, :k] for s in (scale_a, scale_b.t())]
    return ((a.float() * wide[0]) @ (b.t().float() * wide[1]).t()).to(out_dtype)


@contextmanager
def aten_of_xpu() -> Iterator[None]:
    """The CPU has them as long as this lasts."""
    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl("_weight_int4pack_mm_with_scales_and_zeros", int4, "CPU")
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that the CPU has kernels of its own
            library.impl("_weight_int8pack_mm", int8, "CPU", allow_override=True)
            library.impl("_scaled_mm", scaled, "CPU", allow_override=True)
        yield
    finally:
        library._destroy()
