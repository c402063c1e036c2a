"""What a device has free now, and giving back what this process no longer uses. It knows no model."""

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch


def available(device: str = "cpu", *, cgroups: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc")) -> int:
    """Free bytes of a device now. For the CPU: what the system can give, or the least that a control group leaves; for
    a GPU: what no program holds, and what torch holds here without using it."""
    if device != "cpu":
        module = torch.get_device_module(device)
        return device_memory(device)[0] + int(module.memory_reserved() - module.memory_allocated())
    return min([psutil.virtual_memory().available, *_cgroup_free(cgroups, proc)])


def device_memory(device: str) -> tuple[int, int]:
    """Bytes of a GPU that no program holds, and of all it has. An Intel one that shares the host's memory has what the
    host has free: what torch says of it is too little, or an error."""
    module = torch.get_device_module(device)
    if device == "xpu":
        found = module.get_device_properties()
        left, shared = found.total_memory - module.memory_reserved(), getattr(found, "is_integrated_gpu", False)
        with contextlib.suppress(RuntimeError):
            if not shared:
                return min(int(module.mem_get_info()[0]), left), found.total_memory  # some drivers count nothing
        return max(0, min(left, available())), found.total_memory
    free, total = module.mem_get_info()
    return int(free), int(total)


def in_use() -> int:
    """Bytes of memory that this process has now."""
    return psutil.Process().memory_info().rss


def release() -> None:
    """Return to the system what was freed inside the heap, which glibc keeps; elsewhere this does nothing."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _cgroup_free(root: Path, proc: Path) -> Iterator[int]:
    """What every memory limit above this process leaves, in bytes. Containers see less than the machine has."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = top / path.strip("/")
        for place in (group, *group.parents):
            if place == top or top in place.parents:
                yield from _limit_free(place, *names)


def _limit_free(group: Path, limit: str, usage: str, reclaimable: str) -> Iterator[int]:
    try:
        most = int((group / limit).read_text())
        used = int((group / usage).read_text())
        stat = dict(line.split(" ", 1) for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or no limit ("max")
        return
    yield max(0, most - used + int(stat.get(reclaimable, 0)))
