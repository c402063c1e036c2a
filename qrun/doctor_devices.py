"""What there is to compute on: torch itself, memory, and each device, usable or why not. It runs no kernel."""

import os
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from qrun.doctor_check import Check, Status, first_line
from qrun.doctor_machine import usable_cores

LEAST_MEMORY: Final = 1_000_000_000
"""Bytes below which hardly the embedded model runs."""
NVIDIA, INTEL = "0x10de", "0x8086"
FACTS: Final = (
    "platform_name", "driver_version", "version", "device_id", "architecture", "total_memory", "local_mem_size",
    "last_level_cache_size", "memory_clock_rate", "memory_bus_width", "max_compute_units", "gpu_eu_count",
    "gpu_subslice_count", "max_work_group_size", "max_num_sub_groups", "sub_group_sizes", "has_fp16", "has_fp64",
    "has_atomic64", "has_bfloat16_conversions", "has_subgroup_matrix_multiply_accumulate", "has_subgroup_2d_block_io",
    "is_integrated_gpu",
)  # fmt: skip
"""Of an Intel GPU's properties, those that explain how it does. Its serial number is not among them."""
REPAIRS: Final = (
    (r"libnuma", "install libnuma (apt install libnuma1)"),
    (r"iJIT_NotifyEvent", "pip install 'mkl<2024.1', or a torch from pip instead of conda's"),
    (r"libsycl|libur_loader|LIBUR_LOADER|libpi_|libmkl", "start a shell in which oneAPI's setvars.sh was not sourced"),
    (r"libcu|libnv|nvJitLink", "unset LD_LIBRARY_PATH, then pip install --force-reinstall torch"),
    (r"libgomp|libstdc\+\+", "install it (apt install libgomp1 libstdc++6)"),
    (r"GLIBC", "use a newer system or container: this torch is built for one"),
    (r"No module named 'torch'", "pip install torch"),
)  # fmt: skip
"""What the error of an import speaks of, and what to do then."""


def torch_comes_up(load: Callable[[], Any] = lambda: import_module("torch")) -> Check:
    """Whether torch can be imported, and leaves this process the cores it had."""
    before = usable_cores()
    try:
        torch = load()
    except Exception as error:  # whatever a broken installation raises
        text = first_line(error)
        fix = next((fix for pattern, fix in REPAIRS if re.search(pattern, text)), "pip install --force-reinstall torch")
        return _check("torch", "failure", f"it cannot be imported ({text}): nothing else was tried", fix)
    detail = f"{torch.__version__}, {_build(torch)}"
    after = usable_cores()
    if after < before:
        return _check(
            "torch", "failure", f"{detail}; importing it pins this process to {after} of {before} cores",
            "unset OMP_PROC_BIND, GOMP_CPU_AFFINITY and KMP_AFFINITY",
        )  # fmt: skip
    return _check("torch", "ok", detail)


def memory(root: Path = Path("/")) -> Check:
    """What is free, here and under the limits of a container."""
    import psutil

    from qrun.memory import available, human

    here = psutil.virtual_memory()
    free = available(cgroups=root / "sys/fs/cgroup", proc=root / "proc")
    detail = f"{human(free)} free of {human(here.total)}"
    if free < 0.95 * here.available:
        detail += f"; a container's limit: the machine has {human(here.available)} free"
    if free < LEAST_MEMORY:
        return _check(
            "memory", "warning", f"{detail}: little for any model", "close other programs, or raise the limit"
        )
    return _check("memory", "ok", detail)


def cpu() -> Check:
    """Whether the CPU's kernels can be made: their compiler comes up."""
    try:
        import_module("qrun.backends.cpu")
    except Exception as error:
        return _check(
            "cpu",
            "failure",
            f"its kernels' compiler does not come up ({first_line(error)})",
            "pip install --force-reinstall numba llvmlite",
        )
    torch = import_module("torch")
    return _check("cpu", "ok", f"{usable_cores()} threads, torch uses {torch.backends.cpu.get_cpu_capability()}")


