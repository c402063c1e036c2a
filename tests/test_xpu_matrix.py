"""Weights as an Intel GPU's kernels read them: the same values, in exactly the bytes that were forecast."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from xpu_weights import FORMATS, READ, name, weight

from qrun.backends.xpu_matrix import Placed, expand, place, placed_bytes, places
from qrun.backends.xpu_native import checked
from qrun.formats import (
    AffineFormat,
    CodebookFormat,
    Format,
    Fp8Format,
    MxFp4Format,
    NvFp4Format,
    PermutedFormat,
    PlainFormat,
    QTensor,
    TrellisFormat,
)
from qrun.formats.superblock import SuperBlockFormat

HALVES = (torch.bfloat16, torch.float16)
SHAPES = ((5, 40), (33, 200), (3, 144), (32, 256))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def shapes(form: Format) -> tuple[tuple[int, int], ...]:
    return ((5, 256), (33, 512)) if isinstance(form, SuperBlockFormat) else SHAPES


def values(placed: Placed) -> Tensor:
    return expand(placed, 0, placed.n, torch.float32)


def tolerance(placed: Placed, wanted: Tensor, half: torch.dtype) -> Tensor:
    """Of (code - zero) * scale + offset, scale and offset rounded to ``half``, and of float16's smallest steps."""
    bound = wanted.abs()
    if placed.offset is not None:
        spread = placed.offset.float().abs().t().repeat_interleave(placed.group, 1)[:, : placed.k]
        bound = bound + 2 * spread * (1 if placed.factor is None else placed.factor)
    bound = bound * (torch.finfo(half).eps / 2 * 1.01)
    return bound + (128 * 2.0**-25 if half == torch.float16 else 1e-30)


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("form", (*FORMATS, *READ), ids=name)
def test_same_values_in_the_bytes_forecast(form: Format, half: torch.dtype) -> None:
    for n, k in shapes(form):
        made = weight(form, n, k)
        assert places(made)
        placed = place(made, half)
        checked(placed, half)
        assert (placed.n, placed.k) == (n, k)
        assert placed.kp >= k
        assert placed.kind == "plain" or (placed.kp % 32 == 0 and placed.group >= 16)
        wanted = made.dequantize()
        over = (values(placed) - wanted).abs() - tolerance(placed, wanted, half)
        assert float(over.max()) <= 0
        assert torch.equal(expand(placed, 1, 3, torch.float32), values(placed)[1:3])
        assert expand(placed, 0, 1, half).dtype == half
        assert placed.nbytes == placed_bytes(form, (n, k))


EXACT = [form for form in FORMATS if not (isinstance(form, AffineFormat) and form.bits == 8 and not form.symmetric)]


