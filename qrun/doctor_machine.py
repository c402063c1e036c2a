"""What this machine gives qrun: processor, cores, disk, directories, terminal. It needs no torch,
and knows no device.

Everything is read below a root directory, so that a test gives a machine of its own.
"""

import os
import platform
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from qrun.doctor_check import Check, Status

LEAST_DISK: Final = 2 << 30
"""Bytes of disk below which nothing is kept: a gibibyte always stays free."""
WRITTEN: Final = {
    "cache": ("QRUN_CACHE_DIR", "kernels and weights are made again at every start"),
    "state": ("XDG_STATE_HOME", "nothing that is typed is kept"),
    "config": ("XDG_CONFIG_HOME", "no setting can be kept"),
    "hub cache": ("HF_HOME", "no model can be downloaded"),
}
"""Directories by what they are for: the variable that moves each, and what is lost where it cannot be written."""
FEATURES: Final = {
    "avx2": "AVX2", "avx_vnni": "AVX-VNNI", "avx512bw": "AVX-512", "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16", "amx_int8": "AMX", "asimddp": "dot product", "i8mm": "I8MM", "sve": "SVE",
}  # fmt: skip
"""Flags of /proc/cpuinfo as people call them."""


def machine(directories: Mapping[str, Path], *, root: Path = Path("/"), encoding: str = "utf-8") -> Iterator[Check]:
    """Everything about the machine. ``directories``: as `WRITTEN` names them; ``encoding``: the output's."""
    yield _system(root)
    yield _python()
    yield _processor(root)
    yield cores(root)
    yield from _huge_pages(root)
    for name, path in directories.items():
        yield directory(name, path)
    if encoding.lower().replace("-", "") != "utf8":
        yield _check(
            "terminal", "warning", f"the output is in {encoding}: what it lacks is shown as ?", "export LANG=C.UTF-8"
        )


def processor(root: Path = Path("/")) -> str:
    """The processor's name as the system gives it."""
    names = [value for key, value in _cpuinfo(root) if key == "model name"]
    return names[0] if names else platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may use now."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _check(name: str, status: Status, detail: str, fix: str = "") -> Check:
    return Check(section="machine", name=name, status=status, detail=detail, fix=fix)


def _system(root: Path) -> Check:
    release = _text(root / "proc/sys/kernel/osrelease") or platform.release()
    lines = dict(line.split("=", 1) for line in _text(root / "etc/os-release").splitlines() if "=" in line)
    parts = [lines.get("PRETTY_NAME", "").strip('"'), f"{platform.system()} {release}", platform.machine()]
    if any((root / mark).exists() for mark in (".dockerenv", "run/.containerenv")):
        parts.append("in a container")
    detail = ", ".join(filter(None, parts))
    if "microsoft" in release.lower():
        return _check(
            "system", "note", f"{detail}, WSL", "keep models on WSL's own disk: under /mnt/c they load far slower"
        )  # fmt: skip
    if sys.platform != "linux":
        return _check("system", "note", f"{detail}: qrun is tested on Linux alone")
    return _check("system", "ok", detail)


def _python() -> Check:
    detail = (
        f"{platform.python_implementation()} {platform.python_version()}, {8 * (sys.maxsize.bit_length() // 8 + 1)}-bit"
    )
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return _check("python", "warning", f"{detail}, free-threaded: qrun is not tested on it", "use the usual build")
    return _check("python", "ok", detail)


def _cpuinfo(root: Path) -> Iterator[tuple[str, str]]:
    """The first processor's lines."""
    for line in _text(root / "proc/cpuinfo").splitlines():
        if not line.strip():
            return
        key, _, value = line.partition(":")
        yield key.strip(), value.strip()


def _processor(root: Path) -> Check:
    flags = {flag for key, value in _cpuinfo(root) if key in ("flags", "Features") for flag in value.split()}
    named = ", ".join(name for flag, name in FEATURES.items() if flag in flags) or "no known vector extensions"
    detail = f"{processor(root)}: {named}"
    if {"avx512_vnni", "avx512bw"} <= flags:
        return _check("processor", "ok", detail)
    if platform.machine() in ("x86_64", "AMD64") and "avx2" not in flags:
        return _check("processor", "warning", f"{detail}: without AVX2 everything is slow")
    return _check("processor", "note", f"{detail}: without AVX-512 VNNI the kernels run in their portable form")


def cores(root: Path = Path("/"), *, usable: int | None = None, there: int | None = None) -> Check:
    """How many cores there are, how many this process may use, and for how much of their time."""
    there = there or os.cpu_count() or 1
    usable = usable or usable_cores()
    quota = _quota(root)
    detail = f"{usable} of {there} cores"
    if quota is not None and quota < usable - 0.01:
        threads = max(1, int(quota))
        return _check(
            "cores", "warning", f"{detail}, but a control group allows the time of {quota:g}: threads wait in turn",
            f"--threads {threads}, or export QRUN_THREADS={threads}",
        )  # fmt: skip
    return _check("cores", "ok", detail)


def _quota(root: Path) -> float | None:
    """The least processor time, in cores, that the control groups above this process allow; none where unlimited."""
    found: list[float] = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        top = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        if controllers and "cpu" not in controllers.split(","):
            continue
        group = top / path.strip("/")
        for place in (group, *group.parents):
            if place != top and top not in place.parents:
                break
            if controllers:
                words = [_text(place / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
            else:
                words = _text(place / "cpu.max").split()
            if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):
                found.append(int(words[0]) / int(words[1]))
    return min(found, default=None)


def _huge_pages(root: Path) -> Iterator[Check]:
    setting = _text(root / "sys/kernel/mm/transparent_hugepage/enabled")
    if "[never]" in setting:
        yield _check(
            "huge pages", "note", "transparent huge pages are off: large weights are read somewhat slower",
            "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
        )  # fmt: skip


def directory(name: str, path: Path) -> Check:
    """Whether files can be written where ``path`` is or would be made, and how much room there is."""
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            free = shutil.disk_usage(place).free
    except OSError as error:
        variable, loss = WRITTEN[name]
        return _check(
            name, "warning", f"{path} cannot be written ({error.strerror}): {loss}",
            f"set {variable} to a directory of yours",
        )  # fmt: skip
    detail = f"{path}, {free / 1e9:.1f} GB free"
    if free < LEAST_DISK:
        return _check(
            name, "warning", f"{detail}: too little to keep anything", "make room: qrun cache prune, or hf cache prune"
        )
    return _check(name, "ok", detail)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
