"""qrun against llama.cpp and transformers on this machine's CPU: the same shapes with random weights, side by side.

    pip install -e ".[peers]"
    python benchmarks/vs_llamacpp.py --models DIR

Every contender stays loaded in its own process, and they take turns (A B C A B C …), so that a machine that grows
slower or faster in between does so for all. Medians; each round's read bandwidth is measured beside them. Prints
markdown on stdout, progress on stderr, and writes everything as JSON to benchmarks/results/.
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from random_models import SHAPES, Shape, write_checkpoint, write_gguf

from qrun.bandwidth import read_bandwidth

HERE = Path(__file__).parent
LLAMA = ("Q4_0", "Q4_0 pure", "Q8_0", "F16")
QRUN = ("wint4", "W4A8C16", "wint8", "w8a8", "bf16")
TRANSFORMERS = ("bfloat16",)
# Prefill is held against Q4_0 for every recipe, decode against the variant of about the same size.
DECODE_PEER = {"wint4": "Q4_0", "W4A8C16": "Q4_0", "wint8": "Q8_0", "w8a8": "Q8_0", "bf16": "F16"}


@dataclass
class Entry:
    """One contender's process and what it measured: seconds per test, in the order of the rounds."""

    kind: str
    variant: str
    process: "subprocess.Popen[str]"
    ready: dict[str, float] = field(default_factory=dict[str, float])
    seconds: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    peak: int = 0

    @property
    def name(self) -> str:
        return f"{self.kind} {self.variant}"

    def answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with code {self.process.wait()}")
        found: dict[str, float] = json.loads(line)
        return found

    def turn(self, kind: str, tokens: int) -> float:
        """Run a test once and return its seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{kind} {tokens}\n")
        self.process.stdin.flush()
        found = self.answer()
        self.peak = int(found["peak"])
        return found["seconds"]

    def speed(self, test: str) -> float:
        """Median tokens per second."""
        return int(test[2:]) / statistics.median(self.seconds[test])


def quantize_gguf(source: Path, variant: str, threads: int) -> Path:
    """llama.cpp's own quantization of an F16 file.

    Q4_0 keeps the tied head in Q6_K, as published files do; `Q4_0 pure` is 4 bits throughout.
    """
    if variant == "F16":
        return source
    c: Any = import_module("llama_cpp")
    target = source.with_name(source.name.replace("-f16", "-" + variant.lower().replace(" ", "-")))
    if not target.exists():
        unfinished = target.with_suffix(f".{os.getpid()}")
        settings: Any = c.llama_model_quantize_default_params()
        settings.ftype = getattr(c, "LLAMA_FTYPE_MOSTLY_" + variant.split()[0])
        settings.pure = variant.endswith("pure")
        settings.nthread = threads
        code = c.llama_model_quantize(str(source).encode(), str(unfinished).encode(), ctypes.byref(settings))
        if code:
            raise SystemExit(f"llama.cpp could not quantize {source} to {variant}")
        unfinished.rename(target)
    return target


def start(kind: str, path: Path, variant: str, threads: int, context: int) -> Entry:
    command = [sys.executable, str(HERE / "contenders.py"), kind, str(path), variant, str(threads), str(context)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    entry = Entry(kind, variant, process)
    entry.ready = entry.answer()
    print(f"  {entry.name}: loaded in {entry.ready['load_seconds']:.1f} s", file=sys.stderr)
    return entry


def compare(shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    """Load every contender on one shape, let them take turns, and return all that was measured."""
    print(f"{shape.name}: {shape.parameters / 1e6:.0f} M parameters", file=sys.stderr)
    folder = write_checkpoint(shape, options.models)
    wanted: list[tuple[str, Path, str]] = []
    if options.llama:
        source = write_gguf(shape, folder)
        wanted += [("llama.cpp", quantize_gguf(source, v, options.threads), v) for v in options.llama]
    wanted += [("qrun", folder, variant) for variant in options.qrun]
    wanted += [("transformers", folder, variant) for variant in options.transformers]
    tests = {"pp": options.pp, "tg": options.tg}
    context = max(options.pp, options.tg) + 16
    entries = [start(kind, path, variant, options.threads, context) for kind, path, variant in wanted]
    bandwidth: list[float] = []
    load: list[float] = []
    for turn in range(options.rounds + 1):
        bandwidth.append(read_bandwidth(options.threads, repeats=5))
        load.append(os.getloadavg()[0])
        for kind, tokens in tests.items():
            for entry in entries:
                seconds = entry.turn(kind, tokens)
                print(f"    {entry.name}: {kind}{tokens} {tokens / seconds:.1f} t/s", file=sys.stderr)
                if turn:  # the first round warms up
                    entry.seconds.setdefault(f"{kind}{tokens}", []).append(seconds)
        print(f"  round {turn} of {options.rounds}: {bandwidth[-1] / 1e9:.1f} GB/s", file=sys.stderr)
    for entry in entries:
        assert entry.process.stdin is not None
        entry.process.stdin.close()
        entry.process.wait()
    return {
        "shape": shape.name,
        "parameters": shape.parameters,
        "bandwidth": bandwidth,
        "load_average": load,
        "entries": [_summary(entry, statistics.median(bandwidth), options) for entry in entries],
    }


def _summary(entry: Entry, bandwidth: float, options: argparse.Namespace) -> dict[str, Any]:
    pp, tg = f"pp{options.pp}", f"tg{options.tg}"
    return {
        "name": entry.name,
        "kind": entry.kind,
        "variant": entry.variant,
        "bytes_per_token": entry.ready["bytes_per_token"],
        "load_seconds": entry.ready["load_seconds"],
        "peak_memory": entry.peak,
        "pp": entry.speed(pp),
        "tg": entry.speed(tg),
        "bandwidth_share": entry.speed(tg) * entry.ready["bytes_per_token"] / bandwidth,
        "seconds": entry.seconds,
    }


def table(result: dict[str, Any], options: argparse.Namespace) -> str:
    """One shape's results as markdown."""
    speeds = {entry["name"]: entry for entry in result["entries"]}
    lines = [
        f"**{result['shape']}**, {result['parameters'] / 1e6:.0f} M parameters, {options.threads} threads, "
        f"read bandwidth {statistics.median(result['bandwidth']) / 1e9:.1f} GB/s "
        f"({min(result['bandwidth']) / 1e9:.1f} to {max(result['bandwidth']) / 1e9:.1f} over the rounds)",
        "",
        f"| | pp{options.pp} t/s | vs Q4_0 | tg{options.tg} t/s | vs its peer | read a token | of bandwidth | peak |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for entry in result["entries"]:
        size, memory = entry["bytes_per_token"] / 1e6, entry["peak_memory"] / 1e6
        prompt = _ratio(entry["pp"], speeds.get("llama.cpp Q4_0"), "pp") if entry["kind"] == "qrun" else ""
        peer = DECODE_PEER.get(entry["variant"], "")
        decode = _ratio(entry["tg"], speeds.get(f"llama.cpp {peer}"), "tg") if entry["kind"] == "qrun" else ""
        lines.append(
            f"| {entry['name']} | {entry['pp']:.1f} | {prompt} | {entry['tg']:.1f} | {decode and f'{decode} {peer}'} "
            f"| {size:.0f} MB | {entry['bandwidth_share']:.0%} | {memory:.0f} MB |"
        )
    return "\n".join(lines)


def _ratio(speed: float, peer: dict[str, Any] | None, test: str) -> str:
    return f"{speed / peer[test]:.2f} ×" if peer else ""


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(tempfile.gettempdir()) / "qrun-benchmarks"
    parser.add_argument(
        "--models", type=Path, default=default, help="where the random models are kept (12 GB for both shapes)"
    )
    parser.add_argument("--shapes", nargs="+", default=[shape.name for shape in SHAPES])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pp", type=int, default=512)
    parser.add_argument("--tg", type=int, default=64)
    parser.add_argument("--llama", nargs="*", default=list(LLAMA))
    parser.add_argument("--qrun", nargs="*", default=list(QRUN))
    parser.add_argument("--transformers", nargs="*", default=list(TRANSFORMERS))
    parser.add_argument("--output", type=Path, default=HERE / "results" / "vs_llamacpp.json")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    for shape in SHAPES:
        if shape.name in options.shapes:
            results.append(compare(shape, options))
            print("\n" + table(results[-1], options), flush=True)
    report = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "rounds": options.rounds,
        "pp": options.pp,
        "tg": options.tg,
        "results": results,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
