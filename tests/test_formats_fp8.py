"""Block FP8: the conversion, the blocks, the edges."""

import pytest
import torch

from qrun.formats import Fp8Format
from qrun.formats.fp8 import fp8_scale, to_fp8


def e4m3_values() -> list[float]:
    """The 127 finite non-negative values in code order, from the definition."""
    values = [mantissa / 8 * 2.0**-6 for mantissa in range(8)]
    values += [(1 + mantissa / 8) * 2.0 ** (exponent - 7) for exponent in range(1, 16) for mantissa in range(8)]
    return values[:-1]  # the last code is NaN


def test_conversion_is_to_nearest_even_and_saturates() -> None:
    values = e4m3_values()
    assert values[-1] == 448
    exact = torch.tensor(values)
    codes = torch.arange(127, dtype=torch.uint8)
    assert torch.equal(to_fp8(exact.clone()).view(torch.uint8), codes)
    assert torch.equal(to_fp8(-exact).view(torch.uint8), codes + 128)
    middles = (exact[1:] + exact[:-1]) / 2
    even = torch.where(codes[:-1] % 2 == 0, codes[:-1], codes[1:])
    assert torch.equal(to_fp8(middles.clone()).view(torch.uint8), even)
    up = torch.nextafter(middles, torch.tensor(1e9))
    assert torch.equal(to_fp8(up).view(torch.uint8), codes[1:])
    large = torch.tensor([449.0, 464.0, 465.0, 1e9, 3e38, -1e9])
    assert to_fp8(large).float().tolist() == [448.0] * 5 + [-448.0]


@pytest.mark.parametrize(("n", "k"), [(1, 1), (128, 128), (130, 200), (256, 129)])
def test_every_block_has_its_own_scale(n: int, k: int) -> None:
    torch.manual_seed(0)
    w = torch.randn(n, k) * torch.logspace(-3, 3, k)
    q = Fp8Format().quantize(w)
    assert q.scale is not None
    for i in range(0, n, 128):
        for j in range(0, k, 128):
            block = w[i : i + 128, j : j + 128]
            amax = block.abs().max()
            assert q.scale[i // 128, j // 128] == amax / 448
            expected = (block * (448 / amax)).clamp(-448, 448).to(torch.float8_e4m3fn)
            found = q.codes[i : i + 128, j : j + 128]
            assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
            decoded = q.dequantize()[i : i + 128, j : j + 128]
            assert torch.equal(decoded, expected.float() * (amax / 448))


def test_zero_blocks_have_scale_one() -> None:
    w = torch.zeros(256, 128)
    w[200, 3] = -2.0
    q = Fp8Format().quantize(w)
    assert q.scale is not None
    assert q.scale.flatten().tolist() == pytest.approx([1.0, 2 / 448])
    assert torch.equal(q.dequantize(), w)


def test_scales_of_tiny_values_can_be_inverted() -> None:
    scale, inverse = fp8_scale(torch.tensor([0.0, 1e-45, 1e-37, 1.0, 3e38]))
    assert torch.isfinite(scale).all() and torch.isfinite(inverse).all()
    assert scale[:2].tolist() == [1.0, 1.0]
    assert torch.allclose(scale * inverse, torch.ones(5), rtol=1e-6)
