"""Peak resident memory of a load, each in a fresh process, against the bound: weights + 2 x largest tensor + 600 MB.

    python benchmarks/load_memory.py [--quant bf16,wint8,wint4] [--models DIR]

Random-weight checkpoints of published shapes are written in shards to a temporary directory (or kept under DIR). Each
quantizing recipe is loaded twice: the first start quantizes and keeps the result, the second reads it back. Prints a
markdown table on stdout and progress on stderr; exits with 1 if a load exceeds the bound.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from random_models import SHAPES, Shape

from qrun.checkpoint import INDEX, Checkpoint
from qrun.memory import OVERHEAD
from qrun.tensorfile import TensorWriter

SHARD_BYTES = 400_000_000


def write_shards(shape: Shape, root: Path) -> Path:
    """A sharded BF16 checkpoint of noise under ``root``, written one tensor at a time; kept if it is there already."""
    folder = root / f"{shape.name}-sharded"
    if (folder / INDEX).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config()), encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    where: dict[str, str] = {}
    writer: TensorWriter | None = None
    for name, size in shape.tensors():
        if writer is None or writer.nbytes > SHARD_BYTES:
            if writer is not None:
                writer.close()
            writer = TensorWriter(folder / f"model-{len(set(where.values())) + 1:05d}.safetensors")
        writer.add(name, torch.empty(size, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator))
        where[name] = writer.path.name
    if writer is not None:
        writer.close()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}), encoding="utf-8")
    return folder


def load_once(folder: str, quant: str) -> None:
    """Load in this process and print what it took, as JSON."""
    from qrun import load
    from qrun.resident import peak

    before = peak()
    card = load(folder, quant=quant, context=512).card
    print(
        json.dumps(
            {
                "before": before,
                "peak": peak(),
                "predicted": card.predicted_peak,
                "weights": card.weight_bytes,
                "seconds": card.load_seconds,
                "stored": card.from_store,
            }
        )
    )


def measure(folder: Path, quant: str) -> dict[str, Any]:
    """`load_once` in a fresh process."""
    command = [sys.executable, __file__, "--once", str(folder), quant]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(quants: list[str], models: Path) -> bool:
    """Print the table; whether every load stayed within the bound."""
    print("| model | recipe | start | weights MB | largest tensor MB | bound MB | predicted MB | peak MB | load s |")
    print("|---|---|---|--:|--:|--:|--:|--:|--:|")
    within = True
    for shape in SHAPES:
        print(f"writing {shape.name} …", file=sys.stderr)
        folder = write_shards(shape, models)
        checkpoint = Checkpoint.open(folder)
        largest = max(checkpoint.nbytes(name) for name in checkpoint.names())
        for quant in quants:
            for start in ("first", "second") if quant not in ("bf16", "fp32") else ("first",):
                print(f"loading {shape.name} at {quant} …", file=sys.stderr)
                found = measure(folder, quant)
                bound = found["weights"] + 2 * largest + OVERHEAD
                within = within and found["peak"] <= bound
                sizes = (found["weights"], largest, bound, found["predicted"], found["peak"])
                cells = [
                    shape.name,
                    quant,
                    "from cache" if found["stored"] else start,
                    *(f"{n / 1e6:.0f}" for n in sizes),
                ]
                print("| " + " | ".join([*cells, f"{found['seconds']:.1f}"]) + " |", flush=True)
    return within


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quant", default="bf16,wint8,wint4", help="recipes, separated by commas")
    parser.add_argument("--models", type=Path, help="keep the checkpoints here")
    parser.add_argument("--once", nargs=2, metavar=("DIR", "QUANT"), help="load here and print JSON")
    chosen = parser.parse_args()
    if chosen.once:
        load_once(*chosen.once)
        return
    with tempfile.TemporaryDirectory(prefix="qrun-load-") as scratch:
        os.environ["QRUN_CACHE_DIR"] = str(Path(scratch) / "cache")
        if not run(chosen.quant.split(","), chosen.models or Path(scratch)):
            sys.exit(1)


if __name__ == "__main__":
    main()
