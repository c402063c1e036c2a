"""This process's memory: its peak, here as the operating system counts what is resident, on another device as torch
counts what it allocated; and what is to be done once it ran out. It knows nothing of models."""

import gc
import sys
from pathlib import Path
from typing import Literal

import torch

if sys.platform == "win32":
    import psutil
else:
    import resource

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_FULL = ("out of memory", "ALLOC_FAILED", "OUT_OF_DEVICE_MEMORY", "OUT_OF_HOST_MEMORY", "OUT_OF_RESOURCES")


def peak(device: str = "cpu") -> int:
    """The most bytes that were in use at once since the process began or since `reset_peak`."""
    if device != "cpu":
        return int(torch.get_device_module(device).max_memory_allocated())
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def reset_peak(device: str = "cpu") -> None:
    """Start counting again from now. Where the system has no such thing, the peak stays that of the whole process."""
    if device != "cpu":
        torch.get_device_module(device).reset_peak_memory_stats()
        return
    try:
        _CLEAR.write_text("5")
    except OSError:
        return


def ran_out(error: BaseException) -> Literal["memory", "the GPU's memory"] | None:
    """What an error says is used up; none where it speaks of something else.

    A failed allocation may hide behind the error of what it interrupted, such as the recording of a graph.
    """
    text = str(error)
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return "memory"
    if isinstance(error, torch.OutOfMemoryError) or any(word in text for word in _FULL):
        return "the GPU's memory"
    cause = error.__cause__ or error.__context__
    return ran_out(cause) if isinstance(cause, MemoryError | RuntimeError) else None


def let_go(error: BaseException) -> None:
    """Drop what failed computations hold through an error's tracebacks, and return a GPU's unused memory to it."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    gc.collect()
    torch.cuda.empty_cache()
    torch.xpu.empty_cache()
