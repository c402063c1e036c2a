"""Finding the GPU: every reason why there is none to be used, in the words of torch, the driver and triton."""

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_doubles import card

pytest.importorskip("triton")

from qrun import backends
from qrun.backends import cuda_device
from qrun.backends.cpu import CPUBackend
from qrun.backends.cuda import CUDABackend
from qrun.backends.cuda_device import find_card, is_there, summary
from qrun.cli.info_cmd import describe_machine
from qrun.errors import BackendError

BUSY = (
    "CUDA error: CUDA-capable device(s) is/are busy or unavailable\n"
    "CUDA kernel errors might be asynchronously reported at some other API call"
)
OLD_DRIVER = (
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). Please update your GPU "
    "driver by downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx "
    "(Triggered internally at /pytorch/c10/cuda/CUDAFunctions.cpp:119.)"
)
NO_MATCH = (
    "CUDA initialization: Unexpected error from cudaGetDeviceCount(). Error 804: forward compatibility was attempted "
    "on non supported HW (Triggered internally at /pytorch/c10/cuda/CUDAFunctions.cpp:119.)"
)


@dataclass
class Driver:
    """What torch.cuda answers, as a machine with one H200 would; each test breaks one thing."""

    available: bool = True
    warns: list[str] = field(default_factory=list[str])
    capability: tuple[int, int] = (9, 0)
    free: int = 138_000_000_000
    allocation: Exception | None = None
    answers: Exception | None = None

    def is_available(self) -> bool:
        for text in self.warns:
            warnings.warn(text, UserWarning, stacklevel=2)
        return self.available

    def properties(self, device: object) -> Any:
        return SimpleNamespace(
            name="NVIDIA H200", major=self.capability[0], minor=self.capability[1], multi_processor_count=132,
            total_memory=141_000_000_000,
        )  # fmt: skip

    def mem_get_info(self, device: object = None) -> tuple[int, int]:
        if self.answers is not None:
            raise self.answers
        return self.free, 141_000_000_000

    def zeros(self, size: int, *, device: object) -> None:
        assert torch.device(str(device)).type == "cuda" and size == 1
        if self.allocation is not None:
            raise self.allocation


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Driver:
    made = Driver()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", made.is_available)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", made.properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", made.mem_get_info)
    monkeypatch.setattr(torch, "zeros", made.zeros)
    return made


def refusal() -> str:
    with pytest.raises(BackendError) as caught:
        find_card()
    text = str(caught.value)
    assert "\n" not in text and text.endswith("use --device cpu")
    return text


def test_the_card(driver: Driver) -> None:
    found = find_card()
    assert (found.name, found.capability, found.processors) == ("NVIDIA H200", (9, 0), 132)
    assert found.device == torch.device("cuda", 0) and found.half == torch.bfloat16 and found.captures
    assert found.description == "NVIDIA H200, 141 GB, sm_90"


def test_torch_without_cuda(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA: install the CUDA build" in refusal()


@pytest.mark.parametrize(
    ("warns", "says"),
    [
        ([], "its driver is missing"),
        ([OLD_DRIVER], "the NVIDIA driver is too old: it knows CUDA up to 11.4, torch"),
        ([NO_MATCH], "Error 804: forward compatibility was attempted on non supported HW): see nvidia-smi"),
    ],
)
def test_no_driver_or_a_wrong_one(driver: Driver, warns: list[str], says: str) -> None:
    """torch's own warning is read, and goes no further: here it would be an error."""
    driver.available, driver.warns = False, warns
    assert says in refusal()


@pytest.mark.parametrize("value", ["", "-1", "7"])
def test_hidden_by_the_environment(driver: Driver, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    driver.available = False
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert f"CUDA_VISIBLE_DEVICES={value!r} leaves no GPU" in refusal()


def test_an_old_card_is_refused_by_name_before_it_is_touched(driver: Driver) -> None:
    driver.capability, driver.allocation = (7, 5), AssertionError("not to be allocated on")
    driver.warns = ["NVIDIA H200 which is of compute capability 7.5 is not compatible with this torch"]
    assert "NVIDIA H200 is sm_75; qrun's kernels need sm_80" in refusal()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.AcceleratorError(BUSY), "NVIDIA H200 is taken by another program (exclusive mode)"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), "no room for qrun, 1 MB are free of 141 GB"),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel"), "no room for qrun, 1 MB are free of 141 GB"),
        (torch.AcceleratorError("CUDA error: no kernel image is available\nCompile"), "has no kernels for NVIDIA H200"),
        (torch.AcceleratorError("CUDA error: uncorrectable ECC\nmore"), "now (CUDA error: uncorrectable ECC)"),
    ],
)  # fmt: skip
def test_a_first_allocation_that_fails(driver: Driver, error: Exception, says: str) -> None:
    driver.allocation, driver.free = error, 1_000_000
    assert says in refusal()


