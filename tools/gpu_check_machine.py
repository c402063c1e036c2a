"""The machine itself, and the peers: what the GPU is, how fast it reads, and what plain PyTorch decodes on it."""

import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, Final

import torch

from qrun.aliases import ALIASES
from tools.gpu_check_job import Job, Record
from tools.gpu_check_models import MODELS, NEAR
from tools.gpu_check_timing import bandwidths
from tools.gpu_check_tree import ROOT

PEERS: Final = (
    ("Llama-3.1-8B", "bf16"),
    ("Llama-3.1-8B", "int4"),
    ("ERNIE-4.5-21B-A3B", "bf16"),
    ("ERNIE-4.5-0.3B", "int4"),
    ("ERNIE-4.5-0.3B", "bf16"),
)


def measure_machine(job: Job) -> None:
    """Names, versions and the bandwidth of plain reads and copies."""
    job.attempt("device", device)
    job.attempt("bandwidth", lambda: dict(bandwidths(1 << 28 if job.quick else 1 << 30)))


def device() -> Record:
    """What the card is, in its driver's words."""
    cuda: Any = torch.cuda
    properties: Any = cuda.get_device_properties(0)
    found: Record = {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "l2": properties.L2_cache_size,
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
    }
    query = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=20,
        )  # fmt: skip
        found |= dict(zip(query.split(","), done.stdout.splitlines()[0].split(", "), strict=True))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        found["driver_version"] = f"unknown ({type(error).__name__})"
    return found


def measure_peers(job: Job) -> None:
    """benchmarks/peer_decoder.py for the same models, each in a process of its own."""
    for name, weights in PEERS[:2] if job.quick else PEERS:

        def work(name: str = name, weights: str = weights) -> Record:
            row = run_peer(ALIASES[MODELS[name]].config, weights, limit=job.left + 5)
            return {"model": name, "recipe": weights, **row}

        job.attempt(f"PyTorch {name} {weights}", work, least=25)


def run_peer(config: Mapping[str, Any], weights: str, *, limit: float, options: tuple[str, ...] = ()) -> Record:
    """The line of JSON that the peer prints. Raises RuntimeError with its last words where it prints none."""
    script = ROOT / "benchmarks" / "peer_decoder.py"
    shape = json.dumps({key: value for key, value in config.items() if isinstance(value, int)})
    command = [sys.executable, str(script), "--shape", shape, "--weights", weights, "--depth", str(NEAR), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
    if done.returncode:
        raise RuntimeError(" ".join(done.stderr.splitlines()[-3:]) or f"ended with {done.returncode}")
    row: Record = json.loads(done.stdout.splitlines()[-1])
    return row
