"""Backends by name. The only place that names the device modules, and it imports them when asked, not before."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qrun.errors import BackendError

if TYPE_CHECKING:
    from qrun.backends.base import Backend

DEVICES = ("auto", "cpu", "cuda", "xpu")


def pick(
    device: str = "auto", *, threads: int | None = None, progress: Callable[[str], None] | None = None
) -> "Backend":
    """The backend for a device name; ``auto`` is the GPU where one can be used, else the CPU.

    ``progress`` is told, in a line, why a GPU that is there is not used. Raises BackendError, saying what is missing,
    where a device that was asked for by name cannot be used.
    """
    if device not in DEVICES:
        raise BackendError(f"unknown device {device!r}: use one of {', '.join(DEVICES)}")
    if device == "xpu":
        raise BackendError("device 'xpu' has no backend in this release yet: use --device cpu")
    if device != "cpu":
        from qrun.backends.cuda_device import find_card, is_there

        try:
            card = find_card()
        except BackendError as error:
            if device == "cuda":
                raise
            if progress is not None and is_there():
                progress(f"on the CPU, for the GPU cannot be used: {error}")
        else:
            from qrun.backends.cuda import CUDABackend

            return CUDABackend(card, progress=progress)
    from qrun.backends.cpu import CPUBackend

    return CPUBackend(threads=threads, progress=progress)


@dataclass(frozen=True)
class Found:
    """Whether there is a GPU that the user has not hidden, whether it can be used, and a line on it or on why not."""

    there: bool
    usable: bool
    about: str


def find_gpu() -> Found:
    """What `pick` would make of the GPU."""
    from qrun.backends.cuda_device import ELSE, is_there, summary

    try:
        return Found(there=True, usable=True, about=summary())
    except BackendError as error:
        return Found(there=is_there(), usable=False, about=str(error).removesuffix(f", {ELSE}"))


def describe_gpu() -> str:
    """The GPU that `pick` uses, in a line; where it uses none, why."""
    found = find_gpu()
    return found.about if found.usable else f"none used: {found.about}"