def test_no_room_and_no_answer(driver: Driver) -> None:
    driver.allocation = driver.answers = torch.AcceleratorError("CUDA error: out of memory")
    assert "no room for qrun, nothing is free; other programs hold the rest" in refusal()


def test_torch_cannot_begin(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> int:
        raise RuntimeError("Unexpected error\nand more")

    monkeypatch.setattr(torch.cuda, "current_device", fails)
    assert "the NVIDIA GPU cannot be used now (Unexpected error)" in refusal()


def test_triton_is_missing(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_device, "find_spec", lambda name: None)
    assert "needs triton, which is not installed: pip install 'triton>=3.6'" in refusal()


@pytest.mark.parametrize(
    ("version", "old"), [("2.3.1", True), ("3.5.0", True), ("3.6.0", False), ("3.10.0+git", False)]
)
def test_triton_is_old(driver: Driver, monkeypatch: pytest.MonkeyPatch, version: str, old: bool) -> None:
    monkeypatch.setattr(cuda_device, "version", lambda name: version)
    if old:
        assert f"triton {version} is too old, qrun's kernels need 3.6" in refusal()
    else:
        assert find_card().name == "NVIDIA H200"


def test_triton_does_not_come_up(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_device, "find_spec", lambda name: object())
    monkeypatch.delitem(sys.modules, "qrun.kernels.gpu_bits")
    monkeypatch.setitem(sys.modules, "triton", None)  # as Python marks what cannot be imported
    assert "triton is installed but cannot be imported" in refusal()


def test_triton_finds_no_compiler(driver: Driver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "none"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "finds no C compiler: install gcc" in refusal()
    (tmp_path / "none").mkdir()  # it has compiled before, and need not again
    assert find_card().name == "NVIDIA H200"


def test_triton_finds_no_headers(driver: Driver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(cuda_device.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    assert "finds no Python.h" in refusal()
    (tmp_path / "Python.h").touch()
    assert find_card().name == "NVIDIA H200"


def test_whether_one_is_there(driver: Driver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver.available, driver.warns = False, [OLD_DRIVER]
    assert not is_there(tmp_path)
    (tmp_path / "nvidiactl").touch()
    assert not is_there(tmp_path)
    (tmp_path / "nvidia0").touch()
    assert is_there(tmp_path)
    driver.available = True
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not is_there(tmp_path), "hidden on purpose"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert is_there(tmp_path / "nothing"), "torch sees it, wherever it stands"


def picked(device: str) -> tuple[Any, list[str]]:
    said: list[str] = []
    return backends.pick(device, threads=2, progress=said.append), said


def fails_with(error: BackendError) -> Callable[[], Any]:
    def find() -> Any:
        raise error

    return find


def test_pick_takes_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_device, "find_card", card)
    for device, kind in (("auto", CUDABackend), ("cuda", CUDABackend), ("cpu", CPUBackend)):
        backend, said = picked(device)
        assert type(backend) is kind and not said


@pytest.mark.parametrize("there", [True, False])
def test_auto_says_why_a_gpu_is_not_used(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    error = BackendError("NVIDIA X is sm_75")
    monkeypatch.setattr(cuda_device, "find_card", fails_with(error))
    monkeypatch.setattr(cuda_device, "is_there", lambda: there)
    backend, said = picked("auto")
    assert type(backend) is CPUBackend
    assert said == (["the NVIDIA GPU cannot be used: NVIDIA X is sm_75"] if there else [])
    with pytest.raises(BackendError) as caught:
        picked("cuda")
    assert caught.value is error


@pytest.mark.parametrize(
    "text",
    [
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\nGCC version: 12",
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Feb  1 2025\n",
    ],
)  # fmt: skip
def test_summary(driver: Driver, tmp_path: Path, text: str) -> None:
    (tmp_path / "version").write_text(text)
    line = summary(tmp_path / "version")
    assert line.startswith("NVIDIA H200, 138.0 GB free of 141 GB, sm_90, CUDA 12.8, driver 570.86.15, triton 3.")
    assert "driver" not in summary(tmp_path / "none")


def test_info_lists_it(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe_machine()["gpu"].startswith("NVIDIA H200, 138.0 GB free")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert describe_machine()["gpu"].startswith("none used: torch ")
