"""Integer formats: FastDeploy's arithmetic, the bit stream, and the search."""

import math

import pytest
import torch
from torch import Tensor

from qrun.formats import AffineFormat, from_tensors
from qrun.formats.packing import pack, unpack
from qrun.formats.search import affine_search


def noise(kind: str, *shape: int) -> Tensor:
    torch.manual_seed(0)
    if kind == "gauss":
        return torch.randn(shape)
    return torch.distributions.StudentT(4.0).sample(shape)


def sqnr(w: Tensor, values: Tensor) -> float:
    """Signal over quantization noise, dB."""
    return float(10 * torch.log10(w.double().square().sum() / (w.double() - values).square().sum()))


def plain_rounding(w: Tensor, bits: int, group: int, symmetric: bool) -> Tensor:
    """Round to nearest over the full range of each group, the scale rounded to BF16."""
    x = w.reshape(-1, group)
    if symmetric:
        low, high, zero = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, torch.zeros(len(x), 1)
        scale = (x.abs().amax(1, keepdim=True) / high).bfloat16().float()
    else:
        low, high = 0, 2**bits - 1
        bottom, top = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
        scale = ((top - bottom) / high).bfloat16().float()
        zero = (-bottom / scale).round().clamp(low, high)
    codes = ((x / scale).round() + zero).clamp(low, high)
    return ((codes - zero) * scale).view(w.shape)


@pytest.mark.parametrize("bits", range(2, 9))
def test_bit_stream_is_little_endian(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 5, 32), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, 5, 4 * bits)
    assert torch.equal(unpack(packed, bits), codes)
    number = sum(code << (bits * i) for i, code in enumerate(codes[2, 4].tolist()))
    assert bytes(packed[2, 4].tolist()) == number.to_bytes(4 * bits, "little")


def test_int4_channel_by_hand() -> None:
    w = torch.tensor([[7.0, -7.0, 3.5, -3.5, 2.5, 0.5, -0.49, 0.0], [0.0] * 8])
    q = AffineFormat(4, 0, symmetric=True).quantize(w)
    codes = [7, -7, 4, -4, 3, 1, 0, 0]  # ties away from zero
    nibbles = [code + 8 for code in codes]
    assert q.codes[0, :4].tolist() == [nibbles[2 * i] | nibbles[2 * i + 1] << 4 for i in range(4)]
    assert q.codes[0, 4:].tolist() == [0x88] * 12  # K padded to 32 with zeros
    assert q.codes[1].tolist() == [0x88] * 16
    assert q.scale is not None and q.scale.dtype == torch.float32
    assert q.scale.tolist() == [[1.0], [0.0]]
    assert q.zero is None
    assert q.dequantize()[0].tolist() == codes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_channel_is_fastdeploys_arithmetic(bits: int, dtype: torch.dtype) -> None:
    w = noise("gauss", 5, 70).to(dtype)
    q = AffineFormat(bits, 0, symmetric=True).quantize(w)
    bound = 2 ** (bits - 1) - 1
    stored = q.codes if bits == 8 else unpack(q.codes, 4).int() - 8
    assert q.scale is not None
    for row in range(5):
        values = w[row].float()
        absmax = values.abs().max()
        assert q.scale[row].item() == (absmax / bound).to(dtype).item()
        for k in range(70):
            scaled = (values[k] / absmax * bound).item()
            assert stored[row, k].item() == int(math.copysign(math.floor(abs(scaled) + 0.5), scaled))
    assert not stored[:, 70:].any()


def test_grouped_by_hand() -> None:
    w = torch.arange(-5.0, 11.0).repeat(1, 4) * 0.25  # sixteen levels, each four times
    q = AffineFormat(4, 64).quantize(w)
    assert q.scale is not None and q.zero is not None
    assert q.scale.tolist() == [[0.25]]
    assert q.zero.tolist() == [[5]]
    assert q.codes[0, :8].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    assert torch.equal(q.dequantize(), w)