@pytest.mark.parametrize("form", EXACT, ids=name)
def test_what_bf16_holds_is_kept_to_the_bit(form: Format) -> None:
    """Our own formats have BF16 scales, E8M0 or e4m3, or float32 ones that stay so, and whole zeros."""
    made = weight(form, 7, 128)
    if isinstance(form, CodebookFormat) and form.scale_dtype == torch.float32:
        assert made.scale is not None
        made = replace(made, scale=made.scale.bfloat16().float())
    torch.testing.assert_close(values(place(made, torch.bfloat16)), made.dequantize(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", [form for form in READ if isinstance(form, AffineFormat) and form.bits < 8], ids=name)
def test_what_is_left_of_zeros_is_less_than_half_a_step(form: AffineFormat) -> None:
    placed = place(weight(form, 8, 256), torch.bfloat16)
    if placed.offset is None:
        assert form.zero_dtype == torch.uint8
    else:
        assert placed.scale is not None
        assert bool((placed.offset.float().abs() <= placed.scale.float() * 0.505).all())
        assert float(placed.offset.float().abs().max()) > 0


def test_codes_that_stand_as_they_are_read_are_not_copied() -> None:
    for form in (AffineFormat(4, 64, True), AffineFormat(4, 64), AffineFormat(8, 0, True), Fp8Format(), NvFp4Format()):
        made = weight(form, 8, 128)
        assert place(made, torch.bfloat16).codes.data_ptr() == made.codes.data_ptr()


def test_symmetric_codes_have_the_zero_8() -> None:
    for bits in (2, 3, 4):
        placed = place(weight(AffineFormat(bits, 32, True), 8, 64), torch.bfloat16)
        assert placed.zero is not None
        assert bool((placed.zero == 8).all())


def test_a_group_as_wide_as_a_row_is_a_scale_a_row_in_float32() -> None:
    placed = place(weight(AffineFormat(4, 64), 8, 40), torch.bfloat16)
    assert (placed.group, placed.kp) == (64, 64)
    assert placed.scale is not None
    assert (placed.scale.dtype, tuple(placed.scale.shape)) == (torch.float32, (1, 8))


def test_what_has_no_layout() -> None:
    for form in (
        PlainFormat(torch.float32),
        TrellisFormat(),
        AffineFormat(4, 8),
        AffineFormat(4, 24),
        Fp8Format(1, 40),
    ):
        made = QTensor.empty(form, (8, 256))
        assert not places(made)
        assert placed_bytes(form, (8, 256)) == made.nbytes
        with pytest.raises(ValueError, match="no layout"):
            place(made, torch.bfloat16)
    assert places(QTensor.empty(AffineFormat(4, 24, True), (8, 24)))  # a scale a row


def test_bytes_of_experts_and_of_permuted_columns() -> None:
    form = AffineFormat(4, 128)
    assert placed_bytes(form, (3, 8, 256)) == 3 * placed_bytes(form, (8, 256))
    assert placed_bytes(PermutedFormat(form), (8, 256)) == placed_bytes(form, (8, 256)) + 256 * 8


def test_rows_are_taken_apart_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for form in (AffineFormat(3, 32), AffineFormat(6, 32)):
        made = weight(form, 33, 96)
        whole = values(place(made, torch.bfloat16))
        with monkeypatch.context() as patch:
            patch.setattr("qrun.backends.xpu_matrix._PIECE", 96 * 5)
            assert torch.equal(values(place(made, torch.bfloat16)), whole)


def relative(placed: Placed, wanted: Tensor) -> float:
    return float((values(placed) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("exponent", (-40, -20, 20, 100))
def test_float16_scales_out_of_range_lack_a_power_of_two(exponent: int) -> None:
    size = 2.0**exponent
    made = AffineFormat(4, 32).quantize(torch.randn(8, 128) * size)
    block = MxFp4Format().quantize(torch.randn(8, 128) * size)
    plain = QTensor(format=PlainFormat(), shape=(8, 128), codes=(torch.randn(8, 128) * size).bfloat16())
    for each in (made, block, plain) if exponent > 0 else (made, block):
        placed = place(each, torch.float16)
        assert placed.factor is not None
        assert placed.factor.shape == ()
        assert torch.frexp(placed.factor).mantissa == 0.5
        assert relative(placed, each.dequantize()) < 2.0**-11
        assert placed.nbytes == placed_bytes(each.format, (8, 128)) + 4
    assert place(made, torch.bfloat16).factor is None


def test_nvfp4_scales_leave_float16_room() -> None:
    """Six times 448 would stand there with sums over thousands of columns to come."""
    made = weight(NvFp4Format(), 8, 128)
    placed = place(made, torch.float16)
    assert placed.scale is not None
    assert float(placed.scale.max()) < 1
    torch.testing.assert_close(values(placed), made.dequantize(), rtol=1e-6, atol=0)


def test_weights_of_zeros_and_of_a_scale_of_zero() -> None:
    zeros = AffineFormat(4, 32).quantize(torch.zeros(4, 64))
    assert not values(place(zeros, torch.float16)).any()
    made = weight(AffineFormat(4, 32, scale_dtype=torch.float16, zero_dtype=torch.float16, minimum=True), 4, 64)
    assert made.scale is not None
    made.scale.zero_()
    wanted = made.dequantize()
    torch.testing.assert_close(values(place(made, torch.bfloat16)), wanted, rtol=2.0**-8, atol=0)
