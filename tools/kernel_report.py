"""What the GPU kernels compile to, on a machine that needs no GPU: registers, spills, shared memory, instructions.

    python -m tools.kernel_report [--arch 80,89,90,120] [--only SUBSTRING ...] [--json FILE] [--jobs N]

Compiles every `Variant` that a kernels/gpu_*.py lists and reads the machine code. `insn` is how many instructions the
main loop spends on a weight: what a GPU can issue is counted in these as much as in bytes. Ends with code 1, a line for
each, if kernels are not listed or do not compile, spill registers or take more instructions a weight on sm_90 than
their limit; with 2 for an unknown architecture or if nothing matches.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Final

SHARED: Final = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376}
"""Bytes of shared memory that one program can have, by compute capability."""
GATE: Final = 90
"""The architecture whose instruction limits are held: the one with the least time for a weight."""
WIDTH: Final = 120
KERNELS: Final = Path(__file__).resolve().parents[1] / "kernels"

if os.environ.pop("TRITON_INTERPRET", None) and "triton" in sys.modules:
    raise SystemExit("kernel_report: triton was imported with TRITON_INTERPRET set and compiles nothing: start anew")

from qrun.kernels.gpu_aot import Variant  # noqa: E402 - kernels are decorated at import, after the line above
from tools.kernel_sass import Measured, load, measure, variants  # noqa: E402

Row = tuple[Variant, dict[int, Measured]]


def discover(only: Sequence[str], module: str | None = None) -> tuple[list[tuple[str, int]], list[str]]:
    """(module, index) of every variant with one of ``only`` in its name, of all kernel modules or of one file; and a
    line for each module that cannot say what it has."""
    chosen: list[tuple[str, int]] = []
    broken: list[str] = []
    for name in [module] if module else [f"qrun.kernels.{path.stem}" for path in sorted(KERNELS.glob("gpu_*.py"))]:
        try:
            listed = variants(name) if getattr(load(name), "variants", None) is not None else ()
        except Exception as error:  # it is somebody's module: anything
            broken.append(f"{name}: lists no variants: {type(error).__name__}: {error}")
            continue
        chosen += [(name, i) for i, variant in enumerate(listed) if any(part in variant.name for part in only)]
    return chosen, broken


def compile_all(chosen: Sequence[tuple[str, int]], arches: Sequence[int], jobs: int) -> list[Row]:
    """Every chosen variant on every architecture that it is for."""
    tasks = [
        (module, index, arch) for module, index in chosen for arch in arches if variants(module)[index].least <= arch
    ]
    if jobs == 1:
        found = [measure(*task) for task in tasks]
    else:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            found = list(pool.map(measure, *zip(*tasks, strict=True)))
    results = dict(zip(tasks, found, strict=True))
    return [
        (
            variants(module)[index],
            {arch: results[module, index, arch] for arch in arches if (module, index, arch) in results},
        )
        for module, index in chosen
    ]


def violations(rows: Iterable[Row]) -> list[str]:
    """A line for everything that must not be."""
    lines: list[str] = []
    for variant, found in rows:
        for arch, code in found.items():
            at = f"{variant.name}, sm_{arch}"
            if code.error is not None:
                lines.append(f"{at}: does not compile: {code.error}")
                continue
            if code.stack or code.local:
                lines.append(f"{at}: spills: {code.stack} bytes of stack, {code.local} local loads and stores")
            if arch == GATE and variant.limit is not None:
                if code.per_weight is None:
                    lines.append(
                        f"{at}: a limit of {variant.limit} instructions a weight, but no loop to count them in"
                    )
                elif code.per_weight > variant.limit:
                    lines.append(f"{at}: {code.per_weight:.2f} instructions a weight, limit {variant.limit}")
    return lines


def remarks(rows: Iterable[Row]) -> list[str]:
    """What a reader of the table should know besides."""
    lines: list[str] = []
    for variant, found in rows:
        claims = {code.dots for code in found.values() if variant.weights and any(code.dots)}
        for left, right in sorted(claims):
            if variant.weights not in (left, right):
                lines.append(
                    f"{variant.name}: says {variant.weights} weights a pass, "
                    f"its dots take {left} elements on the left, {right} on the right"
                )
        if large := [f"sm_{arch}" for arch, code in found.items() if code.shared > SHARED[arch]]:
            lines.append(f"{variant.name}: more shared memory than {', '.join(large)} has, so not to be launched there")
        if times := {arch: code.unrolled for arch, code in found.items() if code.unrolled > 1}:
            where = ", ".join(f"sm_{arch} {count} times" for arch, count in times.items())
            lines.append(f"{variant.name}: the loop is unrolled, which is counted in: {where}")
    return lines


def cell(variant: Variant, code: Measured | None) -> str:
    """Registers, spilled bytes, KiB of shared memory, instructions a weight; 21 characters."""
    if code is None:
        return f"{'-':>20} "
    if code.error is not None:
        return f"{'does not compile':>20}!"
    spilled = max(code.stack, code.local)
    spills = f"{spilled >> 10}K" if spilled > 9999 else str(spilled)
    each = "-" if code.per_weight is None else f"{code.per_weight:.2f}"
    flag = "!" if violations([(variant, {code.arch: code})]) else " "
    return f"{code.registers:>4}{spills:>5}{math.ceil(code.shared / 1024):>4}{each:>7}{flag}"


def table(rows: Sequence[Row], arches: Sequence[int]) -> str:
    """A line a variant, a group of columns an architecture; names that are too long have a line of their own."""
    room = max(24, min(max((len(variant.name) for variant, _ in rows), default=0) + 1, WIDTH - 21 * len(arches) - 5))
    lines = [
        " " * (room + 5) + "".join(f"{f' sm_{arch} ':-^19} ".rjust(21) for arch in arches),
        f"{'kernel':<{room}}limit" + f"{'reg':>4}{'spill':>6}{'KiB':>4}{'insn':>6} " * len(arches),
    ]
    for variant, found in rows:
        limit = "" if variant.limit is None else f"{variant.limit:g}"
        name = variant.name
        if len(name) >= room:
            lines.append(name)
            name = ""
        lines.append(f"{name:<{room}}{limit:>5}" + "".join(cell(variant, found.get(arch)) for arch in arches))
    return "\n".join(line.rstrip() for line in lines)


def markdown(rows: Sequence[Row], arches: Sequence[int]) -> str:
    """The same table in markdown, a line for every variant and architecture."""
    lines = [
        "| kernel | sm | registers | spills, B | shared, B | instructions a weight | limit |",
        "|---|" + "--:|" * 6,
    ]
    for variant, found in rows:
        for arch in arches:
            code = found.get(arch)
            if code is None or code.error is not None:
                lines.append(f"| {variant.name} | {arch} | {'-' if code is None else 'does not compile'} | | | | |")
                continue
            each = "" if code.per_weight is None else f"{code.per_weight:.2f}"
            limit = "" if variant.limit is None or arch != GATE else f"{variant.limit:g}"
            lines.append(
                f"| {variant.name} | {arch} | {code.registers} | {code.stack} | {code.shared} | {each} | {limit} |"
            )
    return "\n".join(lines)


def operations(rows: Iterable[Row]) -> str:
    """The main loops' instructions by kind, most frequent first."""
    return "\n".join(
        f"{variant.name}, sm_{arch}, {code.loop}: " + ", ".join(f"{op} {count}" for op, count in code.ops.items())
        for variant, found in rows
        for arch, code in found.items()
    )


