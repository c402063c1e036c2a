"""Large batches on the GPU: weights expanded bit for bit, and INT8 and FP8 products against plain float64 ones."""

import pytest
import torch
import torch.nn.functional as F
from gpu_doubles import DEVICE, DTYPES, difference
from torch import Tensor

from qrun.backends.cuda_matrix import pack
from qrun.formats import QTensor, format_of
from qrun.kernels import gpu_expand, gpu_gemm_fp8, gpu_gemm_int8, gpu_norm, reference_gemm
from qrun.kernels.gpu_gemm_int8 import Tile, choose
from qrun.kernels.gpu_packed import Packed, pack_planes
from qrun.recipe import WeightScheme

SCHEMES = {
    "int8": WeightScheme("int", 8, 0),
    "int8 g64": WeightScheme("int", 8, 64),
    "int8 g96 asym": WeightScheme("int", 8, 96, False),
    "int4 channel": WeightScheme("int", 4, 0, True),
    "int4 g32 sym": WeightScheme("int", 4, 32, True),
    "int4 g64": WeightScheme("int", 4, 64, False),
    "int4 g96": WeightScheme("int", 4, 96, False),
    "int4 g128": WeightScheme("int", 4, 128, False),
    "int2 g64": WeightScheme("int", 2, 64, False),
    "int2 g32 sym": WeightScheme("int", 2, 32, True),
    "nf4": WeightScheme("nf4", 4),
    "mxfp4": WeightScheme("mxfp4", 4),
    "nvfp4": WeightScheme("nvfp4", 4),
    "fp8": WeightScheme("fp8", 8),
}
SMALL = Tile(rows=16, columns=64, k=128, warps=4, stages=1)


def weight(name: str, n: int, k: int) -> QTensor:
    torch.manual_seed(n)
    return format_of(SCHEMES[name]).quantize(torch.randn(n, k) * torch.logspace(-2, 1, k) * 0.05)


def grown(x: Tensor, rows: int, columns: int) -> Tensor:
    return F.pad(x, (0, columns - x.shape[1], 0, rows - x.shape[0]))


def packed(q: QTensor) -> Packed:
    found = pack(q.to(DEVICE), torch.float16)
    assert found is not None
    return found


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(
    ("n", "k", "dtype"), [(5, 96, torch.float32), (130, 352, torch.bfloat16), (33, 640, torch.float16)]
)
def test_expand(name: str, n: int, k: int, dtype: torch.dtype) -> None:
    q = weight(name, n, k)
    w = packed(q)
    wanted = grown(q.dequantize(dtype), w.rows, w.width)[:n].to(DEVICE)
    whole = poisoned(n, w.width, dtype=dtype)
    gpu_expand.expand(w, whole)
    assert torch.equal(whole, wanted)
    start, stop = n // 3, n - 1
    for columns in (k, min(k + 7, w.width)):
        scratch = poisoned(stop - start + 2, columns + 3, dtype=dtype)
        gpu_expand.expand(w, scratch[1:-1, :columns], start=start)
        assert torch.equal(scratch[1:-1, :columns], wanted[start:stop, :columns])
        assert scratch[[0, -1]].isnan().all(), "rows outside of the range"
        assert scratch[:, columns:].isnan().all(), "columns outside of the scratch"
        twin = poisoned(stop - start, columns, dtype=dtype)
        reference_gemm.expand(w, twin, start=start)
        assert torch.equal(twin, wanted[start:stop, :columns])


def test_a_power_of_two_below_the_normal_numbers() -> None:
    codes = torch.full((128, 256), 7, dtype=torch.uint8)  # 6.0
    w = Packed(
        kind="codebook",
        n=128,
        k=256,
        codes=pack_planes(codes, "codebook").to(DEVICE),
        scale=torch.arange(8, dtype=torch.uint8).repeat(128, 1).t().contiguous().to(DEVICE),
        table=format_of(SCHEMES["mxfp4"]).codebook(DEVICE),  # type: ignore[attr-defined]
        group=32,
    )
    out = poisoned(128, 256)
    gpu_expand.expand(w, out)
    assert torch.equal(out[3, ::32].double(), 6 * 2.0 ** (torch.arange(8, device=DEVICE).double() - 127))


def test_tiles() -> None:
    cpu = torch.device("cpu")
    for tiles in (gpu_gemm_int8.TILES, gpu_gemm_fp8.TILES):
        assert choose(tiles, 4096, 4096, cpu).rows == 128
        assert not choose(tiles, 4096, 4096, cpu).roomy
        assert all(tile.k == 128 and tile.columns <= (256 if tile.roomy else 128) for tile in tiles)


@pytest.mark.parametrize(("m", "n", "k"), [(65, 200, 256), (130, 64, 384), (7, 130, 128), (129, 140, 128)])
@pytest.mark.parametrize("extras", [False, True])
def test_int8(m: int, n: int, k: int, extras: bool) -> None:
    torch.manual_seed(m)
    x = torch.randint(-127, 128, (m, k), dtype=torch.int8, device=DEVICE)
    w = grown(torch.randint(-127, 128, (n, k), dtype=torch.int8), n + -n % 128, k).to(DEVICE)
    x_scale, w_scale = torch.rand(m, device=DEVICE), torch.rand(len(w), device=DEVICE)
    bias = torch.randn(n, device=DEVICE) * 1000 if extras else None
    residual = torch.randn(m, n, device=DEVICE) * 1000 if extras else None
    wanted = (x.double() * x_scale[:, None]) @ (w[:n].double() * w_scale[:n, None]).t()
    wanted = wanted if bias is None or residual is None else wanted + bias + residual
    for tile in (None, SMALL):
        out = poisoned(m, n)
        gpu_gemm_int8.matmul_int8(
            x, w, x_scale=x_scale, w_scale=w_scale, out=out, bias=bias, residual=residual, tile=tile
        )
        assert difference(out, wanted) < 1e-6
    twin = poisoned(m, n)
    reference_gemm.matmul_int8(x, w, x_scale=x_scale, w_scale=w_scale, out=twin, bias=bias, residual=residual)
    assert torch.allclose(out, twin, rtol=1e-6, atol=1e-2)


