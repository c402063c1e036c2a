"""Prompts run together against the same prompts one after another, on this machine's CPU and random weights.

    python benchmarks/batch.py --models DIR [--quant wint4,wint8] [--width 1,2,4,8,16]

New tokens a second, prompts already read: of `Engine.generate` for one prompt after another, and of a `Batch` of each
width. Both take turns, so that a machine that grows slower in between does so for all; medians of the rounds. Prints
markdown on stdout, progress on stderr.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from random_models import SHAPES, write_checkpoint

import qrun
from qrun.batch import Batch, Request
from qrun.engine import Engine
from qrun.sampler import Sampling

GREEDY = Sampling(temperature=0.0)


def one_by_one(engine: Engine, prompts: Sequence[list[int]], new: int) -> float:
    """Tokens a second of decode steps."""
    made, seconds = 0, 0.0
    for ids in prompts:
        engine.reset()
        reply = engine.generate(ids, max_tokens=new, sampling=GREEDY, loop_guard=False)
        made += sum(1 for _ in reply)
        seconds += reply.stats.decode_seconds
    engine.reset()
    return made / seconds


def together(engine: Engine, prompts: Sequence[list[int]], new: int) -> float:
    """The same with all prompts in one batch, whose steps they all take part in."""
    requests = [Request(ids=ids, max_tokens=new, sampling=GREEDY, loop_guard=False) for ids in prompts]
    streams = list(Batch(engine, requests, len(requests)).streams)
    made = sum(sum(1 for _ in stream) for stream in streams)
    return made / max(stream.stats.decode_seconds for stream in streams)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=Path, required=True, help="where the checkpoints are kept")
    parser.add_argument("--shape", choices=[shape.name for shape in SHAPES], default=SHAPES[0].name)
    parser.add_argument("--quant", default="wint4,W4A8C16,wint8,bf16")
    parser.add_argument("--width", default="1,2,4,8,16")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of each reply")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    shape = next(shape for shape in SHAPES if shape.name == options.shape)
    folder = write_checkpoint(shape, options.models)
    widths = [int(width) for width in options.width.split(",")]
    prompts = [[(97 * i * i + 31 * b + i) % shape.vocab for i in range(options.prompt)] for b in range(max(widths))]
    print("| recipe | one by one | " + " | ".join(f"{width} together" for width in widths) + " |")
    print("|" + "---|" * (len(widths) + 2))
    for quant in options.quant.split(","):
        context = options.prompt + options.new
        engine = qrun.load(folder, quant, device="cpu", context=context, threads=options.threads)
        found: list[list[float]] = []
        for turn in range(options.rounds + 1):
            print(f"{quant}: round {turn} of {options.rounds}", file=sys.stderr)
            # Of the first, only a few: one after another they are all the same.
            row = [one_by_one(engine, prompts[:2], options.new)]
            found.append(row + [together(engine, prompts[:width], options.new) for width in widths])
        alone, *speeds = (statistics.median(column) for column in zip(*found[1:], strict=True))
        cells = [f"{speed:.0f} ({speed / alone:.1f}×)" for speed in speeds]
        print(f"| {quant} | {alone:.0f} | " + " | ".join(cells) + " |", flush=True)
        del engine


if __name__ == "__main__":
    main()
