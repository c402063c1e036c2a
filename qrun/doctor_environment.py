"""Environment variables that make qrun slow, wrong or silent, and what to do about each. It asks no device."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from qrun.doctor_check import Check, Status

NO: Final = ("", "0", "false", "off", "no")
FOREIGN: Final = {
    "CUDA": ("libcudart.so*", "libcublas.so*", "libcudnn.so*", "libnvrtc.so*"),
    "oneAPI": ("libsycl.so*", "libur_loader.so*", "libmkl_core.so*", "libiomp5.so*"),
}
"""Libraries that torch brings itself, and that others of the same name take the place of."""
CHOOSERS: Final = ("ONEAPI_DEVICE_SELECTOR", "ZE_AFFINITY_MASK")
INTEL: Final = (
    "ONEAPI_", "ZE_", "ZET_", "SYCL_", "UR_", "IGC_", "NEO", "OverrideDefaultFP64Settings", "TRITON_INTEL_",
    "PYTORCH_XPU_", "PYTORCH_ENABLE_XPU_",
)  # fmt: skip
"""How the names of variables begin that Intel's driver, compiler and runtime read, or torch for them."""
SOURCED: Final = ("SETVARS_COMPLETED", "CMPLR_ROOT")
OWN: Final = ("QRUN_CACHE_DIR", "QRUN_DEBUG", "QRUN_CONFIG")
"""Variables that are no options."""
SHADOWED: Final = ("torch", "triton", "numba", "numpy", "qrun", "safetensors", "tokenizers")

# Variable -> status, what it does where it is set to something, what to do. None shows its value.
SWITCHES: Final[Mapping[str, tuple[Status, str, str]]] = {
    "NUMBA_DISABLE_JIT": ("failure", "no CPU kernel can be compiled", "unset NUMBA_DISABLE_JIT"),
    "NUMBA_CPU_NAME": ("warning", "CPU kernels are compiled for another processor", "unset NUMBA_CPU_NAME"),
    "NUMBA_CPU_FEATURES": ("warning", "CPU kernels are compiled for another processor", "unset NUMBA_CPU_FEATURES"),
    "TRITON_INTERPRET": ("warning", "GPU kernels are interpreted, thousands of times slower", "unset TRITON_INTERPRET"),
    "CUDA_LAUNCH_BLOCKING": ("warning", "every GPU kernel is waited for", "unset CUDA_LAUNCH_BLOCKING"),
    "HF_HUB_OFFLINE": ("note", "nothing is downloaded, only what is in the hub cache is used", "unset HF_HUB_OFFLINE"),
    "LD_PRELOAD": ("note", "libraries are loaded before torch's own", "unset LD_PRELOAD if anything fails"),
}


def environment(values: Mapping[str, str], *, cores: int, torch: str | None) -> Iterator[Check]:
    """What is set and matters. ``cores``: that may be used; ``torch``: its version, with the build as in ``+xpu``."""
    found = [
        *_switches(values), *_threads(values, cores), *_libraries(values), *_oneapi(values, torch or ""), *_hub(values),
        *_paths(values), *_hidden(values), *_intel(values), *_options(values),
    ]  # fmt: skip
    yield from found or [_check("variables", "ok", "none is set that qrun stumbles over")]


def _check(name: str, status: Status, detail: str, fix: str = "") -> Check:
    return Check(section="environment", name=name, status=status, detail=detail, fix=fix)


def _switches(values: Mapping[str, str]) -> Iterator[Check]:
    for name, (status, detail, fix) in SWITCHES.items():
        if values.get(name, "").strip().lower() not in NO:
            yield _check(name, status, detail, fix)


def _threads(values: Mapping[str, str], cores: int) -> Iterator[Check]:
    """Pinning is inherited by qrun's own threads, which then share what the first one was given."""
    for name in ("OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY"):
        value = values.get(name, "").strip().lower()
        if value not in NO and "none" not in value and "disabled" not in value:
            yield _check(
                name, "warning", "OpenMP may pin this process, and with it all threads, to one core", f"unset {name}"
            )
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        first = values.get(name, "").split(",")[0].strip()
        if first.isdigit() and int(first) < cores:
            yield _check(
                name, "note", f"it is {first}, but qrun uses {cores} threads all the same: --threads sets them"
            )


def _libraries(values: Mapping[str, str]) -> Iterator[Check]:
    for place in filter(None, values.get("LD_LIBRARY_PATH", "").split(":")):
        for kind, patterns in FOREIGN.items():
            names = sorted({found.name.split(".")[0] for pattern in patterns for found in Path(place).glob(pattern)})
            if names:
                yield _check(
                    "LD_LIBRARY_PATH", "warning",
                    f"{place} has {kind} libraries ({', '.join(names)}) that replace torch's own",
                    "unset LD_LIBRARY_PATH, or take that directory out of it",
                )  # fmt: skip


def _oneapi(values: Mapping[str, str], torch: str) -> Iterator[Check]:
    """Two SYCL runtimes in one process crash or see no device."""
    if any(values.get(name) for name in SOURCED):
        detail = "oneAPI's setvars.sh was sourced in this shell"
        if "+xpu" in torch:
            yield _check(
                "oneAPI", "failure", f"{detail}, and torch {torch} brings another runtime", "start a shell without it"
            )
        else:
            yield _check("oneAPI", "note", f"{detail}; a torch for Intel GPUs would clash with it")


def _hub(values: Mapping[str, str]) -> Iterator[Check]:
    if values.get("HF_ENDPOINT"):
        yield _check("HF_ENDPOINT", "note", "models come from where it says, not from huggingface.co")


def _paths(values: Mapping[str, str]) -> Iterator[Check]:
    for place in filter(None, values.get("PYTHONPATH", "").split(":")):
        names = [name for name in SHADOWED if (Path(place) / name / "__init__.py").exists()]
        if names:
            yield _check(
                "PYTHONPATH", "warning", f"{place} has {', '.join(names)} of its own, which replace the installed ones",
                "unset PYTHONPATH",
            )  # fmt: skip


def _hidden(values: Mapping[str, str]) -> Iterator[Check]:
    """Devices that are left out on purpose, or once were."""
    if values.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles"):
        yield _check("CUDA_VISIBLE_DEVICES", "note", "it hides every NVIDIA GPU", "unset CUDA_VISIBLE_DEVICES")
    for name in CHOOSERS:
        if values.get(name):
            yield _check(
                name, "note", f"it is {values[name]}: it chooses which Intel devices are seen", f"unset {name}"
            )


def _intel(values: Mapping[str, str]) -> Iterator[Check]:
    """What changes how Intel's driver and compiler work. Values are shown: whoever reads a report needs them."""
    known = (*SOURCED, *CHOOSERS)
    found = [f"{name}={values[name]}" for name in sorted(values) if name.startswith(INTEL) and name not in known]
    if found:
        yield _check(
            "Intel GPUs", "note", f"{', '.join(found)}: their driver and compiler take them", "unset them if one fails"
        )


def _options(values: Mapping[str, str]) -> Iterator[Check]:
    names = sorted(name for name in values if name.startswith("QRUN_") and name not in OWN)
    if names:
        yield _check("options", "note", f"{', '.join(names)} set: every command takes them as given")
