"""The Intel GPU that is there, or in one line why there is none to be used. It knows no model and no kernel."""

import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qrun.errors import BackendError
from qrun.free import available
from qrun.resident import ran_out

ELSE = "or use --device cpu"
"""How a message ends that names another remedy first."""
WHEELS = "https://download.pytorch.org/whl/xpu"
MOST_BYTES = (4 << 30) - (16 << 20)
"""The largest allocation on the older architectures: 4 GiB, less what the allocator rounds up and the driver keeps."""
MODERN_GROUP = 16
"""The smallest sub-group of Xe-HPC, Xe2 and later, whose matrix engines Triton reaches and whose best type is BF16. The
older ones, Xe-HPG (Arc A-series, Flex) and Xe-LPG (Meteor Lake, Arrow Lake), also have groups of 8."""
DISCRETE = (range(0x0B60, 0x0C00), range(0x4F80, 0x4F89), range(0x5690, 0x56C3), range(0xE200, 0xE300))
"""PCI numbers of cards with memory of their own: Max, Arc A-series with Flex, Arc B-series."""
INTEGRATED = (range(0x6420, 0x64C0), range(0x7D40, 0x7DE0), range(0xB080, 0xB0C0))
"""Of those without that torch is made for: Lunar Lake, Meteor and Arrow Lake, Panther Lake."""
SOURCED = ("SETVARS_COMPLETED", "CMPLR_ROOT")
"""What oneAPI's setvars.sh leaves in a shell; ONEAPI_ROOT is there on Windows without it."""
CHOOSERS = ("ONEAPI_DEVICE_SELECTOR", "ZE_AFFINITY_MASK")
OLD = ("UNSUPPORTED", "INVALID_BINARY", "BUILD_FAILURE", "LINK_FAILURE", "INVALID_KERNEL_NAME", "incompatible with all")
"""What the runtime's errors speak of where a driver is older than what torch was built with."""


@dataclass(frozen=True, kw_only=True)
class XPUCard:
    """A device and what follows from it. half: what its matrix engines multiply best; dots: whether Triton reaches
    them; processors: Xe-cores; most_bytes: the largest allocation, if there is a limit; real: not a CPU that stands in
    for it."""

    device: torch.device
    name: str
    driver: str
    memory: int
    integrated: bool
    half: torch.dtype = torch.bfloat16
    dots: bool = True
    processors: int = 8
    most_bytes: int | None = None
    real: bool = True

    @property
    def description(self) -> str:
        where = "shared memory" if self.integrated else f"{self.memory / 1e9:.0f} GB"
        return f"{self.name}, {where}, driver {self.driver}"


def find_xpu(root: Path = Path("/")) -> XPUCard:
    """The current Intel GPU.

    Raises BackendError where there is none, its driver is missing or old, another runtime is in the way, or it has no
    room; the message says what to do.
    """
    if torch.version.xpu is None:
        raise BackendError(
            f"torch {torch.__version__} is built without Intel GPUs: pip install torch --index-url {WHEELS}, {ELSE}"
        )
    xpu: Any = torch.xpu
    with warnings.catch_warnings():  # of the runtime's, on drivers and on devices that do not matter here
        warnings.simplefilter("ignore")
        try:
            if not xpu.is_available():
                raise BackendError(_why_none(root))
            device = torch.device("xpu", xpu.current_device())
            found = xpu.get_device_properties(device)
        except RuntimeError as error:
            if "No XPU devices" in str(error):
                raise BackendError(_why_none(root)) from error
            raise BackendError(_why_not("the Intel GPU", error)) from error
        try:
            torch.zeros(1, device=device)
            xpu.synchronize()
        except RuntimeError as error:
            raise BackendError(_why_not(found.name, error)) from error
    return card_of(device, found)


def card_of(device: torch.device, found: Any) -> XPUCard:
    """What follows from a device's properties; of one that says little, what no device does wrong."""
    modern = min(found.sub_group_sizes, default=0) >= MODERN_GROUP
    # Its flag for the matrix engines is no help: it is off wherever ocloc, a compiler, is not installed.
    integrated = not any(found.device_id in ids for ids in DISCRETE)
    return XPUCard(
        device=device,
        name=found.name,
        driver=found.driver_version,
        memory=found.total_memory,
        integrated=bool(getattr(found, "is_integrated_gpu", integrated)),  # new in torch 2.13
        half=torch.bfloat16 if modern else torch.float16,
        dots=modern,
        processors=int(getattr(found, "gpu_subslice_count", 0)) or 8,
        most_bytes=None if modern else MOST_BYTES,
    )


