"""`qrun doctor`: every check on machines, environments and backends that are made for it, sound and broken ones."""

import json
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qrun import backends, doctor, doctor_devices, doctor_kernels, doctor_machine, doctor_model
from qrun.backends import Found
from qrun.backends.base import Backend, Linear, Trial
from qrun.backends.cpu import CPUBackend
from qrun.cli.doctor_cmd import line, markdown
from qrun.cli.main import main
from qrun.doctor_check import Check, Run, failed, public, summary
from qrun.doctor_environment import environment
from qrun.doctor_tiers import tiers
from qrun.doctor_versions import Package, installed, versions
from qrun.errors import BackendError

BENT = Check(section="kernels", name="W4", status="failure", detail="wrong", fix="mend it")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Plain torch is quicker so while other programs run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def by_name(checks: Iterator[Check] | Sequence[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def put(root: Path, **files: str) -> Path:
    """Files below a root, `__` in their names being a slash."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


# The machine


def test_a_sound_machine(tmp_path: Path) -> None:
    root = put(
        tmp_path,
        proc__sys__kernel__osrelease="6.1.0\n",
        proc__cpuinfo="processor: 0\nmodel name : Some CPU\nflags : avx2 avx512bw avx512_vnni\n\nmodel name : other\n",
        sys__kernel__mm__transparent_hugepage__enabled="always [madvise] never",
    )
    found = by_name(doctor_machine.machine({"cache": tmp_path / "not" / "yet"}, root=root))
    assert {check.status for check in found.values()} == {"ok"}
    assert found["processor"].detail == "Some CPU: AVX2, AVX-512, AVX-512 VNNI"
    assert "Linux 6.1.0" in found["system"].detail and "container" not in found["system"].detail
    assert found["cache"].detail.startswith(f"{tmp_path}/not/yet, ")
    assert not (tmp_path / "not").exists()


def test_a_machine_with_traps(tmp_path: Path) -> None:
    root = put(
        tmp_path,
        proc__sys__kernel__osrelease="5.15.0-microsoft-standard-WSL2",
        proc__cpuinfo="model name : Old CPU\nflags : sse4_2 avx2",
        sys__kernel__mm__transparent_hugepage__enabled="always madvise [never]",
        run__a_file="",
    )
    (root / ".dockerenv").touch()
    places = {"cache": root / "run" / "a_file" / "cache"}
    found = by_name(doctor_machine.machine(places, root=root, encoding="ANSI_X3.4-1968"))
    assert "in a container, WSL" in found["system"].detail and found["system"].fix
    assert found["processor"].status == "note" and "portable" in found["processor"].detail
    assert found["huge pages"].status == "note"
    assert found["cache"].status == "warning" and "cannot be written (Not a directory)" in found["cache"].detail
    assert found["terminal"].status == "warning" and "LANG" in found["terminal"].fix
    put(root, proc__cpuinfo="flags : sse4_2")
    assert by_name(doctor_machine.machine({}, root=root))["processor"].status in ("warning", "note")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"proc__self__cgroup": "0::/a/b\n", "sys__fs__cgroup__a__cpu.max": "150000 100000"}, "the time of 1.5"),
        ({"proc__self__cgroup": "0::/a/b\n", "sys__fs__cgroup__a__cpu.max": "max 100000"}, ""),
        ({"proc__self__cgroup": "0::/a\n", "sys__fs__cgroup__a__cpu.max": "400000 100000"}, ""),
        (
            {
                "proc__self__cgroup": "4:cpu,cpuacct:/a\n7:memory:/a\n",
                "sys__fs__cgroup__cpu__a__cpu.cfs_quota_us": "50000",
                "sys__fs__cgroup__cpu__a__cpu.cfs_period_us": "100000",
            },
            "the time of 0.5",
        ),
        ({}, ""),
    ],
    ids=["a limit above", "no limit", "wide enough", "version 1", "no groups"],
)
def test_a_containers_share_of_the_processor(tmp_path: Path, files: dict[str, str], says: str) -> None:
    found = doctor_machine.cores(put(tmp_path, **files), usable=4, there=8)
    assert found.detail.startswith("4 of 8 cores")
    assert (found.status, found.fix) == (("warning", "--threads 1, or export QRUN_THREADS=1") if says else ("ok", ""))
    assert says in found.detail


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine, "LEAST_DISK", 1 << 60)
    assert doctor_machine.directory("cache", tmp_path).status == "warning"


def test_broken_downloads(tmp_path: Path) -> None:
    assert list(doctor.downloads(tmp_path)) == []
    put(tmp_path, **{"models--a--b__blobs__123.incomplete": "x" * 1000, "models--a--b__blobs__456": "y"})
    (found,) = doctor.downloads(tmp_path)
    assert found.status == "note" and found.detail.startswith("1 unfinished")


def test_where_the_hub_keeps_models() -> None:
    assert doctor.hub_cache({"HF_HUB_CACHE": "/a"}) == Path("/a")
    assert doctor.hub_cache({"HF_HOME": "/b"}) == Path("/b/hub")
    assert doctor.hub_cache({"XDG_CACHE_HOME": "/c"}) == Path("/c/huggingface/hub")
    assert doctor.hub_cache({}) == Path.home() / ".cache/huggingface/hub"


# The environment and the packages


def found_in(values: dict[str, str], torch: str = "2.13.0+cpu") -> dict[str, Check]:
    return by_name(list(environment(values, cores=8, torch=torch)))


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        ("NUMBA_DISABLE_JIT", "1", "failure"),
        ("TRITON_INTERPRET", "1", "warning"),
        ("OMP_PROC_BIND", "true", "warning"),
        ("KMP_AFFINITY", "granularity=fine,compact", "warning"),
        ("OMP_NUM_THREADS", "4,2", "note"),
        ("CUDA_VISIBLE_DEVICES", "", "note"),
        ("HF_HUB_OFFLINE", "1", "note"),
        ("HF_ENDPOINT", "https://user:secret@mirror.example", "note"),
        ("ONEAPI_DEVICE_SELECTOR", "level_zero:1", "note"),
    ],
)
def test_a_variable_that_matters(name: str, value: str, status: str) -> None:
    (found,) = found_in({name: value, "HOME": "/home/x"}).values()
    assert (found.name, found.status) == (name, status)
    assert "secret" not in found.detail + found.fix


def test_variables_that_do_not(tmp_path: Path) -> None:
    harmless = {
        "NUMBA_DISABLE_JIT": "0", "OMP_PROC_BIND": "false", "KMP_AFFINITY": "none", "OMP_NUM_THREADS": "8",
        "CUDA_VISIBLE_DEVICES": "0", "QRUN_CACHE_DIR": "/x", "LD_LIBRARY_PATH": str(tmp_path),
        "PYTHONPATH": str(tmp_path), "HF_TOKEN": "hf_abcdefghijk",
    }  # fmt: skip
    (found,) = found_in(harmless).values()
    assert (found.name, found.status) == ("variables", "ok")


def test_options_in_the_environment_are_named_without_values() -> None:
    (found,) = found_in({"QRUN_SYSTEM": "a secret", "QRUN_KV": "int4"}).values()
    assert found.status == "note" and "QRUN_KV, QRUN_SYSTEM" in found.detail and "secret" not in found.detail


def test_libraries_in_the_way(tmp_path: Path) -> None:
    put(tmp_path, **{"lib__libcudart.so.12": "", "lib__libsycl.so.8": "", "mine__torch__x": "", "mine__numba__x": ""})
    (tmp_path / "mine/numba/__init__.py").touch()
    found = list(
        environment(
            {"LD_LIBRARY_PATH": f"/nowhere:{tmp_path}/lib:", "PYTHONPATH": f"{tmp_path}/mine"}, cores=8, torch=None
        )
    )
    assert [check.status for check in found] == ["warning"] * 3
    assert "libcudart" in found[0].detail and "libsycl" in found[1].detail
    assert "numba" in found[2].detail and "torch" not in found[2].detail


def test_oneapi_beside_torchs_own_runtime() -> None:
    sourced = {"SETVARS_COMPLETED": "1", "ONEAPI_ROOT": "/opt/intel/oneapi"}
    assert found_in(sourced, "2.13.0+xpu")["oneAPI"].status == "failure"
    assert found_in(sourced)["oneAPI"].status == "note"


SOUND = {
    "qrun-llm": Package(("0.1.0",), ("torch<2.14,>=2.11", "numba>=0.62", 'pytest>=8; extra == "test"')),
    "torch": Package(("2.13.0+cpu",), ("Jinja2", 'triton==3.7.1; platform_system == "Windows"')),
    "numba": Package(("0.63.1",)),
    "jinja2": Package(("3.1.6",)),
}


def test_versions_as_declared() -> None:
    found = by_name(versions(SOUND))
    assert list(found) == ["qrun-llm", "torch", "packages"] and {check.status for check in found.values()} == {"ok"}
    assert found["packages"].detail == "numba 0.63.1, torch 2.13.0+cpu"
    assert "all 2 packages" in next(versions(SOUND)).detail
    assert by_name(versions(installed()))["qrun-llm"].status == "ok", "here"


@pytest.mark.parametrize(
    ("changed", "name", "status", "says"),
    [
        ({"numba": Package(("0.60.0",))}, "qrun-llm", "failure", "numba is 0.60.0, >=0.62 is needed"),
        ({"torch": Package(("2.14.0",))}, "qrun-llm", "failure", "torch is 2.14.0, <2.14,>=2.11 is needed"),
        ({"torch": Package(("2.13.0",), ("triton==3.7.1",))}, "torch", "warning", "triton is missing"),
        ({"numba": Package(("0.63.1", "0.62.0"))}, "numba", "warning", "more than once: 0.63.1, 0.62.0"),
        (
            {"triton": Package(("3.7.1",)), "pytorch-triton-xpu": Package(("3.5.0",))},
            "triton", "failure", "pytorch-triton-xpu and triton are installed",
        ),
        (
            {"torch": Package(("2.13.0+xpu",)), "triton": Package(("3.7.1",))},
            "triton", "failure", "whose own is triton-xpu",
        ),
        ({"intel-extension-for-pytorch": Package(("2.8.0+cpu",))}, "IPEX", "warning", "with torch 2.8 alone"),
        ({"qrun": Package(("1.0",))}, "qrun", "failure", "another project"),
    ],
)  # fmt: skip
def test_versions_that_do_not_go(changed: dict[str, Package], name: str, status: str, says: str) -> None:
    found = by_name(versions(SOUND | changed))
    assert found[name].status == status and says in found[name].detail and found[name].fix
    bad = {check.name for check in found.values() if check.status in ("warning", "failure")}
    assert bad == {name}


def test_the_fix_names_what_to_install() -> None:
    found = by_name(versions(SOUND | {"numba": Package(("0.60.0",))}))["qrun-llm"]
    assert found.fix == "pip install 'numba>=0.62'"


# Devices


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (ImportError("libnuma.so.1: cannot open shared object file"), "libnuma1"),
        (ImportError("libtorch_cpu.so: undefined symbol: iJIT_NotifyEvent"), "mkl"),
        (ImportError("libur_loader.so.0: version `LIBUR_LOADER_0.10' not found"), "setvars.sh"),
        (OSError("libcudnn.so.9: cannot open shared object file"), "LD_LIBRARY_PATH"),
        (ModuleNotFoundError("No module named 'torch'"), "pip install torch"),
        (RuntimeError("what?\nmore"), "--force-reinstall torch"),
    ],
)
def test_a_torch_that_does_not_come_up(error: Exception, fix: str) -> None:
    def load() -> Any:
        raise error

    checks = list(doctor.examine(load_torch=load, values={}))
    last = checks[-1]
    assert (last.name, last.status) == ("torch", "failure") and fix in last.fix
    assert str(error).splitlines()[0] in last.detail and "\n" not in last.detail
    assert {"machine", "environment", "versions"} <= {check.section for check in checks}, "what needs no torch"


def test_a_torch_that_takes_the_cores_away(monkeypatch: pytest.MonkeyPatch) -> None:
    left = iter((8, 1))
    monkeypatch.setattr(doctor_devices, "usable_cores", lambda: next(left))
    found = doctor_devices.torch_comes_up()
    assert found.status == "failure" and "1 of 8 cores" in found.detail and "OMP_PROC_BIND" in found.fix


@pytest.mark.parametrize(
    ("found", "wanted", "status", "fix"),
    [
        (Found(True, True, "NVIDIA X, 10.0 GB free"), True, "ok", ""),
        (Found(True, False, "torch 2 is built without CUDA: install it"), True, "failure", "install it"),
        (Found(True, False, "torch 2 is built without CUDA: install it"), False, "note", "install it"),
        (Found(False, False, "torch 2 is built without CUDA: install it"), True, "note", ""),
    ],
)
def test_an_nvidia_gpu(
    found: Found, wanted: bool, status: str, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "find_gpu", lambda kind="cuda": found)
    check = doctor_devices.cuda(wanted=wanted, root=tmp_path)
    assert (check.status, check.fix) == (status, fix)


def test_an_nvidia_gpu_without_a_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "find_gpu", lambda kind="cuda": Found(False, False, "none: see nvidia-smi"))
    place = "sys__bus__pci__devices__0000:01:00.0__"
    root = put(tmp_path, **{f"{place}class": "0x030000\n", f"{place}vendor": "0x10de\n", f"{place}device": "0x2684\n"})
    assert doctor_devices.cards(doctor_devices.NVIDIA, root) == ["10de:2684 (no driver)"]
    assert doctor_devices.cards(doctor_devices.INTEL, root) == []
    check = doctor_devices.cuda(wanted=True, root=root)
    assert check.status == "warning" and "--gpus all" in check.fix
    put(root, dev__dxg="")
    assert "WSL" in doctor_devices.cuda(wanted=True, root=root).detail


@pytest.fixture
def arc(tmp_path: Path) -> Path:
    """A machine with an Arc B580, its driver loaded and its device file there."""
    place = "sys__bus__pci__devices__0000:03:00.0__"
    root = put(tmp_path, **{f"{place}class": "0x038000", f"{place}vendor": "0x8086", f"{place}device": "0xe20b"})
    put(root, drivers__xe__x="", dev__dri__renderD128="")
    (root / "sys/bus/pci/devices/0000:03:00.0/driver").symlink_to(root / "drivers/xe")
    return root


@pytest.mark.parametrize(
    ("found", "wanted", "status"),
    [
        (Found(True, False, "torch 2 is built without Intel GPUs: pip install it"), True, "failure"),
        (Found(True, False, "torch 2 is built without Intel GPUs: pip install it"), False, "note"),
        (Found(False, False, "torch 2 is built without Intel GPUs: pip install it"), True, "failure"),
        (Found(False, False, "torch 2 is built without Intel GPUs: pip install it"), False, "note"),
    ],
)
def test_an_intel_gpu_that_is_not_used(
    found: Found, wanted: bool, status: str, arc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "find_gpu", lambda kind: found)
    (check,) = doctor_devices.xpu(wanted=wanted, root=arc)
    assert check.status == status and "8086:e20b (xe); torch 2 is built without Intel GPUs" in check.detail
    assert check.fix == ("pip install it" if wanted or found.there else "")


def test_no_intel_gpu(tmp_path: Path) -> None:
    (none,) = doctor_devices.xpu(wanted=False, root=tmp_path)
    assert none.status == "note" and "no Intel GPU" in none.detail


def test_device_files_of_an_intel_gpu(arc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    why = "torch 2 is built without Intel GPUs: pip install it"
    monkeypatch.setattr(backends, "find_gpu", lambda kind: Found(True, False, why))
    monkeypatch.setattr(doctor_devices.os, "access", lambda path, mode: False)
    _, shut = doctor_devices.xpu(wanted=False, root=arc)
    assert shut.status == "warning" and "usermod -aG render" in shut.fix
    (arc / "dev/dri/renderD128").unlink()
    _, none = doctor_devices.xpu(wanted=False, root=arc)
    assert none.status == "warning" and "--device /dev/dri" in none.fix
    why = "there is no /dev/dri/renderD*: install it"  # said once
    assert len(list(doctor_devices.xpu(wanted=True, root=arc))) == 1


def test_an_intel_gpu_that_is_used(arc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that a report needs, and without what would tell one card from another."""
    monkeypatch.setattr(backends, "find_gpu", lambda kind: Found(True, True, "Arc A770, 3.0 GB free of 16 GB"))
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 2)
    card = SimpleNamespace(
        driver_version="1.6.33578+51", device_id=0x56A0, sub_group_sizes=[8, 16, 32], has_fp64=False, uuid="8680-secret"
    )
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device=None: card)
    monkeypatch.setattr(torch.xpu, "mem_get_info", lambda: (1, 2))
    checks = list(doctor_devices.xpu(wanted=True, root=arc))
    assert [check.status for check in checks] == ["ok", "ok", "note", "note"]
    assert checks[0].detail.startswith("Arc A770, 3.0 GB free")
    assert checks[1].detail.startswith("PCI 8086:e20b (xe); driver_version=1.6.33578+51, device_id=0x56a0,")
    assert "sub_group_sizes=[8, 16, 32]" in checks[1].detail and "secret" not in checks[1].detail
    assert "2 devices" in checks[2].detail and "64-bit floats" in checks[3].detail

    def raises() -> None:
        raise RuntimeError("The device doesn't support querying the available free memory")

    monkeypatch.setattr(torch.xpu, "mem_get_info", raises)
    assert "does not say what is free" in list(doctor_devices.xpu(wanted=True, root=arc))[-1].detail


