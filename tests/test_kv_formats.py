"""Cache formats: codes by hand, against a scalar reading of the rules, and what the rotation buys."""

import math

import pytest
import torch
from torch import Tensor

from qrun.formats import KVFormat, hadamard32, kv_format
from qrun.formats.packing import unpack
from qrun.recipe import CacheType

NAMES: tuple[CacheType, ...] = ("bf16", "fp32", "int8", "int4", "fp8")
every_format = pytest.mark.parametrize("format", [kv_format(name) for name in NAMES], ids=str)


def vectors(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def sqnr(x: Tensor, values: Tensor) -> float:
    return float(10 * torch.log10(x.double().square().sum() / (x.double() - values).square().sum()))


@every_format
@pytest.mark.parametrize("head_dim", [1, 32, 64, 80, 128])
@pytest.mark.parametrize("lead", [(), (3,), (2, 5)], ids=str)
def test_layout_is_what_encode_makes(format: KVFormat, head_dim: int, lead: tuple[int, ...]) -> None:
    codes, scale = format.encode(vectors(*lead, head_dim).bfloat16())
    made = {"codes": codes} if scale is None else {"codes": codes, "scale": scale}
    layout = format.layout(head_dim)
    assert layout == {name: (tuple(t.shape[len(lead) :]), t.dtype) for name, t in made.items()}
    assert all(tensor.shape[: len(lead)] == lead for tensor in made.values())
    bits = sum(8 * tensor.nbytes for tensor in made.values()) / math.prod((*lead, head_dim))
    assert format.bits_per_value(head_dim) == pytest.approx(bits)
    values = format.decode(codes, scale, head_dim)
    assert values.shape == (*lead, head_dim)
    assert values.dtype == torch.float32


def test_bits_per_value() -> None:
    assert [kv_format(name).bits_per_value(128) for name in NAMES] == [16, 32, 8.5, 4.5, 8.25]
    assert [kv_format(name).rotated for name in NAMES] == [False, False, False, True, False]


@every_format
def test_zeros_are_exact_and_every_size_is_finite(format: KVFormat) -> None:
    codes, scale = format.encode(torch.zeros(2, 64))
    assert not format.decode(codes, scale, 64).any()
    for size in (1e30, 1e-12, 1e-38, 1e-44):
        x = vectors(4, 64).clamp(-1, 1) * size
        values = format.decode(*format.encode(x), 64)
        assert torch.isfinite(values).all()
        assert float((values - x).norm()) <= 1.01 * float(x.norm()) + 1e-37


@every_format
def test_vectors_do_not_mix(format: KVFormat) -> None:
    x = vectors(3, 80)
    together = format.decode(*format.encode(x), 80)
    for i in range(3):
        assert torch.allclose(format.decode(*format.encode(x[i]), 80), together[i], atol=1e-6)


def test_int8_by_hand() -> None:
    x = torch.zeros(40)
    x[:5] = torch.tensor([127.0, -127.0, 2.5, 3.5, 0.4])
    x[32:34] = torch.tensor([254.0, -1.0])
    codes, scale = kv_format("int8").encode(x)
    assert scale is not None
    assert scale.tolist() == [1.0, 2.0]
    assert codes.tolist() == [127, -127, 2, 4, 0] + [0] * 27 + [127] + [0] * 31  # ties to even: −0.5 is 0


def test_fp8_by_hand() -> None:
    codes, scale = kv_format("fp8").encode(torch.tensor([896.0, -2.0, 0.0]))
    assert scale is not None
    assert scale.tolist() == [2.0]
    assert codes.float().tolist() == [448.0, -1.0, 0.0]


def test_int4_follows_the_rule() -> None:
    x = vectors(50, 64)
    codes, scale = kv_format("int4").encode(x)
    assert scale is not None
    rotated, found = hadamard32(x).view(-1, 32), unpack(codes, 4).view(-1, 32)
    for group, code, stored in zip(rotated, found.tolist(), scale.flatten(), strict=True):
        largest = max(group.tolist(), key=abs)
        assert stored == torch.tensor(largest / -8).bfloat16()
        inverse = 1 / stored.float()
        for value, q in zip(group, code, strict=True):
            assert q == min(15, max(0, math.floor((value * inverse + 8.5).item())))


def test_int4_packs_even_low() -> None:
    x = torch.zeros(32)
    x[0] = math.sqrt(32)  # every rotated value is 1
    codes, scale = kv_format("int4").encode(hadamard32(x * torch.tensor([2.0] + [0.0] * 31)) / 2)
    assert scale is not None
    # Rotated back: the first value is sqrt(32), the others 0, so the first code is 0 and the others 8.
    assert codes.tolist() == [0x80] + [0x88] * 15
    assert scale.float().item() == pytest.approx(-math.sqrt(32) / 8, rel=2**-8)


def test_hadamard_is_orthonormal_and_its_own_inverse() -> None:
    matrix = hadamard32(torch.eye(32))
    assert torch.allclose(matrix @ matrix.T, torch.eye(32), atol=1e-6)
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(matrix.abs(), torch.full((32, 32), 32**-0.5))
    assert matrix[0].min() > 0
    for i in range(32):
        for j in range(32):
            assert bool(matrix[i, j] < 0) == ((i & j).bit_count() % 2 == 1)
    x, y = vectors(2, 3, 96)
    assert torch.allclose(hadamard32(hadamard32(x)), x, atol=1e-5)
    assert torch.allclose((hadamard32(x) * hadamard32(y)).sum(-1), (x * y).sum(-1), atol=1e-4)


def test_quality() -> None:
    x = vectors(500, 128)
    x[:, 3] *= 30  # a channel that stands out, as K has them
    for name, least in (("bf16", 55.0), ("int8", 38.0), ("fp8", 31.0), ("int4", 20.0)):
        format = kv_format(name)  # type: ignore[arg-type]
        assert sqnr(x, format.decode(*format.encode(x), 128)) > least, name


def test_rotation_saves_what_lies_beside_an_outlier() -> None:
    x = vectors(500, 32)
    x[:, 3] *= 30
    format = kv_format("int4")
    rotated = format.decode(*format.encode(x), 32)
    unrotated = hadamard32(format.decode(*format.encode(hadamard32(x)), 32))  # rotated twice: not at all
    rest = [i for i in range(32) if i != 3]
    assert sqnr(x[:, rest], rotated[:, rest]) > sqnr(x[:, rest], unrotated[:, rest]) + 3
    assert sqnr(x, rotated) > 15