def save(rows: Iterable[Row], path: Path) -> None:
    """Everything that was measured, as a list of objects."""
    every = [
        dataclasses.asdict(code) | {"limit": variant.limit, "weights": variant.weights, "warps": variant.warps}
        for variant, found in rows
        for code in found.values()
    ]
    path.write_text(json.dumps(every, indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.kernel_report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="80,89,90,120", help="compute capabilities, without their dot")
    parser.add_argument("--only", nargs="+", default=[""], metavar="SUBSTRING", help="only names with one of these")
    parser.add_argument("--module", metavar="FILE", help="a file to take instead of the ones in kernels/")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("--ops", action="store_true", help="list the main loops' instructions by kind, too")
    parser.add_argument("--markdown", action="store_true", help="print the table in markdown")
    options = parser.parse_args(arguments)
    begun = time.perf_counter()
    try:
        arches = [int(arch) for arch in options.arch.split(",")]
    except ValueError:
        arches = []
    if not arches or not set(arches) <= SHARED.keys():
        parser.error(f"--arch {options.arch}: give some of {','.join(map(str, SHARED))}")
    chosen, wrong = discover(options.only, options.module)
    if not wrong and not any(variants(module)[index].least <= arch for module, index in chosen for arch in arches):
        parser.error(f"no variant for these architectures has {' or '.join(options.only)!r} in its name")
    rows = compile_all(chosen, arches, max(1, options.jobs)) if chosen else []
    print(markdown(rows, arches) if options.markdown else table(rows, arches))
    if options.ops:
        print(operations(rows))
    if options.json is not None:
        save(rows, options.json)
    for line in remarks(rows):
        print(f"note: {line}")
    wrong += violations(rows)
    count = sum(len(found) for _, found in rows)
    print(f"{count} compilations in {time.perf_counter() - begun:.0f} s, {len(wrong)} violations")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
