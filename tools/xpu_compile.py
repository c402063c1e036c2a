"""The Triton kernels that Intel GPUs get, through Intel's own compilers, on a machine that has no such GPU.

    python -m tools.xpu_compile [--only SUBSTRING ...] [--ocloc FILE] [--devices acm-g10,pvc] [--driver VERSION]
        [--json FILE]

To SPIR-V with the `triton-xpu` of the environment (`pip install --no-deps triton-xpu`, which takes the place of the
plain triton), for a GPU with matrix engines and for one without. Where there is an `ocloc`, which comes with Intel's
OpenCL driver, also to machine code, of which it tells how many registers were spilled. Ends with code 1, a line for
each on stderr, if anything does not compile; with 2 if there is nothing to compile or to compile with.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

from qrun.kernels.gpu_aot import Variant

REACHED: Final = {
    "xpu_gemv": ("",),
    "xpu_attention": ("",),
    "gpu_append": ("",),
    "gpu_norm": ("norm 16", "silu 16"),
}
"""Modules of kernels that the XPU backend launches, and parts of the names of those variants."""
ENGINES: Final = {"acm": False, "mtl": False, "pvc": True, "bmg": True, "lnl": True}
"""Whether devices, by the beginnings of their names, have matrix engines that Triton reaches."""
SPILLED: Final = re.compile(r"spilled around (\d+)")


@dataclass(frozen=True, kw_only=True)
class Native:
    """Machine code for a device: its file's bytes and the registers that it spills. ``error``: why there is none."""

    size: int = 0
    spilled: int = 0
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """One variant. Bytes of SPIR-V and of shared memory; ``error``: why there is none."""

    name: str
    spirv: int = 0
    shared: int = 0
    error: str | None = None
    native: dict[str, Native] = field(default_factory=dict[str, Native])


def prepare() -> None:
    """Make Intel's Triton compile without Intel's runtime, and read what newer versions' kernels are written with."""
    triton: Any = import_module("triton")
    compiler: Any = import_module("triton.backends").backends["intel"].compiler
    # What it would build with SYCL's headers only looks a device's name up, for ocloc to be asked about.
    nameless = SimpleNamespace(parse_device_arch=lambda architecture: "")  # pyright: ignore[reportUnknownLambdaType]
    compiler.__init__.__globals__["compile_module_from_src"] = lambda *_, **__: nameless  # pyright: ignore[reportUnknownLambdaType]
    if getattr(triton, "constexpr_function", None) is None:  # before 3.4
        triton.constexpr_function = _constexpr_function


def _constexpr_function(function: Callable[..., Any]) -> Callable[..., Any]:
    constexpr: Any = import_module("triton.language").constexpr

    def call(*arguments: Any) -> Any:
        return constexpr(function(*(a.value if isinstance(a, constexpr) else a for a in arguments)))

    return call


def properties(engines: bool) -> dict[str, object]:
    """What Triton asks of a device: Battlemage's or a Max's answers, or, without engines, an Arc A-series'."""
    return {
        "name": "xpu",
        "sub_group_sizes": [16, 32] if engines else [8, 16, 32],
        "max_work_group_size": 1024,
        "has_fp64": engines,
        "has_subgroup_matrix_multiply_accumulate": engines,
        "has_subgroup_2d_block_io": engines,
        "has_bfloat16_conversions": True,
    }


