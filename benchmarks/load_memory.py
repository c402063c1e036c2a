"""Peak resident memory while a checkpoint loads, beside what was expected of it and its bound.

    python benchmarks/load_memory.py --models DIR

Every load runs in a process of its own and counts everything in it: Python, torch, compiled kernels. Before a recipe's
first load another one, not counted, compiles its kernels. The first quantizes and keeps the result, the second reads
what was kept; the last column is the peak once the context is full. The bound is the final weights + 2 × the largest
tensor + 600 MB. Prints markdown, writes JSON to benchmarks/results/, and ends with code 1 if a bound is broken or an
expectation is off by more than a tenth.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from random_models import SHAPES, write_checkpoint

from qrun import resident
from qrun.api import load
from qrun.kernels.cpu_pool import HOME
from qrun.tensorfile import TensorFile

HERE = Path(__file__).parent
RECIPES = ("bf16", "wint8", "wint4", "nf4", "fp8")
CONTEXT = 1024
REST = 600_000_000
TENTH = 0.1


def measure(folder: Path, recipe: str) -> dict[str, Any]:
    """Load once in this process and say what it took, in bytes and seconds."""
    engine = load(folder, recipe, context=CONTEXT, device="cpu")
    card, peak = engine.card, resident.peak()
    resident.reset_peak()
    for _ in engine.prefill([i % 1000 for i in range(CONTEXT)]):
        pass
    largest = max(
        math.prod(entry.shape) * entry.dtype.itemsize
        for file in folder.glob("*.safetensors")
        for entry in TensorFile(file).entries.values()
    )
    return {
        "model": folder.name,
        "recipe": recipe,
        "stored": card.from_store,
        "weights": card.weight_bytes,
        "largest": largest,
        "bound": card.weight_bytes + 2 * largest + REST,
        "expected": card.predicted_peak,
        "peak": peak,
        "off": card.predicted_peak / peak - 1,
        "full": resident.peak(),
        "seconds": card.load_seconds,
    }


def in_a_new_process(folder: Path, recipe: str, cache: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--load", str(folder), recipe]
    places = {"QRUN_CACHE_DIR": str(cache), "NUMBA_CACHE_DIR": os.environ.get("NUMBA_CACHE_DIR", str(HOME))}
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env={**os.environ, **places})
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown, sizes in MB."""
    lines = [
        "| model | recipe | | weights | bound | expected | measured peak | off | context full | seconds |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        sizes = (f"{row[key] / 1e6:.0f}" for key in ("weights", "bound", "expected", "peak"))
        kind = "kept" if row["stored"] else "from the checkpoint"
        last = f"{100 * row['off']:+.1f} % | {row['full'] / 1e6:.0f} | {row['seconds']:.1f}"
        lines.append(f"| {row['model']} | {row['recipe']} | {kind} | {' | '.join(sizes)} | {last} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "qrun-benchmarks")
    parser.add_argument("--shapes", nargs="+", default=[shape.name for shape in SHAPES])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--output", type=Path, default=HERE / "results" / "load_memory.json")
    parser.add_argument("--load", nargs=2, metavar=("FOLDER", "RECIPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(measure(Path(options.load[0]), options.load[1])))
        return 0
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        if shape.name not in options.shapes:
            continue
        folder = write_checkpoint(shape, options.models)
        for recipe in options.recipes:
            with tempfile.TemporaryDirectory(dir=options.models) as cache:
                in_a_new_process(folder, recipe, Path(cache))
            with tempfile.TemporaryDirectory(dir=options.models) as cache:
                rows.append(in_a_new_process(folder, recipe, Path(cache)))
                if recipe != "bf16":
                    rows.append(in_a_new_process(folder, recipe, Path(cache)))
                print(f"{shape.name} {recipe}: {rows[-1]['peak'] / 1e6:.0f} MB", file=sys.stderr)
    print(table(rows))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    broken = [row for row in rows if row["peak"] > row["bound"] or abs(row["off"]) > TENTH]
    for row in broken:
        print(f"over its bound, or not as expected: {row['model']} {row['recipe']}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