def test_what_trials_came_to() -> None:
    trials = [
        Trial("int4 g64 M=1", "native", "aten int4", 1e-3),
        Trial("int4 g32 M=1", "native", "aten int4", 2e-3),
        Trial("int8 M=1", "native", "aten int8", None, "NotImplementedError: no such op"),
        Trial("int8 M=1", "triton", "triton int8", 0.5, "wrong: its error is 0.5"),
    ]
    assert [(check.status, check.name, check.detail) for check in tiers(trials)] == [
        ("ok", "native", "aten int4: right, error up to 2.0e-03; int4 g64 M=1, int4 g32 M=1"),
        ("note", "native", "aten int8: NotImplementedError: no such op; int8 M=1"),
        ("note", "triton", "triton int8: wrong: its error is 0.5; int8 M=1"),
    ]
    assert not failed(tiers(trials)) and list(tiers(())) == []


def test_trials_are_listed_behind_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the backend whose kernels were tried."""

    class Tried(Backend):
        @property
        def trials(self) -> Sequence[Trial]:
            return [Trial("int4", "native", "aten int4", 1e-3)]

    monkeypatch.setattr(doctor_kernels, "kernels", lambda backend, progress: [BENT])
    monkeypatch.setattr(doctor_model, "model", lambda make, progress: [])
    sections = [check.section for check in doctor.working(Tried, silent)]
    assert sections == ["devices", "kernels", "xpu tiers"]


def test_intels_variables_are_shown() -> None:
    found = found_in(
        {"UR_L0_ENABLE_RELAXED_ALLOCATION_LIMITS": "1", "IGC_EnableDPEmulation": "1", "NEOReadDebugKeys": "1", "X": "y"}
    )
    (check,) = found.values()
    assert (
        check.status == "note"
        and "NEOReadDebugKeys=1, UR_L0_ENABLE_RELAXED" in check.detail
        and "X=" not in check.detail
    )
    chosen = found_in({"ZE_AFFINITY_MASK": "1", "CMPLR_ROOT": "/opt/intel"})
    assert set(chosen) == {"ZE_AFFINITY_MASK", "oneAPI"} and "it is 1:" in chosen["ZE_AFFINITY_MASK"].detail


def test_a_device_that_cannot_be_chosen() -> None:
    (found,) = doctor.working(doctor.chooser("xpu", None, silent), silent)
    assert found.status == "failure" and found.fix


# Kernels


def silent(what: str, done: int, total: int) -> None: ...


class Bent(Backend):
    """Plain torch whose products come out as `bend` makes them."""

    def __init__(self, bend: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.bend = bend

    def linear(self, *given: Any, **options: Any) -> Linear:
        call = super().linear(*given, **options)
        return lambda x: self.bend(call(x))


def fails(y: Tensor) -> Tensor:
    raise RuntimeError("illegal memory access\nsecond line")


WRONG: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "too large": (lambda y: y * 1.02, "wrong: its error is 0.02 for 1 token"),
    "one row": (lambda y: torch.cat((y[:, :-1], y[:, -1:] + 5), 1), "wrong: its error is"),
    "not a number": (lambda y: y * math.nan, "its error is nan"),
    "another shape": (lambda y: y[:, 1:], "came out for 1 tokens instead of"),
    "raises": (fails, "RuntimeError: illegal memory access"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_kernel_is_found(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a block, and never as an error of the doctor's own."""
    bend, says = WRONG[kind]
    monkeypatch.setattr(doctor_kernels, "SHAPE", (256, 512))
    monkeypatch.setattr(doctor_kernels, "PRODUCTS", ("W8",))
    monkeypatch.setattr(doctor_kernels, "CACHES", ())
    monkeypatch.setattr(doctor_kernels, "BLOCKS", ("W16",))
    found = by_name(doctor_kernels.kernels(Bent(bend), silent))
    assert found["W8"].status == "failure" and says in found["W8"].detail and "--report" in found["W8"].fix
    assert "second line" not in found["W8"].detail
    assert kind == "another shape" or {check.status for check in found.values()} == {"failure"}


