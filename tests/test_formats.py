"""What every weight format keeps: its layout, its size, its rows, its refusals, its calm before odd numbers."""

import threading

import pytest
import torch
from torch import Tensor

from qrun.formats import AffineFormat, Format, PlainFormat, QTensor, format_of, from_tensors
from qrun.recipe import WeightScheme

SCHEMES = [
    WeightScheme("bf16", 16),
    WeightScheme("fp32", 32),
    WeightScheme("int", 8, 0),
    WeightScheme("int", 4, 0),
    WeightScheme("int", 3, 0),
    WeightScheme("int", 8, 64),
    WeightScheme("int", 8, 32, symmetric=False),
    WeightScheme("int", 6, 64, symmetric=False),
    WeightScheme("int", 4, 64, symmetric=False),
    WeightScheme("int", 4, 32),
    WeightScheme("int", 3, 64, symmetric=False),
    WeightScheme("int", 2, 32, symmetric=False),
    WeightScheme("int", 2, 128),
    WeightScheme("fp8", 8),
    WeightScheme("nf4", 4),
    WeightScheme("fp4", 4),
    WeightScheme("mxfp4", 4),
    WeightScheme("nvfp4", 4),
    WeightScheme("trellis", 2),
]
SHAPES = [(1, 1), (3, 5), (1, 64), (130, 257), (2, 3, 129), (2, 2, 5, 100)]
every_format = pytest.mark.parametrize("format", [format_of(scheme) for scheme in SCHEMES], ids=str)


def weights(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_error(w: Tensor, q: QTensor) -> float:
    return float(((q.dequantize() - w.float()).norm() / w.float().norm()).item())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_format_is_called_what_its_scheme_is(scheme: WeightScheme) -> None:
    assert str(format_of(scheme)) == str(scheme)
    assert format_of(scheme) == format_of(scheme)


@every_format
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layout_is_what_quantize_makes(format: Format, shape: tuple[int, ...]) -> None:
    w = weights(*shape, dtype=torch.bfloat16)
    q = format.quantize(w)
    made = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in q.tensors().items()}
    assert made == format.layout(shape)
    assert all(tensor.is_contiguous() for tensor in q.tensors().values())
    assert q.shape == shape
    assert format.bits_per_weight(shape) == pytest.approx(8 * q.nbytes / w.numel())
    values = q.dequantize()
    assert values.shape == w.shape
    assert values.dtype == torch.float32
    assert torch.equal(q.dequantize(torch.bfloat16), values.bfloat16())


@every_format
def test_stored_tensors_read_back(format: Format) -> None:
    q = format.quantize(weights(2, 5, 70))
    again = from_tensors(format, q.shape, q.tensors())
    assert torch.equal(again.dequantize(), q.dequantize())
    with pytest.raises(ValueError, match="codes"):
        from_tensors(format, (2, 5, 300), q.tensors())
    with pytest.raises(ValueError, match="codes"):
        from_tensors(format, q.shape, {**q.tensors(), "codes": q.codes.to(torch.float64)})
    with pytest.raises(ValueError, match="none"):
        from_tensors(format, q.shape, {})


@every_format
def test_rows_are_those_of_the_whole(format: Format) -> None:
    q = format.quantize(weights(300, 70))
    index = torch.tensor([[299, 0], [128, 127], [0, 256]])
    assert torch.equal(q.rows(index), q.dequantize()[index])
    assert q.rows(torch.empty(0, dtype=torch.long)).shape == (0, 70)
    with pytest.raises(ValueError, match="gathered"):
        format.quantize(weights(2, 3, 4)).rows(index)


@every_format
def test_leading_dimensions_are_separate_matrices(format: Format) -> None:
    w = weights(2, 3, 5, 70)
    w[1, 2] *= 100
    q = format.quantize(w)
    stack = QTensor.empty(format, (3, 5, 70), w.device)
    for j in range(3):
        one = format.quantize(w[1, j])
        assert torch.equal(q[1, j].dequantize(), one.dequantize())
        stack.copy_(j, one)
    assert torch.equal(stack.dequantize(), q[1].dequantize())
    assert q[1].shape == (3, 5, 70)
    assert q[1:].shape == (1, 3, 5, 70)
    assert q[1].codes.data_ptr() == q.codes[1].data_ptr()
    assert q.to("cpu").codes.data_ptr() == q.codes.data_ptr()
    with pytest.raises(IndexError, match="leading"):
        q[0, 0][0]
    with pytest.raises(ValueError, match="cannot write"):
        stack.copy_(0, format.quantize(weights(5, 71)))


