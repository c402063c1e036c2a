"""Trellis codes: the search against all paths, what is decoded against the definition, and what they are good for."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numba import njit
from torch import Tensor

from qrun.errors import CheckpointError
from qrun.formats import AffineFormat, Format, QTensor, TrellisFormat
from qrun.formats.trellis import GROUP, VALUES, windows
from qrun.formats.viterbi import cheapest, in_torch
from qrun.kernels import cpu_trellis
from qrun.kernels.cpu_pool import aligned
from qrun.kernels.cpu_simd import I8x64, _op, bytes_as_i32, load_bytes, store_i32
from qrun.quantize.export import module_tensors, quantization_config
from qrun.quantize.gptq import Hessian
from qrun.quantize.trellis import trellis_gptq
from qrun.readers.compressed_tensors import CompressedTensorsReader


class Tensors(dict[str, Tensor]):
    """Tensors by name, as a checkpoint has them."""

    def names(self) -> list[str]:
        return sorted(self)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self[name].dtype

    def read(self, name: str) -> Tensor:
        return self[name]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decibels(w: Tensor, values: Tensor) -> float:
    return float(-10 * torch.log10((w - values).square().sum() / w.square().sum()))


def on_any_device(
    target: Tensor, scale: Tensor, table: Tensor, *, after: Tensor | None = None, end: bool = True
) -> Tensor:
    return in_torch(target, scale, table, after, end)


either_search = pytest.mark.parametrize("search", [cheapest, on_any_device])
TABLE = torch.tensor(VALUES, dtype=torch.float32)


def connected(states: Tensor) -> bool:
    return bool(((states[:, 1:] & 15) == (states[:, :-1] >> 2)).all())


@either_search
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("end", [True, False])
def test_no_path_is_cheaper(search: Callable[..., Tensor], steps: int, end: bool) -> None:
    target, scale = 60 * normal(6, steps, seed=steps), 0.5 + normal(6, steps, seed=9).abs()
    found = search(target, scale, TABLE, end=end)
    cost = (target - TABLE[found.long()] * scale).square().sum(1)
    tail = [(0, 0)] if end else list(itertools.product(range(4), repeat=2))
    paths = torch.tensor([[*p, *t] for p in itertools.product(range(4), repeat=steps) for t in tail])
    states = paths[:, :-2] | paths[:, 1:-1] << 2 | paths[:, 2:] << 4  # [paths, steps]
    every = (target[:, None] - TABLE[states] * scale[:, None]).square().sum(2)
    assert torch.allclose(cost, every.amin(1), rtol=1e-5)
    assert connected(found)
    assert not end or bool((found[:, -1] < 4).all())


@either_search
def test_a_search_goes_on_from_where_another_ended(search: Callable[..., Tensor]) -> None:
    target, one = 50 * normal(8, 12), torch.ones(8, 12)
    first = search(target[:, :4], one[:, :4], TABLE, end=False)
    rest = search(target[:, 4:], one[:, 4:], TABLE, after=first[:, -1])
    states, best = torch.cat((first, rest), 1), search(target, one, TABLE)
    assert connected(states)
    costs = [float((target - TABLE[path.long()]).square().sum()) for path in (best, states)]
    assert costs[0] <= costs[1] < 2 * costs[0]


def test_both_searches_find_the_same() -> None:
    target, scale = 60 * normal(9, 150), 0.5 + normal(9, 150, seed=9).abs()
    assert torch.equal(cheapest(target, scale, TABLE), on_any_device(target, scale, TABLE))


@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 5), (2, 64), (5, 70), (4, 129), (3, 200)])
def test_values_are_what_the_layout_says(n: int, k: int) -> None:
    q = TrellisFormat().quantize(normal(n, k))
    codes, steps, row = q.codes, q.tensors()["scale"], q.tensors()["scale2"].float()
    wanted = torch.empty(n, k)
    for i, j in itertools.product(range(n), range(k)):
        bits = [int(codes[i, b // 8]) >> b % 8 & 1 if b // 8 < codes.shape[1] else 0 for b in range(2 * j, 2 * j + 6)]
        value = VALUES[sum(bit << place for place, bit in enumerate(bits))]
        step = int(steps[i, j // 64]) >> (4 if j // GROUP % 2 else 0) & 15
        wanted[i, j] = value * (step * row[i, 0])
    assert torch.equal(q.dequantize(), wanted)


def test_windows_end_in_zeros() -> None:
    assert windows(torch.tensor([[1, 2, 3]], dtype=torch.uint8)).tolist() == [[0b111001, 0b1110, 0b11]]


def test_negating_a_table_is_reversing_it() -> None:
    assert len(VALUES) == 64
    assert all(VALUES[63 - i] == -VALUES[i] for i in range(64))
    assert max(map(abs, VALUES)) == 127  # so that 128 more is a byte


def test_rows_may_be_put_in_another_order() -> None:
    q = TrellisFormat().quantize(normal(7, 100))
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    moved = q.take_rows(order)
    assert isinstance(moved, QTensor)
    assert torch.equal(moved.dequantize(), q.dequantize()[order])


def test_two_bits_hold_more_than_four_values() -> None:
    """On normal numbers: 11.1 dB at 2.14 bits, where the best four values and a zero point have 9.5 at 2.75."""
    w = normal(64, 512)
    trellis, plain = TrellisFormat(), AffineFormat(2, 32)
    assert trellis.bits_per_weight((64, 512)) < plain.bits_per_weight((64, 512)) - 0.5
    assert decibels(w, trellis.quantize(w).dequantize()) > 11
    assert decibels(w, trellis.quantize(w).dequantize()) > decibels(w, plain.quantize(w).dequantize()) + 1.4


def test_columns_that_are_never_read_cost_nothing() -> None:
    hessian = Hessian.zeros(128)
    x = normal(300, 128)
    x[:, 64:] = 0
    hessian.add(x)
    w = normal(16, 128)
    q = trellis_gptq(w, hessian)
    assert decibels(w[:, :64] @ x.t()[:64], q.dequantize()[:, :64] @ x.t()[:64]) > 11


def _correlated(k: int) -> Hessian:
    hessian = Hessian.zeros(k)
    hessian.add(normal(600, k // 4, seed=1) @ normal(k // 4, k, seed=2) + 0.3 * normal(600, k, seed=3))
    return hessian


@pytest.mark.parametrize("k", [70, 192])
def test_calibrated_rounding_spares_the_outputs(k: int) -> None:
    hessian, w = _correlated(k), normal(24, k)
    plain, careful = TrellisFormat().quantize(w), trellis_gptq(w, hessian)
    assert careful.format == plain.format
    assert hessian.error(careful.dequantize() - w) < 0.5 * hessian.error(plain.dequantize() - w)
    again = trellis_gptq(w, hessian)
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in careful.tensors().items())


def test_without_inputs_it_is_the_format_itself() -> None:
    w = normal(5, 70)
    assert torch.equal(trellis_gptq(w, Hessian.zeros(70)).dequantize(), TrellisFormat().quantize(w).dequantize())


@pytest.mark.parametrize("format", [TrellisFormat(), AffineFormat(2, 32)], ids=str)
def test_one_outlier_costs_its_row_no_more_than_a_scale(format: Format) -> None:
    """Scales of a row share 4 bits: a weight of 50 deviations leaves the other groups coarser ones, not none."""
    w = normal(8, 512)
    w[3, 100] = 50.0
    values = format.quantize(w).dequantize()
    others = torch.cat((w[3, :96], w[3, 128:])), torch.cat((values[3, :96], values[3, 128:]))
    assert float(values[3, 100]) == pytest.approx(50, rel=0.26)
    assert decibels(*others) > 8


@pytest.mark.parametrize("k", [64, 70, 256])
def test_what_is_written_is_read(k: int) -> None:
    q = TrellisFormat().quantize(normal(6, k))
    written = module_tensors("a", q, "16", torch.bfloat16)
    config = quantization_config({"a": q.format}, "16", kv_fp8=False, routers=False)
    reader = CompressedTensorsReader(Tensors(written), config)
    assert reader.holds("a")
    assert set(reader.parts("a")) == set(written)
    read = reader.read("a", (6, k))
    assert read.format == q.format
    assert all(torch.equal(tensor, q.tensors()[name]) for name, tensor in read.tensors().items())
    for name, tensor in written.items():
        with pytest.raises(CheckpointError, match=name):
            CompressedTensorsReader(Tensors(written | {name: tensor[:, 1:]}), config).read("a", (6, k))


def _forms() -> list[Any]:
    portable = [cpu_trellis._lookup_portable]
    return [*portable, cpu_trellis._lookup_shuffled] if cpu_trellis.AVX2 else portable


@pytest.mark.parametrize("form", _forms(), ids=lambda form: form.__name__)
def test_every_machine_looks_up_the_same(form: Any) -> None:
    def find(builder: Any, table: Any, index: Any) -> Any:
        return form(builder, table, index)

    looked_up = _op(I8x64, I8x64, I8x64)(find)

    @njit
    def run(table: int, index: int, out: int) -> None:
        store_i32(out, bytes_as_i32(looked_up(load_bytes(table), load_bytes(index))))

    table, index, out = (aligned(64, np.uint8) for _ in range(3))
    table[:] = np.random.default_rng(0).permutation(64) + 100
    for start in range(0, 256, 64):  # only six bits of the index count
        index[:] = np.arange(start, start + 64)
        run(table.ctypes.data, index.ctypes.data, out.ctypes.data)
        assert (out == table).all()