def spirv(variant: Variant, engines: bool) -> tuple[bytes, int]:
    """The variant's SPIR-V and its bytes of shared memory. Raises whatever Triton and LLVM object to."""
    names: list[str] = list(variant.kernel.arg_names)
    aligned = [name for name, kind in variant.types.items() if kind[0] == "*" or name in variant.multiples]
    source = import_module("triton.compiler").ASTSource(
        variant.kernel,
        {name: variant.types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in variant.constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    target = import_module("triton.backends.compiler").GPUTarget("xpu", properties(engines), 32)
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    made: Any = import_module("triton").compile(source, target=target, options=options)
    return made.asm["spv"], int(made.metadata.shared)


def native(code: bytes, ocloc: str, device: str) -> Native:
    """Machine code of it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.spv"
        file.write_bytes(code)
        command = [ocloc, "compile", "-file", file, "-spirv_input", "-device", device, "-out_dir", f"{folder}/out"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        told = done.stdout + done.stderr
        made = list(Path(folder).glob("out/*.bin"))
        if done.returncode or not made:
            reasons = re.findall(r"error: (.*)", told, re.IGNORECASE) or told.strip().splitlines()[-1:]
            return Native(error=reasons[0] if reasons else f"ocloc ends with {done.returncode}")
        return Native(size=made[0].stat().st_size, spilled=max(map(int, SPILLED.findall(told)), default=0))


def compiled(variant: Variant, ocloc: str | None, devices: Sequence[str]) -> Compiled:
    """The variant through everything there is."""
    found: dict[bool, bytes] = {}
    shared = 0
    for engines in (False, True):
        try:
            found[engines], shared = spirv(variant, engines)
        except Exception as error:  # whatever Triton and LLVM object to
            return Compiled(name=variant.name, error=_reason(error))
    each = {device: native(found[engines_of(device)], ocloc, device) for device in devices} if ocloc else {}
    return Compiled(name=variant.name, spirv=len(found[True]), shared=shared, native=each)


def engines_of(device: str) -> bool:
    """Whether Triton reaches matrix engines there. Raises KeyError for devices it knows nothing of."""
    return ENGINES[device.split("-")[0]]


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__


def table(rows: Sequence[Compiled], devices: Sequence[str]) -> str:
    """A line a variant."""
    room = max(len(row.name) for row in rows) + 1
    heads = "".join(f"{device:>10}{'spilled':>8}" for device in devices)
    lines = [f"{'kernel':<{room}}{'SPIR-V':>8}{'shared':>7}{heads}"]
    for row in rows:
        if row.error is not None:
            lines.append(f"{row.name:<{room}}  does not compile")
            continue
        each = [row.native[device] for device in devices]
        cells = "".join(f"{'-':>10}{'-':>8}" if it.error else f"{it.size:>10}{it.spilled:>8}" for it in each)
        lines.append(f"{row.name:<{room}}{row.spirv:>8}{row.shared:>7}{cells}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.xpu_compile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[""], metavar="SUBSTRING", help="only names with one of these")
    parser.add_argument("--ocloc", default=shutil.which("ocloc"), metavar="FILE", help="Intel's offline compiler")
    parser.add_argument("--devices", default="acm-g10,pvc", help="what ocloc compiles for, as it calls them")
    parser.add_argument("--driver", metavar="VERSION", help="the version of ocloc's package, for the record")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    options = parser.parse_args(arguments)
    devices: list[str] = options.devices.split(",") if options.ocloc else []
    if unknown := [device for device in devices if device.split("-")[0] not in ENGINES]:
        parser.error(f"--devices {','.join(unknown)}: names begin with one of {', '.join(ENGINES)}")
    os.environ.pop("TRITON_INTERPRET", None)
    try:
        prepare()
    except (ImportError, KeyError):
        parser.error("no triton-xpu here: pip install --no-deps triton-xpu")
    chosen: list[Variant] = [
        variant
        for module, parts in REACHED.items()
        for variant in import_module(f"qrun.kernels.{module}").variants()
        if any(part in variant.name for part in parts) and any(part in variant.name for part in options.only)
    ]
    if not chosen:
        parser.error(f"no variant has {' or '.join(options.only)!r} in its name")
    rows = [compiled(variant, options.ocloc, devices) for variant in chosen]
    print(table(rows, devices))
    if options.json is not None:
        options.json.write_text(json.dumps(_facts(rows, devices, options.driver), indent=1) + "\n", encoding="utf-8")
    wrong = [f"{row.name}: {row.error}" for row in rows if row.error is not None]
    wrong += [
        f"{row.name}, {device}: {it.error}" for row in rows for device, it in row.native.items() if it.error is not None
    ]
    print(f"{len(rows)} kernels, {len(wrong)} failures")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


def _facts(rows: Sequence[Compiled], devices: Sequence[str], driver: str | None) -> dict[str, object]:
    return {
        "triton-xpu": version("triton-xpu"),
        "driver": driver,
        "devices": list(devices),
        "kernels": [asdict(row) for row in rows],
    }


if __name__ == "__main__":
    sys.exit(main())
