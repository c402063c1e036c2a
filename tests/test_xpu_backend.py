"""What the XPU backend binds, and how it is chosen, from the outside."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from xpu_aten import aten_of_xpu
from xpu_doubles import card, without_triton

import qrun
import qrun.api
from qrun import backends
from qrun.backends import cuda_device, graphs, xpu, xpu_device
from qrun.backends.cpu import CPUBackend
from qrun.backends.xpu import XPUBackend
from qrun.doctor_kernels import kernels
from qrun.errors import BackendError


@pytest.fixture(autouse=True)
def aten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    without_triton(monkeypatch)
    with aten_of_xpu():
        yield


def fails_with(text: str) -> Any:
    def find() -> Any:
        raise BackendError(text)

    return find


def test_pick_takes_the_intel_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xpu_device, "find_xpu", card)
    monkeypatch.setattr(cuda_device, "find_card", fails_with("no NVIDIA GPU"))
    monkeypatch.setattr(cuda_device, "is_there", lambda: False)
    said: list[str] = []
    for device in ("auto", "xpu"):
        assert type(backends.pick(device, progress=said.append)) is XPUBackend
    assert type(backends.pick("cpu", threads=2)) is CPUBackend
    assert not any("cannot be used" in line for line in said)


def test_auto_falls_back_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_device, "find_card", fails_with("no NVIDIA GPU"))
    monkeypatch.setattr(cuda_device, "is_there", lambda: False)
    monkeypatch.setattr(xpu_device, "find_xpu", fails_with("the driver is too old"))
    monkeypatch.setattr(xpu_device, "is_there", lambda: True)
    said: list[str] = []
    assert type(backends.pick("auto", threads=2, progress=said.append)) is CPUBackend
    assert said == ["the Intel GPU cannot be used: the driver is too old"]
    with pytest.raises(BackendError, match="the driver is too old"):
        backends.pick("xpu")


def test_an_unknown_tier_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xpu_device, "find_xpu", card)
    with pytest.raises(BackendError, match="unknown tier 'fast': use one of native, ipex, triton, torch"):
        backends.pick("xpu", xpu_tier="fast")


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_doctor_finds_every_kernel_right(half: torch.dtype) -> None:
    """22 products, 6 caches, feed-forward blocks and experts, by the checks that a user runs."""
    backend = XPUBackend(card(half))
    wrong = [check for check in kernels(backend, lambda what, done, total: None) if check.status == "failure"]
    assert not wrong, [f"{check.name}: {check.detail}" for check in wrong]
    assert backend.trials and all(trial.passed or trial.reason for trial in backend.trials)


def test_attention_is_on_the_run_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qrun.api, "pick", lambda *names, **options: XPUBackend(card()))
    engine = qrun.load(None, "wint4", "int8", context=64, cache=False)
    ops = {binding.op for binding in engine.card.bindings}
    assert {"qkv", "o", "experts gate_up", "experts down", "lm_head", "embedding"} <= ops
    assert any("attention" in op for op in ops), ops


def test_a_graph_is_recorded_only_if_all_of_the_step_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Recorded:
        def __init__(self, step: Any, cache: Any, device: torch.device) -> None:
            made.append(device)

    monkeypatch.setattr(xpu, "GraphStep", Recorded)
    for graph in (True, False):
        backend = XPUBackend(card(), graph=graph)
        monkeypatch.setattr(qrun.api, "pick", lambda *names, backend=backend, **options: backend)
        engine = qrun.load(None, "wint4", "int8", context=64, cache=False)
        assert not made
        assert any("--xpu-graph has no effect" in note for note in engine.card.notes) == graph
    monkeypatch.setattr(xpu.Attention, "recordable", lambda self, layer: True)
    backend = XPUBackend(card(), graph=True)
    monkeypatch.setattr(qrun.api, "pick", lambda *names, **options: backend)
    qrun.load(None, "wint4", "int8", context=64, cache=False)
    assert made == [torch.device("cpu")]
    monkeypatch.delattr(torch.xpu, "XPUGraph")
    (note,) = qrun.load(None, "wint4", "int8", context=64, cache=False).card.notes
    assert note == f"--xpu-graph has no effect: torch {torch.__version__} records no graphs on Intel GPUs"


def test_graphs_of_both_makers_have_the_names_that_are_used() -> None:
    for module, graph in ((torch.cuda, "CUDAGraph"), (torch.xpu, "XPUGraph")):
        for name in ("Stream", "current_stream", "stream", "graph", graph):
            assert getattr(module, name), (module, name)
        for name in ("replay", "pool"):
            assert getattr(getattr(module, graph), name)
    assert graphs.FIRST_LIMIT > 0