@every_format
def test_large_matrices_are_cut_without_a_trace(format: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    w = weights(300, 96)
    whole = format.quantize(w)
    monkeypatch.setattr("qrun.formats.base._CHUNK_CPU", 1000)
    monkeypatch.setattr("qrun.formats.base._CHUNK", 1000)
    cut = format.quantize(w)
    # Sums may round in another order, so that of two scales as good the other wins; nothing more may differ.
    assert relative_error(w, cut) == pytest.approx(relative_error(w, whole), rel=1e-4)
    assert (cut.dequantize() == whole.dequantize()).float().mean() > 0.99
    again = format.quantize(w)
    for name, tensor in cut.tensors().items():
        assert torch.equal(tensor.view(torch.uint8), again.tensors()[name].view(torch.uint8)), name


@every_format
def test_quantizing_again_changes_nothing(format: Format) -> None:
    # Every group holds its smallest and largest value: nothing is lost, so nothing may move.
    w = torch.linspace(-1, 1, 256).repeat(130, 2)
    once = format.quantize(format.quantize(w).dequantize())
    twice = format.quantize(once.dequantize())
    assert relative_error(once.dequantize(), twice) < 1e-3


@every_format
@pytest.mark.parametrize("shape", [(1, 16), (1, 32), (1, 64), (128, 128), (3, 70)], ids=str)
def test_the_weight_itself_is_left_alone(format: Format, shape: tuple[int, ...]) -> None:
    w = weights(*shape)
    q = format.quantize(w)
    assert torch.equal(w, weights(*shape))
    w.zero_()
    assert q.dequantize().any()


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_zeros_stay_zero(format: Format, dtype: torch.dtype) -> None:
    w = torch.zeros(3, 70, dtype=dtype)
    assert torch.equal(format.quantize(w).dequantize(), torch.zeros(3, 70))
    w[1] = weights(70).to(dtype)
    values = format.quantize(w).dequantize()
    assert torch.equal(values[0], torch.zeros(70))
    assert torch.equal(values[2], torch.zeros(70))
    assert values[1].any()


@every_format
@pytest.mark.parametrize("size", [3e38, 1e25, 1e-12, 1e-30, 1e-38, 1e-42, 1.5e-45])
def test_any_finite_size_decodes_finite(format: Format, size: float) -> None:
    w = weights(4, 96).clamp_(-1, 1).mul_(size)
    values = format.quantize(w).dequantize()
    assert torch.isfinite(values).all()
    assert float((values - w).abs().max()) <= 1.01 * size


@every_format
def test_an_outlier_spoils_only_its_group(format: Format) -> None:
    w = weights(3, 256)
    plain = format.quantize(w).dequantize()
    w[1, 5] = 3000.0
    values = format.quantize(w).dequantize()
    assert values[1, 5] == pytest.approx(3000, rel=0.26)  # MXFP4 may clip by a quarter
    if str(format) not in ("fp8 128x128", "nvfp4 g16"):  # their scales reach over rows
        assert torch.equal(values[[0, 2]], plain[[0, 2]])
        if "channel" not in str(format) and not str(format).startswith("trellis"):  # a row's, in part or whole
            assert torch.equal(values[1, 128:], plain[1, 128:])


@every_format
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_are_refused(format: Format, bad: float) -> None:
    w = weights(2, 130, 40)
    w[1, 129, 7] = bad
    with pytest.raises(ValueError, match="non-finite"):
        format.quantize(w)


@every_format
def test_what_is_no_weight_is_refused(format: Format) -> None:
    with pytest.raises(TypeError, match="int64"):
        format.quantize(torch.ones(2, 2, dtype=torch.int64))
    for shape in ((5,), (0, 4), (4, 0), (0, 2, 2)):
        with pytest.raises(ValueError, match="shape"):
            format.quantize(torch.ones(shape))


@every_format
def test_unusual_memory_is_read_rightly(format: Format) -> None:
    w = weights(70, 40).t()
    assert torch.equal(format.quantize(w).dequantize(), format.quantize(w.contiguous()).dequantize())
    parameter = torch.nn.Parameter(weights(4, 70))
    assert not format.quantize(parameter).dequantize().requires_grad
    small = weights(4, 70).to(torch.float8_e4m3fn)
    assert torch.equal(format.quantize(small).dequantize(), format.quantize(small.bfloat16()).dequantize())


def test_what_bf16_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="bf16"):
        PlainFormat().quantize(torch.full((1, 1), 3.4e38))


def test_threads_are_left_as_they_were() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    AffineFormat().quantize(weights(2, 64))
    with pytest.raises(ValueError, match="non-finite"):
        AffineFormat().quantize(torch.full((2, 2), torch.nan))
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert torch.get_num_threads() == before
    assert seen == [before]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_format
def test_cuda_agrees_with_the_cpu(format: Format) -> None:
    w = weights(2, 130, 257)
    there = format.quantize(w.cuda())
    assert all(tensor.is_cuda for tensor in there.tensors().values())
    assert relative_error(w, there) == pytest.approx(relative_error(w, format.quantize(w)), rel=1e-3)
    assert torch.equal(there.dequantize().cpu(), there.to("cpu").dequantize())
    index = torch.tensor([129, 0, 128], device="cuda")
    assert torch.equal(there[1].rows(index), there[1].dequantize()[index])