def is_there(root: Path = Path("/")) -> bool:
    """Whether this machine shows an Intel GPU that torch is made for, usable or not, and the user has not chosen
    others on purpose. The small ones of older processors do not count."""
    if _sees_one():
        return True
    if any(name in os.environ for name in CHOOSERS):
        return False
    return any(number in ids for number in _numbers(root) for ids in (*DISCRETE, *INTEGRATED))


def summary() -> str:
    """The card, its memory and what runs it, in a line. Raises BackendError as `find_xpu` does."""
    card = find_xpu()
    room = f"{available('xpu') / 1e9:.1f} GB free of {card.memory / 1e9:.0f} GB"
    parts = [card.name, f"{room} shared with the CPU" if card.integrated else room, f"driver {card.driver}"]
    return ", ".join([*parts, f"SYCL {torch.version.xpu}"])


def _sees_one() -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.version.xpu is not None and torch.xpu.is_available()
        except RuntimeError:
            return False


def _numbers(root: Path) -> Iterator[int]:
    """The PCI device numbers of Intel's displays, as Linux lists them."""
    for place in sorted(root.glob("sys/bus/pci/devices/*")):
        try:
            kind, maker, model = ((place / name).read_text().strip() for name in ("class", "vendor", "device"))
        except OSError:
            continue
        if kind.startswith("0x03") and maker == "0x8086":
            yield int(model, 16)


def _why_none(root: Path) -> str:
    """Why torch sees no Intel GPU: what hides it, or what is missing."""
    if sourced := _sourced():
        return f"torch sees no Intel GPU, {sourced}"
    for name in CHOOSERS:
        if name in os.environ:
            return f"{name}={os.environ[name]!r} leaves no Intel GPU: unset it, {ELSE}"
    if sys.platform == "win32":
        return f"torch sees no Intel GPU: install Intel's Arc graphics driver, the newest one, {ELSE}"
    nodes = sorted(root.glob("dev/dri/renderD*"))
    if not nodes and (root / "dev/dxg").exists():
        return (
            "torch sees no Intel GPU under WSL: install Intel's graphics driver in Windows, and libze-intel-gpu1 and "
            f"intel-opencl-icd here, {ELSE}"
        )
    if not nodes:
        return (
            "there is no /dev/dri/renderD*, so no Intel GPU, or its kernel driver (i915 or xe) is not loaded: install "
            f"it, in a container add docker run --device /dev/dri, {ELSE}"
        )
    if not any(os.access(node, os.R_OK | os.W_OK) for node in nodes):
        return f"/dev/dri/{nodes[0].name} may not be opened: sudo usermod -aG render $USER, then log in again, {ELSE}"
    return (
        "torch sees no Intel GPU: it has none that it supports, or its driver is missing or too old: install "
        f"libze-intel-gpu1 and intel-opencl-icd, {ELSE}"
    )


def _why_not(name: str, error: Exception) -> str:
    """Why a GPU that torch sees does no work now, from what it raised."""
    text = str(error)
    if sourced := _sourced():
        return f"{name} cannot be used ({_line(text)}), {sourced}"
    if ran_out(error) is not None:
        return f"{name} has no room for qrun; other programs hold its memory: end one, {ELSE}"
    if any(word in text for word in OLD):
        return (
            f"the driver of {name} is too old for torch {torch.__version__} ({_line(text)}): update Intel's graphics "
            f"driver, {ELSE}"
        )
    if "DEVICE_LOST" in text:
        return f"{name} was lost ({_line(text)}): restart the machine, update Intel's graphics driver, {ELSE}"
    return f"{name} cannot be used now ({_line(text)}): update Intel's graphics driver, see qrun doctor, {ELSE}"


def _sourced() -> str:
    """What to do where oneAPI's variables are set: its libraries take the place of those that torch was built with."""
    name = next((name for name in SOURCED if os.environ.get(name)), None)
    if name is None:
        return ""
    return (
        f"for oneAPI's setvars.sh was sourced ({name} is set) and its libraries break torch's own: start a shell "
        f"without it, {ELSE}"
    )


def _line(text: str) -> str:
    return (text.splitlines() or ["no reason given"])[0]
