"""Backends by name. The only place that names the device modules, and it imports them when asked, not before."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qrun.errors import BackendError

if TYPE_CHECKING:
    from qrun.backends.base import Backend
    from qrun.formats import Format

DEVICES = ("auto", "cpu", "cuda", "xpu")
GPUS = {"cuda": "NVIDIA", "xpu": "Intel"}


def pick(
    device: str = "auto",
    *,
    threads: int | None = None,
    xpu_tier: str | None = None,
    xpu_graph: bool = False,
    progress: Callable[[str], None] | None = None,
) -> "Backend":
    """The backend for a device name; ``auto`` is an NVIDIA GPU that can be used, else an Intel one, else the CPU.

    ``xpu_tier``: whose kernels come first on an Intel GPU; ``xpu_graph``: record its step. ``progress`` is told, in a
    line, why a GPU that is there is not used. Raises BackendError, saying what is missing, where a device that was
    asked for by name cannot be used.
    """
    if device not in DEVICES:
        raise BackendError(f"unknown device {device!r}: use one of {', '.join(DEVICES)}")
    tell = progress or _silent
    makers: dict[str, Callable[[], Backend]] = {
        "cuda": lambda: _cuda(tell),
        "xpu": lambda: _xpu(xpu_tier, xpu_graph, tell),
    }
    for name, make in makers.items():
        if device not in (name, "auto"):
            continue
        try:
            return make()
        except BackendError as error:
            if device == name:
                raise
            if find_gpu(name).there:
                tell(f"the {GPUS[name]} GPU cannot be used: {error}")
    from qrun.backends.cpu import CPUBackend

    return CPUBackend(threads=threads, progress=progress)


def _silent(what: str) -> None:
    """Progress that nobody looks at."""


def _cuda(progress: Callable[[str], None]) -> "Backend":
    from qrun.backends.cuda_device import find_card

    card = find_card()
    from qrun.backends.cuda import CUDABackend

    return CUDABackend(card, progress=progress)


def _xpu(tier: str | None, graph: bool, progress: Callable[[str], None]) -> "Backend":
    from qrun.backends.xpu_device import find_xpu

    card = find_xpu()
    from qrun.backends.xpu import XPUBackend
    from qrun.backends.xpu_tiers import tier_of

    return XPUBackend(card, first=tier_of(tier), graph=graph, progress=progress)


@dataclass(frozen=True)
class Found:
    """Whether there is a GPU that the user has not hidden, whether it can be used, and a line on it or on why not."""

    there: bool
    usable: bool
    about: str


def find_gpu(kind: str = "cuda") -> Found:
    """What `pick` would make of the GPU of a kind, cuda or xpu."""
    from qrun.backends import cuda_device, xpu_device

    device = xpu_device if kind == "xpu" else cuda_device
    try:
        return Found(there=True, usable=True, about=device.summary())
    except BackendError as error:
        return Found(there=device.is_there(), usable=False, about=str(error).removesuffix(f", {device.ELSE}"))


def describe_gpu() -> str:
    """The GPU that `pick` uses, in a line; where it uses none, why."""
    all_kinds = [find_gpu(kind) for kind in GPUS]
    for found in all_kinds:
        if found.usable:
            return found.about
    return f"none used: {next((found for found in all_kinds if found.there), all_kinds[0]).about}"


def allocation_limit(device: str) -> int | None:
    """The most bytes that a device allocates at once, if it has such a limit. Raises BackendError as `pick` does."""
    if device != "xpu":
        return None
    from qrun.backends.xpu_device import find_xpu

    return find_xpu().most_bytes


def placed_bytes(form: "Format", shape: tuple[int, ...]) -> int:
    """Bytes of a weight as an Intel GPU's kernels read it."""
    from qrun.backends import xpu_matrix

    return xpu_matrix.placed_bytes(form, shape)
