"""Backends by name. The only place that names the device modules, and it imports them when asked, not before."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from qrun.errors import BackendError

if TYPE_CHECKING:
    from qrun.backends.base import Backend

DEVICES = ("auto", "cpu", "cuda", "xpu")


def pick(
    device: str = "auto", *, threads: int | None = None, progress: Callable[[str], None] | None = None
) -> "Backend":
    """The backend for a device name. Raises BackendError, saying what is missing, where there is none."""
    if device not in DEVICES:
        raise BackendError(f"unknown device {device!r}: use one of {', '.join(DEVICES)}")
    if device == "xpu":
        raise BackendError("device 'xpu' has no backend in this release yet: use --device cpu")
    if device == "cuda" or (device == "auto" and _has_cuda()):
        from qrun.backends.cuda_device import find_card

        try:
            card = find_card()
        except BackendError as error:
            if device == "cuda":
                raise
            say(f"not on the GPU: {error}")
        else:
            from qrun.backends.cuda import CUDABackend

            return CUDABackend(card, progress=progress)
    from qrun.backends.cpu import CPUBackend

    return CPUBackend(threads=threads, progress=progress)