def test_only_odd_shapes_are_wrong() -> None:
    odd = Bent(lambda y: y * 1.1 if y.shape[1] == doctor_kernels.ODD[0] else y)
    assert doctor_kernels.product(odd, "W16").status == "failure"


def test_a_wrong_cache_is_found() -> None:
    """Keys and values that drift, though every product is right."""

    class Drifting(Backend):
        def attention_block(self, *given: Any) -> Any:
            attend = super().attention_block(*given)

            def drift(x: Tensor, cache: Any, step: Any) -> Tensor:
                return attend(x, cache, replace(step, cos=step.cos * 1.1))

            return drift

    backend, plain = Drifting(), Backend()
    for kv in ("bf16", "int4"):
        assert doctor_kernels.attention(backend, plain, kv).status == "failure"
        assert doctor_kernels.attention(plain, Backend(), kv).status == "ok"


def test_the_cpus_kernels() -> None:
    backend, plain = CPUBackend(threads=2), Backend()
    checks = [doctor_kernels.product(backend, code) for code in ("W16", "W4", "W8A8", "WNF4")]
    checks += [doctor_kernels.attention(backend, plain, "k8v4"), doctor_kernels.ffn(backend, plain, "W4")]
    checks += [doctor_kernels.experts(backend, plain, "W4")]
    assert [check.status for check in checks] == ["ok"] * 7, [check.detail for check in checks]
    assert [check.fallback for check in checks] == [False] * 3 + [True] + [False] * 3
    assert "numba int4×int16 dot; error" in checks[1].detail and "(fallback)" in checks[3].detail
    for check in checks:
        assert len(check.runs) == 3 and all(run.error < run.bound and run.milliseconds > 0 for run in check.runs)
    assert all(run.bytes_per_second > 0 for run in checks[1].runs)