def cuda(*, wanted: bool, root: Path = Path("/")) -> Check:
    """The NVIDIA GPU that is used, or why none; without ``wanted`` that is no failure."""
    from qrun.backends import find_gpu

    found = find_gpu()
    if found.usable:
        return _check("cuda", "ok", found.about)
    why, _, fix = found.about.rpartition(": ")
    if found.there:
        return _check("cuda", "failure" if wanted else "note", why, fix)
    if any(root.glob("dev/dxg")):
        return _check(
            "cuda", "note", f"under WSL, {why}", "install NVIDIA's driver in Windows, if it has an NVIDIA GPU"
        )
    if cards(NVIDIA, root):
        return _check(
            "cuda", "warning", "an NVIDIA GPU is in this machine and has no device file: its driver is not loaded, or "
            "this container was not given it", "install the driver (nvidia-smi must list it), or docker run --gpus all",
        )  # fmt: skip
    return _check("cuda", "note", f"no NVIDIA GPU: {why}")


def xpu(*, wanted: bool, root: Path = Path("/")) -> Iterator[Check]:
    """The Intel GPU that is used, or why none; without ``wanted`` that is no failure."""
    from qrun.backends import find_gpu

    found, here = find_gpu("xpu"), cards(INTEL, root)
    if found.usable:
        yield _check("xpu", "ok", found.about)
        yield from _about_xpu(here)
        return
    why, _, fix = found.about.rpartition(": ")
    seen = ", ".join(here) or "no Intel GPU is seen"
    if wanted or found.there:
        yield _check("xpu", "failure" if wanted else "note", f"{seen}; {why}", fix)
    else:
        yield _check("xpu", "note", f"{f'not used: {seen}' if here else 'no Intel GPU'}; {why}")
    if here and "/dev/dri" not in why:
        yield from _render_nodes(root)


def _about_xpu(here: list[str]) -> Iterator[Check]:
    """What a report must say of the device, and what it cannot do."""
    xpu: Any = import_module("torch").xpu
    found = xpu.get_device_properties()
    facts = [f"{name}={_fact(name, found)}" for name in FACTS if name in dir(found)]
    yield _check("xpu facts", "ok", f"PCI {', '.join(here) or 'unknown'}; {', '.join(facts)}")
    if xpu.device_count() > 1:
        yield _check(
            "xpu", "note", f"{xpu.device_count()} devices are seen, and the first is used",
            "ONEAPI_DEVICE_SELECTOR=level_zero:1 takes the second",
        )  # fmt: skip
    if not found.has_fp64:
        yield _check("xpu fp64", "note", "it has no 64-bit floats: qrun needs none, IPEX and others may")
    try:
        xpu.mem_get_info()
    except RuntimeError:
        yield _check(
            "xpu memory", "note", "its driver does not say what is free, as is usual where memory is the CPU's: what "
            "the CPU has free is taken",
        )  # fmt: skip


def _fact(name: str, found: Any) -> str:
    return hex(found.device_id) if name == "device_id" else str(getattr(found, name))


def _render_nodes(root: Path) -> Iterator[Check]:
    nodes = sorted(root.glob("dev/dri/renderD*"))
    shut = [node for node in nodes if not os.access(node, os.R_OK | os.W_OK)]
    if not nodes:
        fix = "install the GPU's driver (i915 or xe); in a container: docker run --device /dev/dri"
        yield _check("/dev/dri", "warning", "there is no /dev/dri/renderD*: no program can use an Intel GPU", fix)
    elif shut:
        names = ", ".join(f"/dev/dri/{node.name}" for node in shut)
        yield _check(
            "/dev/dri", "warning", f"{names} may not be opened", "sudo usermod -aG render $USER, then log in again"
        )


def cards(vendor: str, root: Path = Path("/")) -> list[str]:
    """The display controllers of a vendor on the PCI bus, as `8086:e20b (xe)`: device and driver."""
    found: list[str] = []
    for place in sorted(root.glob("sys/bus/pci/devices/*")):
        kind, maker, model = ((place / name) for name in ("class", "vendor", "device"))
        try:
            if kind.read_text().startswith("0x03") and maker.read_text().strip() == vendor:
                driver = (place / "driver").resolve().name if (place / "driver").exists() else "no driver"
                found.append(f"{vendor[2:]}:{model.read_text().strip()[2:]} ({driver})")
        except OSError:
            continue
    return found


def _build(torch: Any) -> str:
    if torch.version.cuda is not None:
        return f"for CUDA {torch.version.cuda}"
    if torch.version.xpu is not None:
        return f"for Intel GPUs ({torch.version.xpu})"
    return "for CPUs" if torch.version.hip is None else f"for ROCm {torch.version.hip}, which qrun does not use"


def _check(name: str, status: Status, detail: str, fix: str = "") -> Check:
    return Check(section="devices", name=name, status=status, detail=detail, fix=fix)
