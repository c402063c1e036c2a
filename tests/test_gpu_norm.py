"""Rows to a matmul's operand: each launcher against its twin, at odd widths, with poisoned outputs."""

from collections.abc import Callable

import pytest
import torch
from gpu_doubles import DEVICE, DTYPES, difference
from torch import Tensor

from qrun.kernels import gpu_norm, reference, reference_gemm

OUTPUTS = [torch.float16, torch.bfloat16]
"""Both everywhere: rounding is integer work here, and what is loaded becomes float32 at once."""
WIDTHS = [(1, 100, 256), (3, 256, 256), (2, 1000, 1280), (5, 32, 512)]
LONG = (2, 5000, 5120)  # more than a block


def rows(m: int, width: int) -> Tensor:
    torch.manual_seed(width)
    x = torch.randn(m, width, device=DEVICE) * torch.logspace(-2, 2, width, device=DEVICE)
    x[:, width // 2] *= 50
    return x


def norm_weight(width: int) -> Tensor:
    return torch.rand(width, device=DEVICE) + 0.5


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan if dtype.is_floating_point else 99, dtype=dtype, device=DEVICE)


def both(made: Callable[[], dict[str, Tensor]], call: Callable[..., None], twin: Callable[..., None]):
    """What the launcher and its twin write to outputs of the same make."""
    results = []
    for function in (call, twin):
        outputs = made()
        function(**outputs)
        results.append(outputs)
    return results


@pytest.mark.parametrize("dtype", OUTPUTS)
@pytest.mark.parametrize(("m", "width", "padded"), [*WIDTHS, LONG])
def test_prepare(m: int, width: int, padded: int, dtype: torch.dtype) -> None:
    for x, weight in ((rows(m, width), norm_weight(width)), (rows(m, width).to(dtype), None)):
        found, wanted = both(
            lambda: {
                "xw": poisoned(m, padded, dtype=dtype),
                "sums": poisoned(m, padded // 32),
                "ssq": poisoned(1, m),
            },
            lambda **out: gpu_norm.prepare(x, weight, **out),  # noqa: B023
            lambda **out: reference_gemm.prepare(x, weight, **out),  # noqa: B023
        )
        assert torch.equal(found["xw"], wanted["xw"])
        assert difference(found["sums"], wanted["sums"]) < 1e-5
        assert difference(found["ssq"], wanted["ssq"]) < 1e-6
        only = poisoned(m, padded, dtype=dtype)
        gpu_norm.prepare(x, weight, xw=only)
        assert torch.equal(only, wanted["xw"])
        assert not only[:, width:].any()


@pytest.mark.parametrize("dtype", OUTPUTS)
@pytest.mark.parametrize(("m", "width", "padded"), [*WIDTHS, LONG])
def test_rms_norm(m: int, width: int, padded: int, dtype: torch.dtype) -> None:
    x, weight = rows(m, width), norm_weight(width)
    found = poisoned(m, padded, dtype=dtype)
    gpu_norm.rms_norm(x, weight, 1e-5, out=found)
    wanted = reference.rms_norm(x, weight, 1e-5)
    assert difference(found[:, :width], wanted) < (1e-3 if dtype == torch.float16 else 5e-3)
    assert not found[:, width:].any()


def test_rows_may_be_a_view() -> None:
    x, weight = rows(4, 300), norm_weight(200)
    found, wanted = poisoned(4, 256, dtype=DTYPES[0]), poisoned(4, 256, dtype=DTYPES[0])
    gpu_norm.prepare(x[:, :200], weight, xw=found)
    gpu_norm.prepare(x[:, :200].contiguous(), weight, xw=wanted)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(("m", "width", "padded"), [*WIDTHS, LONG])
def test_quantize_is_the_references_rule(m: int, width: int, padded: int) -> None:
    x = rows(m, width)
    x[0] = 0
    for source in (x, x.to(DTYPES[0])):
        exact = source.cpu()  # CUDA's division by a number is a product with its inverse
        codes, scale = poisoned(m, padded, dtype=torch.int8), poisoned(m)
        gpu_norm.quantize_int8(source, codes=codes, scale=scale)
        wanted, scales = reference.quantize_int8_rows(exact)
        assert torch.equal(codes[:, :width].cpu(), wanted)
        assert torch.equal(scale[:, None].cpu(), scales)
        assert not codes[:, width:].any()

        codes, scale = poisoned(m, padded, dtype=torch.uint8), poisoned(m, padded // 128)
        gpu_norm.quantize_fp8(source, codes=codes, scale=scale)
        wanted, scales = reference.quantize_fp8_rows(exact)
        assert torch.equal(codes[:, :width].cpu(), wanted.view(torch.uint8))
        assert torch.equal(scale[:, : scales.shape[1]].cpu(), scales)
        assert not codes[:, width:].any()
        assert scale.isfinite().all()


def test_ties_go_to_even() -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, -2.5, 127.0]], device=DEVICE)
    codes, scale = poisoned(1, 128, dtype=torch.int8), poisoned(1)
    gpu_norm.quantize_int8(x, codes=codes, scale=scale)
    assert codes[0, :5].tolist() == [0, 2, 2, -2, 127]


