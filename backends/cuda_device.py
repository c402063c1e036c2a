"""The NVIDIA card that is there, or in one line why there is none to be used. It knows no model and no kernel."""

import os
import re
import shutil
import sysconfig
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from qrun.errors import BackendError

LEAST = (8, 0)
"""The compute capability the kernels are compiled for: Ampere, with bfloat16 tensor cores."""
LEAST_TRITON = (3, 6)
ELSE = "or use --device cpu"
"""How a message ends that names another remedy first."""
HIDDEN = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES with which people say: no GPU."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """A device and what follows from it. half: what its tensor cores multiply; captures: it records CUDA graphs."""

    device: torch.device
    name: str
    capability: tuple[int, int]
    processors: int
    memory: int
    half: torch.dtype = torch.bfloat16
    captures: bool = True

    @property
    def has_fp8(self) -> bool:
        """Whether its tensor cores multiply e4m3 (Ada, Hopper and later)."""
        return self.captures and self.capability >= (8, 9)

    @property
    def description(self) -> str:
        major, minor = self.capability
        return f"{self.name}, {self.memory / 1e9:.0f} GB, sm_{major}{minor}"


def find_card() -> Card:
    """The current CUDA device.

    Raises BackendError where there is none, it is too old or taken, or a library is missing; the message says what to
    do.
    """
    if torch.version.cuda is None:
        raise BackendError(
            f"torch {torch.__version__} is built without CUDA: install the CUDA build from pytorch.org, {ELSE}"
        )
    cuda: Any = torch.cuda
    with warnings.catch_warnings(record=True) as said:  # of drivers and of old cards, which is said better here
        warnings.simplefilter("always")
        if not torch.cuda.is_available():
            raise BackendError(_why_none([str(warning.message) for warning in said]))
        try:
            device = torch.device("cuda", torch.cuda.current_device())
            found = cuda.get_device_properties(device)
        except (RuntimeError, torch.cuda.DeferredCudaCallError) as error:
            raise BackendError(_why_not("the NVIDIA GPU", error)) from error
        if (found.major, found.minor) < LEAST:
            raise BackendError(
                f"{found.name} is sm_{found.major}{found.minor}; qrun's kernels need sm_80 or later (Ampere, 2020): "
                "use --device cpu"
            )
        _check_triton()
        try:
            torch.zeros(1, device=device)
        except RuntimeError as error:
            raise BackendError(_why_not(found.name, error)) from error
    return Card(
        device=device,
        name=found.name,
        capability=(found.major, found.minor),
        processors=found.multi_processor_count,
        memory=found.total_memory,
    )


def is_there(devices: Path = Path("/dev")) -> bool:
    """Whether this machine shows an NVIDIA GPU, usable or not, that the user has not hidden on purpose."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in HIDDEN:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return any(devices.glob("nvidia[0-9]*")) or torch.cuda.is_available()


def summary(driver: Path = Path("/proc/driver/nvidia/version")) -> str:
    """The card, its memory and what runs it, in a line. Raises BackendError as `find_card` does."""
    card = find_card()
    free, total = torch.cuda.mem_get_info(card.device)
    parts = [
        card.name,
        f"{free / 1e9:.1f} GB free of {total / 1e9:.0f} GB",
        f"sm_{card.capability[0]}{card.capability[1]}",
        f"CUDA {torch.version.cuda}",
    ]
    if driver.exists():
        number = re.search(r"Kernel Module.*?(\d+\.[\d.]+)", driver.read_text())
        parts += [f"driver {number[1]}"] if number else []
    return ", ".join([*parts, f"triton {triton_version() or 'unknown'}"])


def triton_version() -> str | None:
    """Of the package, as it is installed; none where that has another name."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def _check_triton() -> None:
    """Raises BackendError unless the kernels' compiler is there, new enough, and comes up."""
    wanted = ".".join(map(str, LEAST_TRITON))
    if find_spec("triton") is None:
        raise BackendError(
            f"the CUDA backend needs triton, which is not installed: pip install 'triton>={wanted}' (a CUDA torch "
            f"brings it along), {ELSE}"
        )
    have = triton_version()
    number = re.match(r"(\d+)\.(\d+)", have or "")
    if number is not None and (int(number[1]), int(number[2])) < LEAST_TRITON:
        raise BackendError(
            f"triton {have} is too old, qrun's kernels need {wanted} or later: pip install -U 'triton>={wanted}' with "
            f"a torch that goes with it, {ELSE}"
        )
    try:
        import_module("qrun.kernels.gpu_bits")
    except Exception as error:  # whatever a broken installation raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BackendError(
            f"triton is installed but cannot be imported ({reason}): pip install --force-reinstall triton, {ELSE}"
        ) from error
    missing = _missing_for_triton()
    if missing:
        raise BackendError(
            f"triton compiles a small C module when it first runs and finds no {missing}: install gcc and Python's "
            f"headers (apt install gcc python3-dev), {ELSE}"
        )


def _missing_for_triton() -> str:
    """What triton would look for in vain; nothing where it has compiled before, wherever that was from."""
    if Path(os.environ.get("TRITON_CACHE_DIR") or "~/.triton/cache").expanduser().exists():
        return ""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "C compiler"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as triton does
    return "" if (Path(sysconfig.get_paths(scheme)["include"]) / "Python.h").exists() else "Python.h"


def _why_none(said: Sequence[str]) -> str:
    """Why torch sees no GPU, from what it warned of, or from what hides it."""
    about = " ".join(said)
    old = re.search(r"driver on your system is too old \(found version (\d+)\)", about)
    if old is not None:
        knows = f"{int(old[1]) // 1000}.{int(old[1]) % 1000 // 10}"
        return (
            f"the NVIDIA driver is too old: it knows CUDA up to {knows}, torch {torch.__version__} needs "
            f"{torch.version.cuda}: update the driver, {ELSE}"
        )
    if about:
        reason = about.removeprefix("CUDA initialization: ").split(" (Triggered")[0].rstrip(".")
        return f"the NVIDIA GPU cannot be used ({_line(reason)}): see nvidia-smi, {ELSE}"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f"CUDA_VISIBLE_DEVICES={visible!r} leaves no GPU: unset it or name one of nvidia-smi's, {ELSE}"
    return f"no NVIDIA GPU is to be seen, or its driver is missing: see nvidia-smi, install the driver, {ELSE}"


def _why_not(name: str, error: Exception) -> str:
    """Why a GPU that torch sees does no work now, from what its first allocation raised."""
    text = str(error)
    if "out of memory" in text:
        return f"{name} has no room for qrun, {_room()}; other programs hold the rest: see nvidia-smi, end one, {ELSE}"
    if "busy or unavailable" in text:
        return f"{name} is taken by another program (exclusive mode): see nvidia-smi, end that program, {ELSE}"
    if "no kernel image" in text:
        return f"torch {torch.__version__} has no kernels for {name}: install a torch built for it, {ELSE}"
    return f"{name} cannot be used now ({_line(text)}): see nvidia-smi, {ELSE}"


def _room() -> str:
    """What is free of how much, as far as the card still answers."""
    try:
        free, total = torch.cuda.mem_get_info()
    except RuntimeError:
        return "nothing is free"
    return f"{free / 1e6:.0f} MB are free of {total / 1e9:.0f} GB"


def _line(text: str) -> str:
    return (text.splitlines() or ["no reason given"])[0]
