"""Many rows of int8 times an int8 weight, both with a scale per row (W8A8), accumulated in int32.

It also holds what large matmul kernels share: the choice of a tile, the order of tiles, and what follows the sum.
"""
# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qrun.kernels.gpu_aot import Variant
from qrun.kernels.gpu_bits import narrow


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What one program computes: rows of x by rows of w, k at a time. `roomy`: needs the shared memory of sm_90."""

    rows: int
    columns: int
    k: int
    warps: int
    stages: int
    roomy: bool = False


TILES = (
    Tile(rows=128, columns=256, k=128, warps=8, stages=4, roomy=True),
    Tile(rows=128, columns=128, k=128, warps=8, stages=3),
    Tile(rows=64, columns=128, k=128, warps=4, stages=3),
    Tile(rows=64, columns=64, k=128, warps=4, stages=4),
)
"""From large to small."""


def choose(tiles: tuple[Tile, ...], m: int, n: int, device: torch.device) -> Tile:
    """The largest tile that the card has room for and that gives every multiprocessor one; else the smallest."""
    processors, roomy = 1, False
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        processors, roomy = properties.multi_processor_count, properties.major in (9, 10)
    fitting = [tile for tile in tiles if roomy or not tile.roomy]
    for tile in fitting:
        if triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns) >= processors:
            return tile
    return fitting[-1]


@triton.jit
def place_of(M, N, BM: tl.constexpr, BN: tl.constexpr, BAND: tl.constexpr):
    """This program's tile (of rows, of columns): BAND tiles of rows share a tile of the weight while it is in L2."""
    pid = tl.program_id(0)
    tall = tl.cdiv(M, BM)
    band = BAND * tl.cdiv(N, BN)
    first = pid // band * BAND
    height = tl.minimum(tall - first, BAND)
    return first + pid % band % height, pid % band // height


@triton.jit
def finish(y, out_ptr, bias_ptr, residual_ptr, rm, rn, M, N, out_stride, residual_stride):
    """Store y [BM, BN], after adding a bias [N] and a residual [M, N] where they are not None."""
    if bias_ptr is not None:
        y += tl.load(bias_ptr + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
    there = (rm < M)[:, None] & (rn < N)[None, :]
    line = rm.to(tl.int64)[:, None]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + line * residual_stride + rn[None, :], mask=there, other=0.0).to(tl.float32)
    tl.store(out_ptr + line * out_stride + rn[None, :], narrow(y, out_ptr.dtype.element_ty), mask=there)


@triton.jit
def _halves(x):
    """The left and the right columns of x [R, C]."""
    return tl.split(x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1))


@triton.jit(do_not_specialize=["M"])
def gemm_int8(
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
    BK: tl.constexpr,
    BAND: tl.constexpr,
):
    """out [M, N] = x [M, K] · w [N, K]ᵀ · scales; K is a multiple of BK. Rows past the end repeat the last one."""
    pm, pn = place_of(M, N, BM, BN, BAND)
    rm = tl.minimum(tl.arange(0, BM), M - 1 - pm * BM)
    rn = tl.minimum(tl.arange(0, BN), N - 1 - pn * BN)
    k = tl.arange(0, BK)
    # Offsets within a tile fit 32 bits; what advances is a scalar, which saves registers.
    x_at = rm[:, None] * K + k[None, :]
    w_at = rn[None, :] * K + k[:, None]
    x_ptr += (pm * BM).to(tl.int64) * K
    w_ptr += (pn * BN).to(tl.int64) * K
    acc = tl.zeros((BM, BN), tl.int32)
    for _ in range(0, K, BK):
        acc = tl.dot(tl.load(x_ptr + x_at), tl.load(w_ptr + w_at), acc, out_dtype=tl.int32)
        x_ptr += BK
        w_ptr += BK
    # A piece of the columns after the other: what follows the sum then needs few registers besides the sum's.
    x_scale = tl.load(x_scale_ptr + pm * BM + rm)
    rm = pm * BM + tl.arange(0, BM)
    pieces = _halves(acc)
    for half in tl.static_range(2):
        quarters = _halves(pieces[half])
        for quarter in tl.static_range(2):
            rn = pn * BN + (2 * half + quarter) * (BN // 4) + tl.arange(0, BN // 4)
            y = quarters[quarter].to(tl.float32) * x_scale[:, None]
            y *= tl.load(w_scale_ptr + tl.minimum(rn, N - 1))[None, :]
            finish(y, out_ptr, bias_ptr, residual_ptr, rm, rn, M, N, out_stride, residual_stride)


def matmul_int8(
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

    x: int8 [M, Kp], w: int8 [Np, Kp], Np at least N, Kp a multiple of 128; scales: float32 [M] and [Np].
    out: float32 or 16 bits.
    """
    (m, n), k = out.shape, x.shape[1]
    assert x.shape[0] == m and w.shape[0] >= n and w.shape[1] == k and k % 128 == 0, (x.shape, w.shape, out.shape)
    assert x.is_contiguous() and w.is_contiguous() and out.stride(1) == 1, (x.stride(), w.stride(), out.stride())
    assert residual is None or (residual.shape == out.shape and residual.stride(1) == 1), "residual"
    chosen = tile or choose(TILES, m, n, x.device)
    gemm_int8[(triton.cdiv(m, chosen.rows) * triton.cdiv(n, chosen.columns),)](
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
        BK=chosen.k,
        BAND=8,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
    )


def variants() -> list[Variant]:
    """Every tile, with bias and residual."""
    pointers = {"x_ptr": "*i8", "w_ptr": "*i8", "bias_ptr": "*fp32", "residual_ptr": "*fp32", "out_ptr": "*fp32"}
    scales = {"x_scale_ptr": "*fp32", "w_scale_ptr": "*fp32"}
    sizes = ("M", "N", "out_stride", "residual_stride")
    return [
        Variant(
            name=f"int8 {tile.rows}x{tile.columns}",
            kernel=gemm_int8,
            types={**pointers, **scales, **dict.fromkeys(sizes, "i32")},
            constants={"K": 4096, "BM": tile.rows, "BN": tile.columns, "BK": tile.k, "BAND": 8},
            warps=tile.warps,
            stages=tile.stages,
            multiples=sizes[1:],
            least=90 if tile.roomy else 80,
        )
        for tile in TILES
    ]
