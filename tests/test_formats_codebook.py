"""NF4, FP4, MXFP4, NVFP4: nearest values, scales as their definitions have them, quality."""

import math

import pytest
import torch
from torch import Tensor

from qrun.formats import CodebookFormat, MxFp4Format, NvFp4Format, format_of
from qrun.formats.codebook import E2M1, NF4
from qrun.formats.packing import unpack
from qrun.recipe import WeightScheme

FORMATS = [CodebookFormat("nf4", NF4, 64), CodebookFormat("fp4", E2M1, 64), MxFp4Format(), NvFp4Format()]
every_format = pytest.mark.parametrize("format", FORMATS, ids=str)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def sqnr(w: Tensor, values: Tensor) -> float:
    return float(10 * torch.log10(w.double().square().sum() / (w.double() - values).square().sum()))


def test_the_values() -> None:
    assert len(NF4) == len(E2M1) == 16
    assert list(NF4) == sorted(NF4)
    assert (NF4[0], NF4[7], NF4[15]) == (-1.0, 0.0, 1.0)
    # QLoRA: quantiles of the normal distribution, half of them on each side, the outermost scaled to 1.
    ppf = torch.distributions.Normal(0.0, 1.0).icdf
    offset = 0.9677083
    positive = ppf(torch.linspace(offset, 0.5, 9)[:-1].double())
    negative = ppf(torch.linspace(offset, 0.5, 8)[:-1].double())
    made = sorted([*(positive / positive[0]).tolist(), 0.0, *(-negative / negative[0]).tolist()])
    assert list(NF4) == pytest.approx(made, abs=1e-5)
    for code, value in enumerate(E2M1):  # sign, two exponent bits of bias 1, one mantissa bit
        sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
        magnitude = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
        assert value == (-magnitude if sign else magnitude)


@every_format
def test_codes_are_the_nearest_to_the_stored_scale(format: CodebookFormat) -> None:
    w = noise(3, 2 * format.group)
    q = format.quantize(w)
    scale = format._load(q.tensors()).repeat_interleave(format.group, -1)
    chosen = unpack(q.codes, 4).long()
    values = torch.tensor(format.values)
    assert torch.equal(q.dequantize(), values[chosen] * scale)
    distance = ((w / scale)[..., None] - values).abs()
    assert torch.allclose(distance.gather(-1, chosen[..., None])[..., 0], distance.amin(-1), atol=1e-6)


def test_halfway_goes_to_the_even_code() -> None:
    w = torch.tensor([[6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0, -6.0]])
    q = MxFp4Format().quantize(torch.cat((w, w), 1))
    even = [6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 0.0, -1.0, -1.0, -2.0, -2.0, -4.0, -4.0, -6.0]
    assert q.dequantize().tolist() == [even * 2]
    assert not (unpack(q.codes, 4) == 8).any()  # minus zero is never written


def test_mxfp4_by_hand() -> None:
    w = torch.zeros(3, 32)
    w[0, :4] = torch.tensor([7.0, 1.0, -6.0, 0.5])  # floor(log2 7) − 2 = 0; clipping 7 to 6 costs as much as 7 to 8
    w[1, :4] = torch.tensor([7.9, 7.9, 8.0, 0.0]) / 16  # log2 0.5 = −1: −3 standard
    q = MxFp4Format().quantize(w)
    assert q.scale is not None
    assert q.scale.tolist() == [[127], [127 - 3], [0]]
    assert q.codes[0, :2].tolist() == [0x27, 0x1F]
    assert q.dequantize()[0, :4].tolist() == [6.0, 1.0, -6.0, 0.5]
    assert q.dequantize()[1, :4].tolist() == [0.5, 0.5, 0.5, 0.0]


def test_mxfp4_takes_the_better_exponent() -> None:
    w = noise(64, 256)
    q = MxFp4Format().quantize(w)
    groups, values = w.view(-1, 32), torch.tensor(E2M1)
    ours = (q.dequantize().view(-1, 32) - groups).square().sum(1)
    standard = torch.tensor([2.0 ** (math.floor(math.log2(amax)) - 2) for amax in groups.abs().amax(1).tolist()])
    errors: list[Tensor] = []
    for scale in (standard, 2 * standard):
        nearest = ((groups / scale[:, None])[..., None] - values).abs().argmin(-1)
        errors.append((values[nearest] * scale[:, None] - groups).square().sum(1))
    assert bool((ours <= torch.minimum(*errors) * 1.001).all())
    assert ours.sum() < 0.99 * errors[0].sum()


@pytest.mark.parametrize("code", [0, 1, 127, 254])
def test_e8m0_decodes_to_powers_of_two(code: int) -> None:
    values = MxFp4Format()._load({"scale": torch.tensor([[code]], dtype=torch.uint8)})
    assert values.item() == 2.0 ** (code - 127)


def test_nvfp4_has_a_scale_of_scales() -> None:
    w = noise(2, 3, 48)
    w[1] *= 1000
    q = NvFp4Format().quantize(w)
    assert q.scale is not None and q.scale2 is not None
    assert torch.equal(q.scale2, w.abs().amax((1, 2), keepdim=True) / (6 * 448))
    assert q.scale.dtype == torch.float8_e4m3fn
    assert q.scale.float().amax() <= 448
    assert bool((q.scale.float() >= 0).all())
    ratio = w.unflatten(-1, (-1, 16)).abs().amax(-1) / (q.scale.float() * q.scale2)
    assert bool(((ratio > 3.3) & (ratio < 6.8)).all())  # the largest is near 6 or near 4, e4m3's rounding apart


@pytest.mark.parametrize(("name", "least"), [("nf4", 21.2), ("fp4", 20.1), ("mxfp4", 18.9), ("nvfp4", 21.3)])
def test_quality_is_as_measured(name: str, least: float) -> None:
    w = noise(128, 4096)
    format = format_of(WeightScheme(name, 4))  # type: ignore[arg-type]
    assert sqnr(w, format.quantize(w).dequantize()) >= least


@pytest.mark.parametrize("format", FORMATS[:2], ids=str)
def test_search_beats_plain_absmax_in_every_group(format: CodebookFormat) -> None:
    w = noise(32, 512)
    values, groups = torch.tensor(format.values), w.view(-1, format.group)
    scale = (groups.abs().amax(1, keepdim=True) / max(format.values)).bfloat16().float()
    nearest = ((groups / scale)[..., None] - values).abs().argmin(-1)
    plain = (values[nearest] * scale - groups).square().sum(1)
    ours = (format.quantize(w).dequantize().view(-1, format.group) - groups).square().sum(1)
    assert bool((ours <= plain * 1.01).all())
    assert ours.sum() < 0.97 * plain.sum()
