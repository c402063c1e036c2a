"""What calibration is worth: a model quantized by every method at some recipes, each against the model it came from.

    python benchmarks/quantize_quality.py MODEL --text HELD_OUT --calibration TEXT [--quant W4g64,W3g64] [--out FILE]

MODEL is a directory. Every directory is made by `qrun quantize` itself and read back by `qrun eval --against MODEL`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

METHODS = ("rtn", "gptq", "awq", "awq+gptq")


def qrun(*arguments: str) -> str:
    """Standard output of a command; its standard error is shown as it comes."""
    command = [sys.executable, "-c", "from qrun.cli.main import run; run()", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def row(given: argparse.Namespace, name: str, method: str, *precision: str) -> dict[str, Any]:
    """One directory made and measured: {quant, method, bits, kl_mean, kl_p99, perplexity …}."""
    with tempfile.TemporaryDirectory() as place:
        out = str(Path(place) / "out")
        text = ("--calibration", str(given.calibration), "--tokens", str(given.tokens))
        qrun(
            "quantize", given.model, out, *precision, "--method", method, "--quiet", *(text if method != "rtn" else ())
        )
        report = json.loads((Path(out) / "quantization.json").read_text())
        options = ("--text", str(given.text), "-n", str(given.n), "-o", "json", "--quiet", "--no-cache")
        (found,) = json.loads(qrun("eval", out, "--against", given.model, *options))
    return {
        "quant": name,
        "method": method,
        "bits": report["bits_per_weight"],
        **{key: found[key] for key in ("kl_mean", "kl_p99", "top1", "perplexity", "perplexity_error", "tokens")},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--quant", default="W4g64,W3g64,W2g32")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--budget", default="", help="average bits to choose mixes for, as 4bpw,5bpw")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("-n", type=int, default=8192)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    jobs = [
        (quant, method, ("--quant", quant)) for quant in given.quant.split(",") for method in given.methods.split(",")
    ]
    jobs += [(budget, "gptq", ("--budget", budget)) for budget in filter(None, given.budget.split(","))]
    rows: list[dict[str, Any]] = []
    print("| weights | method | bits | KL mean | KL p99 | same top | perplexity |\n|---|---|---:|---:|---:|---:|---:|")
    for quant, method, precision in jobs:
        found = row(given, quant, method, *precision)
        rows.append(found)
        print(
            f"| {quant} | {method} | {found['bits']:.2f} | {found['kl_mean']:.4f} | {found['kl_p99']:.3f} | "
            f"{100 * found['top1']:.1f} % | {found['perplexity']:.2f} ± {found['perplexity_error']:.2f} |",
            flush=True,
        )
        if given.out is not None:
            given.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
