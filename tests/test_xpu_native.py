"""Products by aten's kernels for Intel GPUs and by plain torch, a CPU with the same operations standing in for one."""

from collections.abc import Callable, Iterator
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from xpu_aten import aten_of_xpu
from xpu_doubles import card
from xpu_weights import FORMATS, READ, name, weight

from qrun.backends import xpu_native
from qrun.backends.xpu_matrix import Placed, place
from qrun.backends.xpu_native import LINEARS as NATIVE
from qrun.backends.xpu_plain import LINEARS as PLAIN
from qrun.backends.xpu_tiers import LinearKernel
from qrun.formats import NF4, AffineFormat, CodebookFormat, Format, Fp8Format, PlainFormat
from qrun.formats.superblock import SuperBlockFormat
from qrun.kernels import reference

HALVES = (torch.bfloat16, torch.float16)
ACTIVATIONS = ("16", "int8", "fp8")
TOKENS = (1, 8, 40)
BY_NAME = {kernel.name: kernel for kernel in NATIVE}


@pytest.fixture(autouse=True)
def aten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The operators that only Intel GPUs have, in the newest torch."""
    torch.manual_seed(0)
    monkeypatch.setattr(xpu_native, "_TORCH", (2, 13))
    with aten_of_xpu():
        yield


def able(placed: Placed, half: torch.dtype, activations: str) -> list[LinearKernel]:
    return [kernel for kernel in (*NATIVE, *PLAIN) if kernel.takes(placed, card(half), activations)]


def seen(x: Tensor, kernel: LinearKernel, placed: Placed, activations: str) -> Tensor:
    """x as the kernel's activations are rounded, in float32."""
    if kernel.name == "aten fp8":
        codes, scale = reference.quantize_fp8_rows(x, placed.group)
        return codes.float() * scale.repeat_interleave(placed.group, 1)[:, : x.shape[1]]
    if x.shape[0] <= xpu_native.FEW:
        return x.float()
    rounded = reference.round_activations(x.float() if kernel.name == "aten int8 W8A8" else x, activations)
    return rounded.float()


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("form", (*FORMATS, *READ), ids=name)
def test_products_are_those_of_the_weight(form: Format, half: torch.dtype) -> None:
    """Scales, results and what is expanded are rounded, each by at most half a step and so a third of one in the mean;
    and where a minimum is near to what is added to it, by as much of that."""
    n, k = 48 if isinstance(form, Fp8Format) else 33, 512 if isinstance(form, SuperBlockFormat) else 200
    made = weight(form, n, k)
    placed, wide = place(made, half), made.dequantize()
    for activations in ACTIVATIONS:
        for kernel in able(placed, half, activations):
            call = kernel.bind(placed, card(half), activations)
            for tokens in TOKENS:
                x = torch.randn(tokens, k).to(half)
                y = call(x)
                assert y.shape == (tokens, n)
                assert y.dtype in (half, torch.float32)
                wanted = seen(x, kernel, placed, activations) @ wide.t()
                assert error(y, wanted) < torch.finfo(half).eps * 0.8, (kernel.name, activations, tokens)


@pytest.mark.parametrize(
    ("form", "activations", "names"),
    [
        (AffineFormat(4, 64), "16", {"aten int4"}),
        (AffineFormat(4, 0, True), "int8", {"aten int4"}),
        (AffineFormat(2, 32, True), "16", {"aten int4"}),
        (SuperBlockFormat(4, 32, 6, True), "16", {"aten int4"}),
        (AffineFormat(4, 16, True), "16", set()),
        (AffineFormat(8, 0, True), "16", {"aten int8"}),
        (AffineFormat(8, 0, True), "int8", {"aten int8 W8A8", "aten int8"}),
        (AffineFormat(8, 64, True), "16", set()),
        (Fp8Format(), "fp8", {"aten fp8"}),
        (Fp8Format(1, 0), "fp8", {"aten fp8"}),
        (Fp8Format(16, 32), "fp8", set()),
        (Fp8Format(), "16", set()),
        (PlainFormat(), "16", {"aten matmul"}),
        (CodebookFormat("nf4", NF4, 64), "16", set()),
    ],
    ids=lambda value: name(value) if isinstance(value, Format) else str(value),
)
def test_what_each_kernel_takes(form: Format, activations: str, names: set[str]) -> None:
    placed = place(weight(form, 48, 256), torch.bfloat16)
    kernels = able(placed, torch.bfloat16, activations)
    assert {kernel.name for kernel in kernels if kernel.tier == "native"} == names
    (last,) = (kernel for kernel in kernels if kernel.tier == "torch")
    assert last.fallback == (placed.kind != "plain")


def test_fp8_is_of_torch_2_13_and_of_whole_sixteens(monkeypatch: pytest.MonkeyPatch) -> None:
    def names(n: int) -> list[str]:
        return [
            kernel.name for kernel in able(place(weight(Fp8Format(), n, 256), torch.bfloat16), torch.bfloat16, "fp8")
        ]

    assert names(48)[0] == "aten fp8"
    assert names(40) == ["torch expand + matmul"]
    monkeypatch.setattr(xpu_native, "_TORCH", (2, 12))
    assert names(48) == ["torch expand + matmul"]