# Sampling and the embedded model


class Choosing(Backend):
    """Draws as `draw` does, from logits [V]."""

    def __init__(self, draw: Callable[[Tensor, torch.Generator], Tensor]) -> None:
        super().__init__()
        self.draw = draw

    def chooser(self, vocab: int, *, seed: int, **settings: Any) -> Callable[[Tensor], Tensor]:
        random = torch.Generator().manual_seed(seed)
        return lambda logits: self.draw(logits[0], random).view(1)


def test_sampling_as_it_should_be() -> None:
    found = doctor_model.sampling(Backend)
    assert found.status == "ok" and "plain torch" in found.detail


@pytest.mark.parametrize(
    ("draw", "says"),
    [
        (lambda logits, random: logits.argmin(), "not the likeliest"),
        (lambda logits, random: logits.argmax(), "to be expected"),
        (lambda logits, random: torch.randint(5000, (1,)), "the same seed gives other tokens"),
    ],
)
def test_sampling_that_is_wrong(draw: Any, says: str) -> None:
    found = doctor_model.sampling(lambda: Choosing(draw))
    assert found.status == "failure" and says in found.detail


def test_the_embedded_model() -> None:
    sound, bent = doctor_model.spark(Backend), doctor_model.spark(lambda: Bent(lambda y: y.flip(-1)))
    assert sound.status == "ok" and "qrun chat" in sound.detail
    assert bent.status == "failure" and "another answer" in bent.detail


