"""Many rows of e4m3, scaled per 128 columns, times an e4m3 weight scaled per block of 128x128 (block-wise FP8).

Each 128 columns are summed by the tensor cores and then scaled into a float32 accumulator, as DeepSeek-V3 does.
"""
# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from qrun.kernels.gpu_aot import Variant
from qrun.kernels.gpu_bits import e4m3_decode
from qrun.kernels.gpu_gemm_int8 import Tile, choose, finish, place_of

TILES = (
    Tile(rows=128, columns=128, k=128, warps=8, stages=3),
    Tile(rows=64, columns=128, k=128, warps=4, stages=3),
    Tile(rows=64, columns=64, k=128, warps=4, stages=4),
)
"""From large to small. 128x128 spills with four warps: both the sum and the accumulator are in registers."""


@triton.jit(do_not_specialize=["M"])
def gemm_fp8(
    x_ptr,
    w_ptr,
    x_scale_ptr,
    w_scale_ptr,
    out_ptr,
    bias_ptr,
    residual_ptr,
    M,
    N,
    out_stride,
    residual_stride,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BAND: tl.constexpr,
    DECODE: tl.constexpr,
):
    """out [M, N] = x [M, K] · w [N, K]ᵀ; K is a multiple of 128, BN at most 128. Rows past the end repeat the last.

    DECODE: the codes come as uint8 and are multiplied as fp16, which holds all of them: for the interpreter, and
    where the tensor cores know no fp8.
    """
    pm, pn = place_of(M, N, BM, BN, BAND)
    rm = tl.minimum(tl.arange(0, BM), M - 1 - pm * BM)
    rn = tl.minimum(tl.arange(0, BN), N - 1 - pn * BN)
    k = tl.arange(0, 128)
    x_at = rm[:, None] * K + k[None, :]
    w_at = rn[None, :] * K + k[:, None]
    x_ptr += (pm * BM).to(tl.int64) * K
    w_ptr += (pn * BN).to(tl.int64) * K
    x_scales = x_scale_ptr + (pm * BM + rm) * (K // 128)
    w_scale_ptr += pn * BN // 128 * (K // 128)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, 128):
        x = tl.load(x_ptr + x_at)
        w = tl.load(w_ptr + w_at)
        scale = tl.load(x_scales + start // 128) * tl.load(w_scale_ptr + start // 128)
        if DECODE:
            x = e4m3_decode(x).to(tl.float16)
            w = e4m3_decode(w).to(tl.float16)
        acc += tl.dot(x, w) * scale[:, None]
        x_ptr += 128
        w_ptr += 128
    rm = pm * BM + tl.arange(0, BM)
    rn = pn * BN + tl.arange(0, BN)
    finish(acc, out_ptr, bias_ptr, residual_ptr, rm, rn, M, N, out_stride, residual_stride)


def matmul_fp8(
    x: Tensor,
    w: Tensor,
    *,
    x_scale: Tensor,
    w_scale: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    tile: Tile | None = None,
) -> None:
    """out [M, N] = (x · x_scale) (w · w_scale)ᵀ (+ bias [N]) (+ residual [M, N], which may be out itself).

    x: e4m3 [M, Kp], w: e4m3 [Np, Kp], Np at least N, Kp a multiple of 128; both as float8_e4m3fn for tensor cores
    that know it (sm_89 on), or both as uint8 to be decoded. scales: float32 [M, Kp/128] and [Np/128, Kp/128].
    out: float32 or 16 bits.
    """
    (m, n), k = out.shape, x.shape[1]
    assert x.shape[0] == m and w.shape[0] >= n and w.shape[1] == k and k % 128 == 0, (x.shape, w.shape, out.shape)
    assert x.is_contiguous() and w.is_contiguous() and out.stride(1) == 1, (x.stride(), w.stride(), out.stride())
    assert x_scale.shape == (m, k // 128) and x_scale.is_contiguous(), x_scale.shape
    assert w_scale.shape[1] == k // 128 and w_scale.is_contiguous(), w_scale.shape
    assert residual is None or (residual.shape == out.shape and residual.stride(1) == 1), "residual"
    assert x.dtype == w.dtype and x.dtype in (torch.uint8, torch.float8_e4m3fn), (x.dtype, w.dtype)
    chosen = tile or choose(TILES, m, n, x.device)
    gemm_fp8[(triton.cdiv(m, chosen.rows) * triton.cdiv(n, chosen.columns),)](
        x,
        w,
        x_scale,
        w_scale,
        out,
        bias,
        residual,
        m,
        n,
        out.stride(0),
        0 if residual is None else residual.stride(0),
        K=k,
        BM=chosen.rows,
        BN=chosen.columns,
        BAND=8,
        DECODE=x.dtype == torch.uint8,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
    )


def variants() -> list[Variant]:
    """Every tile, with bias and residual, on native fp8."""
    codes = {"x_ptr": "*fp8e4nv", "w_ptr": "*fp8e4nv"}
    floats = ("x_scale_ptr", "w_scale_ptr", "out_ptr", "bias_ptr", "residual_ptr")
    sizes = ("M", "N", "out_stride", "residual_stride")
    return [
        Variant(
            name=f"fp8 {tile.rows}x{tile.columns}",
            kernel=gemm_fp8,
            types={**codes, **dict.fromkeys(floats, "*fp32"), **dict.fromkeys(sizes, "i32")},
            constants={"K": 4096, "BM": tile.rows, "BN": tile.columns, "BAND": 8, "DECODE": False},
            warps=tile.warps,
            stages=tile.stages,
            multiples=sizes[1:],
            least=89,
        )
        for tile in TILES
    ]
