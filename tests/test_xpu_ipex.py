"""IPEX's kernels: when they are used, and that they are given what they expect, in the buffers of the others."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from ipex_doubles import Engine, Ipex, installed, pretend
from torch import Tensor
from xpu_doubles import card

from qrun.backends import xpu_ipex
from qrun.backends.xpu_device import XPUCard
from qrun.backends.xpu_matrix import Placed, expand, place
from qrun.backends.xpu_tiers import LinearKernel
from qrun.formats import AffineFormat
from qrun.kernels import reference

SYMMETRIC, ZEROS = xpu_ipex.LINEARS
SOME = "2.8.10+xpu"


def real(half: torch.dtype = torch.bfloat16) -> XPUCard:
    return replace(card(half), real=True)


@pytest.fixture(autouse=True)
def looked_for_anew() -> Iterator[None]:
    xpu_ipex._loaded.cache_clear()
    yield
    xpu_ipex._loaded.cache_clear()


def weight(
    n: int = 64, k: int = 256, *, group: int = 64, symmetric: bool = False, half: torch.dtype = torch.bfloat16
) -> Placed:
    random = torch.Generator().manual_seed(n + k + group)
    values = torch.randn(n, k, generator=random) / 16
    return place(AffineFormat(bits=4, group=group, symmetric=symmetric).quantize(values), half)


def takers(placed: Placed, device: XPUCard, activations: str = "16") -> list[LinearKernel]:
    return [kernel for kernel in xpu_ipex.LINEARS if kernel.takes(placed, device, activations)]


def error(kernel: LinearKernel, placed: Placed, device: XPUCard) -> float:
    """The largest relative one for one, a few and many tokens."""
    wanted = expand(placed, 0, placed.n, torch.float32)
    call = kernel.bind(placed, device, "16")
    random = torch.Generator().manual_seed(1)
    found: list[float] = []
    for tokens in (1, 8, 40):
        x = torch.randn(tokens, placed.k, generator=random).to(device.half)
        y = x.float() @ wanted.t()
        assert call(x).shape == y.shape
        found.append(float((call(x).float() - y).norm() / y.norm()))
    return max(found)


def test_it_need_not_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(xpu_ipex, "version", absent)
    assert xpu_ipex.why_not(real()) == "intel-extension-for-pytorch is not installed"
    assert not xpu_ipex.available(real())
    assert takers(weight(), real()) == []


@pytest.mark.parametrize("release", ["2.7.10+xpu", "2.8.0", "3"])
def test_one_for_another_torch_is_not_even_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, release: str
) -> None:
    mark = tmp_path / "imported"
    (tmp_path / "intel_extension_for_pytorch.py").write_text(f"open({str(mark)!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch, "__version__", "2.13.0+xpu")
    pretend(monkeypatch, release)
    named = ".".join(release.split(".")[:2])
    assert xpu_ipex.why_not(real()).endswith(f"{release} needs torch {named}, this is torch 2.13.0+xpu")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("raise ImportError('libsycl.so.8: cannot open\\nthere is more')", "ImportError: libsycl.so.8: cannot open"),
        ("raise OSError", "OSError"),
        ("import os; print('ERROR! wrong torch'); os.exit(127)", "AttributeError: module 'os' has no attribute 'exit'"),
        ("import sys; sys.exit(127)", "SystemExit: 127"),
        ("raise RuntimeError('x' * 9999)", "RuntimeError: " + "x" * 160),
        ("", "AttributeError: module 'intel_extension_for_pytorch' has no attribute '_C'"),
    ],
)
def test_whatever_its_import_does_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], does: str, said: str
) -> None:
    (tmp_path / "intel_extension_for_pytorch.py").write_text(does)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "intel_extension_for_pytorch", raising=False)
    monkeypatch.setattr(torch, "__version__", "2.8.0+xpu")
    pretend(monkeypatch, SOME)
    try:
        assert xpu_ipex.why_not(real()) == f"intel-extension-for-pytorch {SOME} cannot be imported: {said}"
        assert takers(weight(), real()) == []
    finally:
        sys.modules.pop("intel_extension_for_pytorch", None)
    assert capsys.readouterr().out == ""


def test_a_cpu_build_is_not_taken_for_one_for_gpus() -> None:
    with installed(xpu=False):
        assert "is the CPU build" in xpu_ipex.why_not(real())
        assert takers(weight(), real()) == []
        assert xpu_ipex.why_not(card()) == ""


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("xpu", [False, True], ids=["cpu", "xpu"])
def test_products_are_right(half: torch.dtype, group: int, symmetric: bool, xpu: bool) -> None:
    placed = weight(group=group, symmetric=symmetric, half=half)
    device = real(half) if xpu else card(half)
    with installed(xpu=xpu):
        taking = takers(placed, device)
        assert taking == ([SYMMETRIC, ZEROS] if symmetric else [ZEROS])
        for kernel in taking:
            assert error(kernel, placed, device) < 4e-3


@pytest.mark.parametrize("kernel", [SYMMETRIC, ZEROS], ids=["symmetric", "zeros"])
def test_the_codes_are_those_that_are_there(kernel: LinearKernel) -> None:
    placed = weight(symmetric=kernel is SYMMETRIC)
    with installed(xpu=True) as ipex:
        assert kernel in takers(placed, real())
        kernel.bind(placed, real(), "16")(torch.ones(1, placed.k, dtype=torch.bfloat16))
    assert [codes.data_ptr() for codes in ipex.layers] == [placed.codes.data_ptr()]


@pytest.mark.parametrize("xpu", [False, True], ids=["cpu", "xpu"])
@pytest.mark.parametrize("kernel", [SYMMETRIC, ZEROS], ids=["symmetric", "zeros"])
def test_a_weight_stays_as_it_is(kernel: LinearKernel, xpu: bool) -> None:
    placed = weight(symmetric=kernel is SYMMETRIC)
    before = expand(placed, 0, placed.n, torch.float32)
    with installed(xpu=xpu):
        assert kernel in takers(placed, replace(card(), real=xpu))
        kernel.bind(placed, replace(card(), real=xpu), "16")
    assert placed.scale is not None and placed.scale.shape == (4, 64)
    torch.testing.assert_close(expand(placed, 0, placed.n, torch.float32), before, rtol=0, atol=0)


def test_the_engine_that_expands_no_weight_is_chosen() -> None:
    with installed(xpu=True) as ipex:
        assert ipex.engine is Engine.RECOMMEND
        assert xpu_ipex.available(real())
        assert ipex.engine is Engine.ONEDNN


def test_a_factor_is_applied() -> None:
    placed = replace(weight(half=torch.float16), factor=torch.tensor(0.0625))
    with installed(xpu=True):
        assert takers(placed, real(torch.float16)) == [ZEROS]
        assert error(ZEROS, placed, real(torch.float16)) < 4e-3


def zero_of_16(placed: Placed) -> Placed:
    assert placed.zero is not None
    return replace(placed, zero=torch.full_like(placed.zero, 16))


@pytest.mark.parametrize(
    ("placed", "activations"),
    [
        pytest.param(weight(n=72), "16", id="rows"),
        pytest.param(weight(k=224), "16", id="padding"),
        pytest.param(weight(group=16), "16", id="small groups"),
        pytest.param(weight(group=0, symmetric=True), "16", id="channel"),
        pytest.param(weight(half=torch.float16), "16", id="scale of another dtype"),
        pytest.param(zero_of_16(weight()), "16", id="zero of five bits"),
        pytest.param(replace(weight(), offset=torch.ones(4, 64, dtype=torch.bfloat16)), "16", id="minima"),
        pytest.param(weight(), "int8", id="int8 activations"),
        pytest.param(weight(), "fp8", id="fp8 activations"),
        pytest.param(
            place(AffineFormat(bits=8, group=64).quantize(torch.randn(64, 256)), torch.bfloat16), "16", id="8"
        ),
    ],
)
def test_what_it_does_not_take(placed: Placed, activations: str) -> None:
    with installed(xpu=True):
        assert takers(weight(), real()) == [ZEROS]
        assert takers(placed, real(), activations) == []


def test_rows_that_its_cpu_build_gets_wrong_are_wrong_here() -> None:
    """Why some numbers of rows are not taken; tools/ipex_check shows it of IPEX itself."""
    with installed(xpu=False):
        assert error(SYMMETRIC, weight(n=72, symmetric=True), card()) > 0.1


def test_rms_norm() -> None:
    random = torch.Generator().manual_seed(0)
    x: Tensor = torch.randn(3, 64, generator=random)
    scale = torch.rand(64, generator=random)
    with installed(xpu=False) as ipex:
        assert isinstance(ipex, Ipex)
        y = xpu_ipex.rms_norm(x, scale, 1e-5, torch.bfloat16)
    torch.testing.assert_close(y, reference.rms_norm(x, scale, 1e-5).bfloat16(), rtol=0, atol=0)