# The command


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the command is to find, in place of this machine; an exception is raised at its place."""
    found: list[Any] = []

    def examine(device: str, **options: Any) -> Iterator[Check]:
        for one in found:
            if not isinstance(one, Check):
                one()
            else:
                yield one

    monkeypatch.setattr(doctor, "examine", examine)
    return found


def test_lines_and_codes(examined: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    examined += [
        Check(section="machine", name="cores", status="ok", detail="8"),
        Check(section="machine", name="odd", status="warning", detail="b\x1b[31md", fix="unset X"),
        Check(section="devices", name="xpu", status="note", detail="none", fix="get one"),
    ]
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "ok       machine      cores          8"
    assert out[2] == "note     devices      xpu            none (get one)"
    assert out[-1] == "1 ok, 1 note, 1 warning, no failures"
    assert "warning: machine, odd: b␛[31md" in out and "  fix: unset X" in out
    examined.insert(0, BENT)
    assert main(["doctor", "-q"]) == 1
    assert capsys.readouterr().out.splitlines()[2:] == ["failure: kernels, W4: wrong", "  fix: mend it"]


def test_json(examined: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    examined.append(replace(BENT, runs=(Run(1, math.nan, 0.1, 2.0), Run(8, 0.5, 0.1, 3.0, 1e9))))
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["ok"] is False and found["checks"][0]["name"] == "W4"
    assert [run["error"] for run in found["checks"][0]["runs"]] == [None, 0.5]


def test_a_report_tells_no_secrets(examined: list[Any], tmp_path: Path) -> None:
    home = Path.home()
    examined.append(
        Check(
            section="machine", name="cache", status="failure",
            detail=f"{home}/.cache/qrun and {home}ly and /data/projekt-x/models/a, /usr/lib/x.so, /mnt/y/z",
            fix="HF_TOKEN=hf_abcdefghijklmnop at https://me:word@hub.example/x/y",
        )
    )  # fmt: skip
    path = tmp_path / "report.md"
    assert main(["doctor", "--report", str(path)]) == 1
    text = path.read_text(encoding="utf-8")
    assert "~/.cache/qrun and" in text and "/data/…, /usr/lib/x.so, /mnt/…" in text
    for secret in ("abcdefghijklmnop", "word@", "projekt-x", f"{home}/"):
        assert secret not in text
    assert "hub.example/x/y" in text
    assert [file.name for file in tmp_path.iterdir()] == ["report.md"]


def test_another_home_is_not_a_home() -> None:
    shown = public(replace(BENT, detail="/home/ann/x /home/anna/x"), Path("/home/ann"))
    assert shown.detail == "~/x /home/…"
    assert public(replace(BENT, detail="/usr/x"), Path("/")).detail == "/usr/x"
    assert "8 ok" not in summary([BENT]) and failed([BENT])
    assert line(BENT) in markdown([BENT], Path("/home/ann"))


@pytest.mark.parametrize(
    "arguments", [["--report", "/nowhere/at/all.md"], ["--report", "/"], ["--threads", "0"], ["--device", "tpu"]]
)
def test_wrong_usage(arguments: list[str], examined: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    examined.append(lambda: pytest.fail("it must not begin"))
    assert main(["doctor", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_interrupt_that_a_kernel_swallows_still_ends_it(examined: list[Any], tmp_path: Path) -> None:
    def swallow() -> None:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    examined += [swallow, BENT, lambda: pytest.fail("it must have ended")]
    assert main(["doctor", "--report", str(tmp_path / "report.md")]) == 130
    assert not list(tmp_path.iterdir())


def test_from_end_to_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A backend that cannot multiply, found by the command as a user starts it."""
    monkeypatch.setattr(doctor_kernels, "SHAPE", (256, 512))
    monkeypatch.setattr(doctor_kernels, "PRODUCTS", ("W4",))
    monkeypatch.setattr(doctor_kernels, "CACHES", ("int8",))
    monkeypatch.setattr(doctor_kernels, "BLOCKS", ())
    monkeypatch.setattr(backends, "pick", lambda device, **options: Bent(lambda y: y + 1))
    assert main(["doctor", "--device", "cpu", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    wrong = {check["name"] for check in found["checks"] if check["section"] in ("kernels", "attention", "model")
             and check["status"] == "failure"}  # fmt: skip
    assert wrong == {"W4", "int8", "spark"}

    def none(device: str, **options: Any) -> Backend:
        raise BackendError("device 'xpu' has none: use --device cpu")

    def broken(device: str, **options: Any) -> Backend:
        raise ImportError("numpy.core is gone")

    monkeypatch.setattr(backends, "pick", broken)
    (found,) = doctor.working(doctor.chooser("cpu", None, silent), silent)
    assert found.status == "failure" and "numpy.core" in found.detail
    monkeypatch.setattr(backends, "pick", none)
    assert main(["doctor", "--device", "xpu"]) == 1
    assert "  fix: use --device cpu\n" in capsys.readouterr().out