def decoded(codes: Tensor, scale: Tensor) -> Tensor:
    """The values of int8 codes with a scale a row, or of e4m3 codes with one per 128."""
    if codes.dtype == torch.int8:
        return codes.float() * scale[:, None]
    return codes.view(torch.float8_e4m3fn).float() * scale.repeat_interleave(128, 1)


@pytest.mark.parametrize("form", ["int8", "fp8"])
@pytest.mark.parametrize(("m", "width", "padded"), [*WIDTHS, LONG])
def test_quantize_after_norm(m: int, width: int, padded: int, form: str) -> None:
    x, weight = rows(m, width), norm_weight(width)
    groups = (m,) if form == "int8" else (m, padded // 128)
    found, wanted = both(
        lambda: {
            "codes": poisoned(m, padded, dtype=torch.int8 if form == "int8" else torch.uint8),
            "scale": poisoned(*groups),
        },
        lambda **out: getattr(gpu_norm, f"quantize_{form}")(x, weight, 1e-5, **out),
        lambda **out: getattr(reference_gemm, f"quantize_{form}")(x, weight, 1e-5, **out),
    )
    # The root's last bit decides ties: few codes may be one off.
    assert difference(found["scale"], wanted["scale"]) < 1e-6
    assert (found["codes"] != wanted["codes"]).float().mean() < 0.01
    assert difference(decoded(**found), decoded(**wanted)) < 2e-3


@pytest.mark.parametrize("dtype", OUTPUTS)
@pytest.mark.parametrize(("m", "width", "padded"), [*WIDTHS, LONG])
def test_silu_mul(m: int, width: int, padded: int, dtype: torch.dtype) -> None:
    gate, up = rows(m, width).clamp(-60, 60), rows(m, width).flip(1) * 0.1
    plain = reference.silu_mul(torch.cat((gate, up), -1))
    pairs = 64 if width % 64 == 0 else 1
    packed = torch.stack((gate.view(m, -1, pairs), up.view(m, -1, pairs)), 2).flatten(1)  # [M, 2I]
    out, sums = poisoned(m, padded, dtype=dtype), poisoned(m, padded // 32)
    gpu_norm.silu_mul(packed, pairs, out=out, sums=sums)
    assert difference(out[:, :width], plain) < (1e-3 if dtype == torch.float16 else 5e-3)
    assert not out[:, width:].any()
    assert difference(sums, out.float().unflatten(-1, (-1, 32)).sum(-1)) < 1e-5
    narrow, same = packed.to(dtype), poisoned(m, padded, dtype=dtype)
    gpu_norm.silu_mul(narrow, pairs, out=out)
    reference_gemm.silu_mul(narrow, pairs, out=same)
    assert difference(out, same) < (1e-4 if dtype == torch.float16 else 1e-3)

    for module in (gpu_norm, reference_gemm):
        codes, scale = poisoned(m, padded, dtype=torch.int8), poisoned(m)
        module.silu_mul_int8(packed, pairs, codes=codes, scale=scale)
        wanted, scales = reference.quantize_int8_rows(plain)
        assert (codes[:, :width] != wanted).float().mean() < 0.01
        assert difference(scale[:, None], scales) < 1e-6
        assert not codes[:, width:].any()

        codes, scale = poisoned(m, padded, dtype=torch.uint8), poisoned(m, padded // 128)
        module.silu_mul_fp8(packed, pairs, codes=codes, scale=scale)
        wanted, scales = reference.quantize_fp8_rows(plain)
        assert (codes[:, :width] != wanted.view(torch.uint8)).float().mean() < 0.01
        assert difference(scale[:, : scales.shape[1]], scales) < 1e-6
        assert not codes[:, width:].any()