def test_w8a8_multiplies_integers_from_17_tokens_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below, weights are what products wait for, and activations stay as they are."""
    calls: list[int] = []
    quantize = reference.quantize_int8_rows
    monkeypatch.setattr(reference, "quantize_int8_rows", lambda x: calls.append(len(x)) or quantize(x))
    call = BY_NAME["aten int8 W8A8"].bind(place(weight(AffineFormat(8, 0, True), 48, 200), HALVES[0]), card(), "int8")
    for tokens in (1, 16, 17, 40):
        call(torch.randn(tokens, 200).to(HALVES[0]))
    assert calls == [17, 40]


def test_w8a8_with_what_is_left_of_zeros_and_a_factor() -> None:
    """An unsigned byte a weight, a scale and a zero a row: offsets; and the sums of rounded activations times them."""
    placed = place(weight(AffineFormat(8, 4096, scale_dtype=torch.float32), 48, 200), HALVES[0])
    assert placed.offset is not None
    placed = replace(placed, factor=torch.tensor(0.25))
    wide = 0.25 * weightless(placed)
    for kernel in (BY_NAME["aten int8 W8A8"], BY_NAME["aten int8"]):
        for tokens in TOKENS:
            x = torch.randn(tokens, 200).to(HALVES[0]) + 1
            y = kernel.bind(placed, card(), "int8")(x)
            assert error(y, seen(x, kernel, placed, "int8") @ wide.t()) < torch.finfo(HALVES[0]).eps * 0.6


def weightless(placed: Placed) -> Tensor:
    """An int8 weight with offsets, but for its factor."""
    assert placed.scale is not None and placed.offset is not None
    return (placed.codes.float() * placed.scale.t() + placed.offset.float().t())[:, : placed.k]


@pytest.mark.parametrize("group", (0, 32))
def test_float16_products_of_scales_out_of_its_range(group: int) -> None:
    """Scales of rows are applied to what the operation gives, those of groups lack a power of two."""
    made = AffineFormat(4, group, True).quantize(torch.randn(16, 256) * 2.0**-30)
    placed = place(made, torch.float16)
    x = torch.randn(8, 256).half()
    y = BY_NAME["aten int4"].bind(placed, card(torch.float16), "16")(x)
    assert error(y, x.float() @ made.dequantize().t()) < torch.finfo(torch.float16).eps


def broken(of: str, change: Callable[[Tensor], Tensor], form: Format) -> Placed:
    placed = place(weight(form, 16, 256), torch.bfloat16)
    return replace(placed, **{of: change(getattr(placed, of))})


@pytest.mark.parametrize(
    ("kernel", "of", "change", "form"),
    [
        ("aten int4", "scale", lambda t: t[:2], AffineFormat(4, 64)),
        ("aten int4", "scale", lambda t: t.float(), AffineFormat(4, 64)),
        ("aten int4", "scale", lambda t: t.t().contiguous().t(), AffineFormat(4, 64)),
        ("aten int4", "zero", lambda t: t[:, :8], AffineFormat(4, 64)),
        ("aten int4", "zero", lambda t: t.to(torch.uint8), AffineFormat(4, 64)),
        ("aten int4", "codes", lambda t: t[:, :16], AffineFormat(4, 64)),
        ("aten int8", "scale", lambda t: t.bfloat16(), AffineFormat(8, 0, True)),
        ("aten int8", "codes", lambda t: t[:8], AffineFormat(8, 0, True)),
        ("aten fp8", "scale", lambda t: t[:1], Fp8Format()),
        ("aten matmul", "codes", lambda t: t.float(), PlainFormat()),
    ],
)
def test_arguments_that_memory_is_read_by_are_checked(
    kernel: str, of: str, change: Callable[[Tensor], Tensor], form: Format
) -> None:
    with pytest.raises(ValueError, match=f"the {of} of a placed weight must be|hold no weight"):
        BY_NAME[kernel].bind(broken(of, change, form), card(), "16")


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(
    ("form", "activations"),
    [
        (AffineFormat(4, 64), "16"),
        (AffineFormat(4, 0, True), "16"),
        (AffineFormat(4, 32, scale_dtype=torch.float16, zero_dtype=torch.float16, minimum=True), "16"),
        (AffineFormat(8, 0, True), "16"),
        (AffineFormat(8, 0, True), "int8"),
        (Fp8Format(), "fp8"),
        (Fp8Format(1, 0), "fp8"),
        (PlainFormat(), "16"),
    ],
    ids=lambda value: name(value) if isinstance(value, Format) else str(value),
)
def test_shapes_on_the_device_itself(
    form: Format, activations: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of Intel GPUs without their contents: the operations' own checks there, as far as they are in Python."""
    monkeypatch.setattr(reference, "quantize_fp8_rows", fp8_rows)
    placed = place(weight(form, 48, 256), torch.bfloat16)
    native = [kernel for kernel in able(placed, torch.bfloat16, activations) if kernel.tier == "native"]
    assert native
    with FakeTensorMode(allow_non_fake_inputs=False):
        on = {field.name: moved(getattr(placed, field.name)) for field in fields(placed)}
        x = torch.empty(tokens, 256, dtype=torch.bfloat16, device="xpu")
        for kernel in native:
            y = kernel.bind(Placed(**on), card(), activations)(x)
            assert (tuple(y.shape), y.device.type) == ((tokens, 48), "xpu")
            assert y.dtype in (torch.bfloat16, torch.float32)


def fp8_rows(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of the reference's, which slices: torch has that only where it was built for the device."""
    rows, k = x.shape
    return x.to(torch.float8_e4m3fn), x.new_empty(rows, -(-k // group), dtype=torch.float32)


def moved(value: object) -> object:
    """A tensor of that shape on an Intel GPU; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="xpu")
