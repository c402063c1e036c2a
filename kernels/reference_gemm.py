"""The GPU's kernels for many rows in plain torch, by the same names: operands, expanded weights, W8A8, block FP8."""

import torch
import torch.nn.functional as F
from torch import Tensor

from qrun.kernels import reference
from qrun.kernels.gpu_packed import BITS, Packed, unpack_planes


def prepare(
    x: Tensor, weight: Tensor | None, *, xw: Tensor, sums: Tensor | None = None, ssq: Tensor | None = None
) -> None:
    """:func:`qrun.kernels.gpu_norm.prepare`."""
    wide = x.float()
    _fill(xw, wide if weight is None else wide * weight, sums)
    if ssq is not None:
        ssq[0] = wide.square().sum(-1)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, out: Tensor) -> None:
    """:func:`qrun.kernels.gpu_norm.rms_norm`."""
    _fill(out, reference.rms_norm(x.float(), weight, eps))


def quantize_int8(x: Tensor, weight: Tensor | None = None, eps: float = 0.0, *, codes: Tensor, scale: Tensor) -> None:
    """:func:`qrun.kernels.gpu_norm.quantize_int8`."""
    wide = x.float() if weight is None else reference.rms_norm(x.float(), weight, eps)
    found, scales = reference.quantize_int8_rows(_padded(wide, codes))
    codes.copy_(found)
    scale.copy_(scales[:, 0])


def quantize_fp8(x: Tensor, weight: Tensor | None = None, eps: float = 0.0, *, codes: Tensor, scale: Tensor) -> None:
    """:func:`qrun.kernels.gpu_norm.quantize_fp8`."""
    wide = x.float() if weight is None else reference.rms_norm(x.float(), weight, eps)
    found, scales = reference.quantize_fp8_rows(_padded(wide, codes))
    codes.copy_(found.view(torch.uint8))
    scale.copy_(scales)


def silu_mul(gate_up: Tensor, pairs: int, *, out: Tensor, sums: Tensor | None = None) -> None:
    """:func:`qrun.kernels.gpu_norm.silu_mul`."""
    _fill(out, _swiglu(gate_up, pairs), sums)


def silu_mul_int8(gate_up: Tensor, pairs: int, *, codes: Tensor, scale: Tensor) -> None:
    """:func:`qrun.kernels.gpu_norm.silu_mul_int8`."""
    quantize_int8(_swiglu(gate_up, pairs), codes=codes, scale=scale)


def silu_mul_fp8(gate_up: Tensor, pairs: int, *, codes: Tensor, scale: Tensor) -> None:
    """:func:`qrun.kernels.gpu_norm.silu_mul_fp8`."""
    quantize_fp8(_swiglu(gate_up, pairs), codes=codes, scale=scale)


def expand(packed: Packed, out: Tensor, *, start: int = 0) -> None:
    """:func:`qrun.kernels.gpu_expand.expand`."""
    rows, columns = out.shape
    wanted = slice(start, start + rows)
    codes = packed.codes[wanted]
    stored = packed.scale
    assert stored is not None, packed.kind
    group = packed.group or packed.k
    if packed.kind in BITS:
        codes = unpack_planes(codes, packed.kind, packed.plane)
    if packed.kind == "fp8":
        values = codes.view(torch.float8_e4m3fn).float()
        scale = stored.repeat_interleave(128, 0)[wanted]
        group = 128
    elif packed.table is not None:
        values = packed.table[codes.long()]
        scale = _codebook_scale(stored.t()[wanted], packed.scale2)
    else:
        scale = stored.t()[wanted].float()
        values = codes.float()
        if packed.zero is not None:
            zero = packed.zero.t()[wanted].float() - (128 if packed.kind == "int8" else 0)
            values = values[:, : packed.k] - zero.repeat_interleave(group, 1)[:, : packed.k]
        elif packed.kind != "int8":
            values = values - 2 ** (BITS[packed.kind] - 1)
    known = min(packed.k, columns)
    out.zero_()
    out[:, :known] = values[:, :known] * scale.repeat_interleave(group, 1)[:, :known]


def matmul_int8(
    x: Tensor,
    w: Tensor,
    *,
    x_scale: Tensor,
    w_scale: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    """:func:`qrun.kernels.gpu_gemm_int8.matmul_int8`; float64 holds the int32 sums exactly."""
    n = out.shape[1]
    sums = (x.double() @ w[:n].double().t()).float()
    out.copy_(_finish(sums * x_scale[:, None] * w_scale[:n], bias, residual))


def matmul_fp8(
    x: Tensor,
    w: Tensor,
    *,
    x_scale: Tensor,
    w_scale: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    """:func:`qrun.kernels.gpu_gemm_fp8.matmul_fp8`."""
    n = out.shape[1]
    left, right = (codes.view(torch.float8_e4m3fn).float() for codes in (x, w[:n]))
    y = torch.zeros(out.shape, device=out.device)
    for block in range(x.shape[1] // 128):
        at = slice(block * 128, block * 128 + 128)
        scale = x_scale[:, block, None] * w_scale[:, block].repeat_interleave(128)[:n]
        y += left[:, at] @ right[:, at].t() * scale
    out.copy_(_finish(y, bias, residual))


def _padded(x: Tensor, out: Tensor) -> Tensor:
    return F.pad(x, (0, out.shape[1] - x.shape[1]))


def _fill(out: Tensor, x: Tensor, sums: Tensor | None = None) -> None:
    out.copy_(_padded(x, out))
    if sums is not None:
        sums.copy_(out.float().view(*sums.shape, 32).sum(-1))


def _swiglu(gate_up: Tensor, pairs: int) -> Tensor:
    wide = gate_up.float().view(gate_up.shape[0], -1, 2, pairs)
    return (F.silu(wide[:, :, 0]) * wide[:, :, 1]).flatten(1)


def _codebook_scale(stored: Tensor, scale2: Tensor | None) -> Tensor:
    if scale2 is not None:
        return stored.view(torch.float8_e4m3fn).float() * scale2
    if stored.dtype == torch.uint8:
        exponent = stored.float() - 127
        return torch.ldexp(torch.ones_like(exponent), exponent)
    return stored.float()


def _finish(y: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    if bias is not None:
        y = y + bias.float()
    return y if residual is None else y + residual.float()