def test_padding_decodes_to_zero() -> None:
    for format in (AffineFormat(4, 64), AffineFormat(3, 32), AffineFormat(8, 64, True), AffineFormat(2, 32, True)):
        q = format.quantize(noise("gauss", 3, 33) + 5)
        wide = from_tensors(format, (3, format.padded(33)), q.tensors())
        assert not wide.dequantize()[:, 33:].any()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("kind", ["gauss", "heavy"])
def test_search_beats_plain_rounding_in_every_group(kind: str, bits: int, symmetric: bool) -> None:
    w = noise(kind, 64, 512)
    w[0] = w[0].abs() + 3  # all on one side of zero
    q = AffineFormat(bits, 64, symmetric).quantize(w)
    ours = (q.dequantize() - w).view(-1, 64).square().sum(1)
    plain = (plain_rounding(w, bits, 64, symmetric) - w).view(-1, 64).square().sum(1)
    assert bool((ours <= plain * 1.001).all())
    assert bits > 4 or ours.sum() < 0.97 * plain.sum()


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "gauss", "heavy"),
    [
        (4, 32, False, 22.1, 20.4),
        (4, 64, False, 21.1, 18.7),
        (4, 128, False, 20.3, 17.1),
        (4, 64, True, 20.3, 16.8),
        (3, 64, False, 15.0, 12.7),
        (2, 64, False, 8.9, 7.4),
        (2, 32, False, 9.5, 8.3),
        (8, 64, True, 44.4, 40.0),
        (8, 0, True, 41.0, 30.0),
    ],
)
def test_quality_is_as_measured(bits: int, group: int, symmetric: bool, gauss: float, heavy: float) -> None:
    format = AffineFormat(bits, group, symmetric)
    for kind, least in (("gauss", gauss), ("heavy", heavy)):
        w = noise(kind, 64, 4096)
        assert sqnr(w, format.quantize(w).dequantize()) >= least


def test_search_comes_near_the_best_there_is() -> None:
    w = noise("gauss", 64, 16)
    codes, found = affine_search(w.clone(), 4, False)
    ours = ((codes - found.zero) * found.scale - w).square().sum(0)
    best = torch.full_like(ours, torch.inf)
    for zero in range(16):
        for ratio in torch.linspace(0.7, 1.0, 25):
            scale = ((w.amax(0) - w.amin(0)) / 15 * ratio).bfloat16().float()
            tried = ((w / scale).round().clamp(-zero, 15 - zero) * scale - w).square().sum(0)
            best = torch.minimum(best, tried)
    assert float(10 * torch.log10(ours.sum() / best.sum())) < 0.25


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_any_group_decodes_near_itself(bits: int, symmetric: bool) -> None:
    torch.manual_seed(bits)
    sizes = torch.randint(-140, 125, (200, 40)).float()
    w = torch.randn(200, 40).clamp(-4, 4) * torch.where(torch.rand(200, 1) < 0.5, sizes, sizes[:, :1]).exp2()
    w[torch.rand(200, 40) < 0.2] = 0
    values = AffineFormat(bits, 32, symmetric).quantize(w).dequantize()
    assert torch.isfinite(values).all()
    for group, decoded in zip(w.double().split(32, 1), values.double().split(32, 1), strict=True):
        reach = group.clamp(min=0).amax(1) - group.clamp(max=0).amin(1)
        assert bool(((group - decoded).norm(dim=1) <= 1.01 * group.norm(dim=1) + 1e-38).all())
        assert bool(((group - decoded).abs().amax(1) <= 1.01 * reach + 1e-38).all())


@pytest.mark.parametrize("wrong", [(1, 64, True), (9, 64, True), (4, 0, False), (4, 12, True), (4, -8, True)])
def test_impossible_formats_are_refused(wrong: tuple[int, int, bool]) -> None:
    with pytest.raises(ValueError, match="no such"):
        AffineFormat(*wrong)
