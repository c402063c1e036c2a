"""The IPEX tier's kernels on IPEX's own CPU build, against qrun's values: no Intel GPU is needed, and none is measured.

    python -m venv ipex
    ipex/bin/pip install torch==2.8.0 intel-extension-for-pytorch==2.8.0 numpy platformdirs
    ipex/bin/python -m tools.ipex_check [--json FILE]

Runs from the source tree. Times are of a CPU, on which IPEX is for checking only. Ends with code 1 where IPEX is not
there, or a kernel that the tier takes is wrong.

The layer that both builds of IPEX have heeds zeros on the CPU alone, so weights with zeros run on another operation on
a GPU. That one, and what the same layer computes on a GPU, is tried only there, when a model is loaded.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Final

import torch

from tools.gpu_check_tree import use

if TYPE_CHECKING:
    from torch import Tensor

    from qrun.backends.xpu_device import XPUCard

BOUND: Final = 4e-3
"""Relative error that is right: operands and result rounded to BF16, as when a model is loaded."""
TOKENS: Final = (1, 8, 40)
ROWS: Final = (256, 264)
"""A multiple of 32, and one that is none."""
COLUMNS: Final = 512
GROUPS: Final = (32, 64, 128)
HALVES: Final = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one kernel gave: relative errors for each of TOKENS, milliseconds for one token. taken: the tier uses it."""

    kernel: str
    dtype: str
    weight: str
    rows: int
    taken: bool
    errors: tuple[float, ...]
    milliseconds: float

    @property
    def right(self) -> bool:
        return all(error <= BOUND for error in self.errors)

    @property
    def verdict(self) -> str:
        if self.taken:
            return "right" if self.right else "WRONG"
        return "not taken" if self.right else "wrong, and not taken"


def measure(
    call: "Callable[[Tensor], Tensor]", wanted: "Callable[[Tensor], Tensor]", inputs: "Sequence[Tensor]"
) -> tuple[tuple[float, ...], float]:
    """Relative errors for the inputs, and the median time of a call for the first."""
    errors: list[float] = []
    for x in inputs:
        y, right = call(x).float(), wanted(x)
        error = float(((y - right).square().sum() / right.square().sum()).sqrt())
        errors.append(float(f"{error:.3g}"))
    times: list[float] = []
    for _ in range(7):
        begun = time.perf_counter()
        call(inputs[0])
        times.append(1e3 * (time.perf_counter() - begun))
    return tuple(errors), round(median(times), 3)


def products(card: "XPUCard") -> list[Row]:
    """Each of the tier's kernels on weights of every kind, those that it does not take for their rows among them."""
    from qrun.backends.xpu_ipex import LINEARS
    from qrun.backends.xpu_matrix import expand, place
    from qrun.formats import AffineFormat

    found: list[Row] = []
    random = torch.Generator().manual_seed(0)
    inputs = [torch.randn(tokens, COLUMNS, generator=random).to(card.half) for tokens in TOKENS]
    for symmetric in (True, False):
        for group in GROUPS:
            for n in ROWS:
                values = torch.randn(n, COLUMNS, generator=random) / 16
                form = AffineFormat(bits=4, group=group, symmetric=symmetric)
                placed = place(form.quantize(values), card.half)
                weight = expand(placed, 0, n, torch.float32)
                for kernel in LINEARS[0 if symmetric else 1 :]:
                    call = kernel.bind(placed, card, "16")
                    with torch.no_grad():
                        errors, took = measure(call, lambda x, weight=weight: x.float() @ weight.t(), inputs)
                    found.append(
                        Row(
                            kernel=kernel.name,
                            dtype=str(card.half).removeprefix("torch."),
                            weight=f"int4 g{group}{'' if symmetric else ' zeros'}",
                            rows=n,
                            taken=kernel.takes(placed, card, "16"),
                            errors=errors,
                            milliseconds=took,
                        )
                    )
    return found


def norms(card: "XPUCard") -> Row:
    """RMSNorm as the blocks of a model use it: float32 in, half out."""
    from qrun.backends.xpu_ipex import available, rms_norm
    from qrun.kernels import reference

    random = torch.Generator().manual_seed(0)
    scale = torch.rand(COLUMNS, generator=random) + 0.5
    inputs = [torch.randn(tokens, COLUMNS, generator=random) for tokens in TOKENS]
    with torch.no_grad():
        errors, took = measure(
            lambda x: rms_norm(x, scale, 1e-5, card.half), lambda x: reference.rms_norm(x, scale, 1e-5), inputs
        )
    return Row(
        kernel="ipex rms_norm",
        dtype=str(card.half).removeprefix("torch."),
        weight="float32",
        rows=COLUMNS,
        taken=available(card),
        errors=errors,
        milliseconds=took,
    )


def table(rows: Sequence[Row]) -> str:
    lines = [f"{'kernel':<21}{'dtype':<10}{'weight':<16}{'rows':>5}  {'error M=1, 8, 40':<27}{'ms M=1':>7}  verdict"]
    for row in rows:
        errors = "".join(f"{error:<9.1e}" for error in row.errors)
        head = f"{row.kernel:<21}{row.dtype:<10}{row.weight:<16}{row.rows:>5}"
        lines.append(f"{head}  {errors}{row.milliseconds:>7.2f}  {row.verdict}")
    return "\n".join(lines)


def versions() -> dict[str, str]:
    names = ("torch", "intel-extension-for-pytorch", "numpy")
    found = {"python": platform.python_version(), "system": platform.system(), "machine": platform.machine()}
    return found | {name: version(name) for name in names} | {"threads": str(torch.get_num_threads())}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.ipex_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write versions and results there")
    options = parser.parse_args(arguments)
    use()
    torch.set_num_threads(1)  # of what is this small, more wait for each other longer than they work
    from qrun.backends.xpu_device import XPUCard
    from qrun.backends.xpu_ipex import why_not

    cards = [
        XPUCard(
            device=torch.device("cpu"), name="IPEX on the CPU", driver="0", memory=1 << 30, integrated=False, half=half,
            real=False,
        )
        for half in HALVES
    ]  # fmt: skip
    if reason := why_not(cards[0]):
        print(f"ipex_check: {reason}", file=sys.stderr)
        return 1
    rows = [row for card in cards for row in (*products(card), norms(card))]
    print(table(rows))
    taken = [row for row in rows if row.taken]
    wrong = sum(not row.right for row in taken)
    kernels = {row.kernel for row in rows}
    unused = sorted(kernels - {row.kernel for row in taken})
    print(f"\n{len(taken)} of {len(rows)} are taken, {wrong} of them wrong; bound {BOUND}")
    if unused:
        print(f"ipex_check: nothing is taken by {', '.join(unused)}", file=sys.stderr)
    if options.json is not None:
        record = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "bound": BOUND,
            "tokens": TOKENS,
            "columns": COLUMNS,
            "rows": [asdict(row) | {"verdict": row.verdict} for row in rows],
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 1 if wrong or unused else 0


if __name__ == "__main__":
    sys.exit(main())