def test_int8_in_place_and_rounded() -> None:
    """A residual stream that is added to where it lies, in rows that are wider; and 16-bit results."""
    x = torch.randint(-127, 128, (66, 128), dtype=torch.int8, device=DEVICE)
    w = torch.randint(-127, 128, (128, 128), dtype=torch.int8, device=DEVICE)
    scales = {
        "x_scale": torch.full((66,), 2.0**-10, device=DEVICE),
        "w_scale": torch.full((128,), 0.125, device=DEVICE),
    }
    product = (x.double() @ w.double().t()).float() * 2.0**-13
    stream = torch.randn(66, 150, device=DEVICE)
    before = stream.clone()
    part = stream[:, 5:105]
    gpu_gemm_int8.matmul_int8(x, w, **scales, out=part, residual=part)
    assert torch.equal(part, product[:, :100] + before[:, 5:105])
    assert torch.equal(stream[:, 105:], before[:, 105:])
    for dtype in DTYPES:
        out = poisoned(66, 100, dtype=dtype)
        gpu_gemm_int8.matmul_int8(x, w, **scales, out=out)
        assert torch.equal(out, product[:, :100].to(dtype))


def fp8(codes: Tensor) -> Tensor:
    """As the tensor cores take it, where there are any that do."""
    native = DEVICE == "cuda" and torch.cuda.get_device_capability() >= (8, 9)
    return codes.view(torch.float8_e4m3fn) if native else codes


@pytest.mark.parametrize(("m", "n", "k"), [(65, 200, 256), (130, 64, 384), (7, 130, 100), (129, 140, 250)])
@pytest.mark.parametrize("extras", [False, True])
def test_fp8(m: int, n: int, k: int, extras: bool) -> None:
    w = packed(weight("fp8", n, k))
    rows = torch.randn(m, k, device=DEVICE) * torch.logspace(1, -1, k, device=DEVICE)
    x = torch.empty(m, w.width, dtype=torch.uint8, device=DEVICE)
    x_scale = poisoned(m, w.width // 128)
    gpu_norm.quantize_fp8(rows, codes=x, scale=x_scale)
    bias = torch.randn(n, device=DEVICE) if extras else None
    residual = torch.randn(m, n, device=DEVICE) if extras else None

    assert w.scale is not None
    left = x.view(torch.float8_e4m3fn).double() * x_scale.repeat_interleave(128, 1)
    right = w.codes.view(torch.float8_e4m3fn).double() * w.scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    wanted = left @ right[:n].t()
    wanted = wanted if bias is None or residual is None else wanted + bias + residual
    scales = {"x_scale": x_scale, "w_scale": w.scale}
    for tile in (None, SMALL):
        out = poisoned(m, n)
        gpu_gemm_fp8.matmul_fp8(fp8(x), fp8(w.codes), **scales, out=out, bias=bias, residual=residual, tile=tile)
        assert difference(out, wanted) < (1e-6 if DEVICE == "cpu" else 5e-3)  # fp8 cores keep fewer bits of a sum
    twin = poisoned(m, n)
    reference_gemm.matmul_fp8(x, w.codes, **scales, out=twin, bias=bias, residual=residual)
    assert difference(twin, wanted) < 1e-6


@pytest.mark.skipif(DEVICE == "cpu", reason="one kernel for each of a GPU's shapes")
@pytest.mark.parametrize("tile", [*gpu_gemm_int8.TILES, *gpu_gemm_fp8.TILES], ids=str)
def test_every_tile(tile: Tile) -> None:
    """Shapes of several tiles each way; what the card has no room for is never chosen."""
    if tile.roomy and torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("needs more shared memory")
    m, n, k = 1111, 2000, 1024
    x = torch.randint(-127, 128, (m, k), dtype=torch.int8, device=DEVICE)
    w = torch.randint(-127, 128, (2048, k), dtype=torch.int8, device=DEVICE)
    out = poisoned(m, n)
    ones = torch.ones(2048, device=DEVICE)
    gpu_gemm_int8.matmul_int8(x, w, x_scale=ones[:m], w_scale=ones, out=out, tile=tile)
    assert torch.equal(out, (x.double() @ w[:n].double().t()).float())
    if tile.columns > 128:
        return
    codes = [torch.randint(0, 120, c.shape, dtype=torch.uint8, device=DEVICE) for c in (x, w)]
    scales = {"x_scale": torch.rand(m, k // 128, device=DEVICE), "w_scale": torch.rand(16, k // 128, device=DEVICE)}
    wanted = poisoned(m, n)
    reference_gemm.matmul_fp8(*codes, **scales, out=wanted)
    gpu_gemm_fp8.matmul_fp8(fp8(codes[0]), fp8(codes[1]), **scales, out=out, tile=tile)
    assert difference(out, wanted) < 5e-3
