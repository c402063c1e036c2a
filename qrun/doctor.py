"""Everything that can be wrong with an installation, one check after another. It prints nothing, and changes nothing
but the compiled kernels that any start leaves."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qrun.doctor_check import Check, Progress, first_line
from qrun.doctor_environment import environment
from qrun.doctor_machine import machine, usable_cores
from qrun.doctor_versions import Package, installed, torch_version, versions
from qrun.errors import BackendError
from qrun.paths import cache_dir, config_dir, state_dir

if TYPE_CHECKING:
    from qrun.backends.base import Backend

HUB: Final = "hub cache"
REINSTALL: Final = "install qrun in a new environment: python -m venv, then pip install"


def examine(
    device: str = "auto",
    *,
    threads: int | None = None,
    xpu_tier: str | None = None,
    progress: Progress = lambda what, done, total: None,
    encoding: str = "utf-8",
    values: Mapping[str, str] = os.environ,
    packages: Mapping[str, Package] | None = None,
    load_torch: Callable[[], Any] | None = None,
    root: Path = Path("/"),
) -> Iterator[Check]:
    """Every check, cheap ones first; those that need torch only if it comes up, kernels only if the device can be used.

    Args:
        device: auto, cpu, cuda or xpu: whose kernels are tried.
        xpu_tier: whose kernels come first on an Intel GPU.
        progress: told what is tried, at what takes its time.
        encoding: the terminal's.
        values: the environment; packages: what is installed; load_torch: what imports torch; root: of the file system.
    """
    packages = installed() if packages is None else packages
    hub = hub_cache(values)
    places = {"cache": cache_dir(), "state": state_dir(), "config": config_dir(), HUB: hub}
    yield from machine(places, root=root, encoding=encoding)
    yield from downloads(hub)
    yield from environment(values, cores=usable_cores(), torch=torch_version(packages))
    yield from versions(packages)
    progress("importing torch", 0, 0)
    from qrun import doctor_devices as devices  # which needs no torch, but what follows does

    torch = devices.torch_comes_up(load_torch) if load_torch else devices.torch_comes_up()
    yield torch
    if torch.status == "failure":
        return
    yield devices.memory(root)
    yield devices.cpu()
    yield devices.cuda(wanted=device in ("auto", "cuda"), root=root)
    yield from devices.xpu(wanted=device == "xpu", root=root)
    yield from working(chooser(device, threads, progress, xpu_tier), progress)


def chooser(
    device: str, threads: int | None, progress: Progress, xpu_tier: str | None = None
) -> "Callable[[], Backend]":
    """What gives a backend of the device, a new one each time, as each serves one model."""

    def make() -> "Backend":
        from qrun.backends import pick

        return pick(device, threads=threads, xpu_tier=xpu_tier, progress=lambda what: progress(what, 0, 0))

    return make


def working(make: "Callable[[], Backend]", progress: Progress) -> Iterator[Check]:
    """Everything that runs on a backend: kernels, sampling, the embedded model."""
    progress("opening the device", 0, 0)
    try:
        backend = make()
    except BackendError as error:
        what, _, fix = str(error).rpartition(": ")
        yield Check(section="devices", name="chosen", status="failure", detail=what, fix=fix)
        return
    except Exception as error:  # of a library that does not come up
        yield Check(section="devices", name="chosen", status="failure", detail=first_line(error), fix=REINSTALL)
        return
    yield Check(section="devices", name="chosen", status="ok", detail=f"{backend.name}: {backend.description}")
    from qrun.doctor_kernels import kernels
    from qrun.doctor_model import model
    from qrun.doctor_tiers import tiers

    yield from kernels(backend, progress)
    yield from tiers(backend.trials)
    del backend
    yield from model(make, progress)


def hub_cache(values: Mapping[str, str]) -> Path:
    """Where the hub's client keeps models, by its own rules."""
    if values.get("HF_HUB_CACHE"):
        return Path(values["HF_HUB_CACHE"]).expanduser()
    home = values.get("HF_HOME") or f"{values.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    return Path(home).expanduser() / "hub"


def downloads(hub: Path) -> Iterator[Check]:
    """Downloads that were broken off: the client begins anew and leaves them."""
    left = [path for path in hub.glob("models--*/blobs/*.incomplete") if path.is_file()]
    if left:
        size = sum(path.stat().st_size for path in left)
        yield Check(
            section="machine", name=HUB, status="note",
            detail=f"{len(left)} unfinished downloads take {size / 1e9:.1f} GB",
            fix=f"delete them, unless one is running: {hub}/models--*/blobs/*.incomplete",
        )  # fmt: skip
