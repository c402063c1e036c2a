"""The CPU's kernels beside torch's own operations and a plain read, in alternating runs; medians, as a markdown table.

    python benchmarks/cpu_kernels.py [--rows 8192 --columns 4096 --tokens 512 --threads 2]

One token: gigabytes of weights a second, and the share of what a plain read reaches in the same rounds. Many tokens:
GFLOP/s. Every weight exists several times, so that none stays in the cache between two calls.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from qrun.backends.cpu import CPUBackend
from qrun.formats import QTensor, format_of
from qrun.recipe import WeightScheme

SCHEMES = (
    WeightScheme("int", 4, 64, False),
    WeightScheme("int", 4, 32, True),
    WeightScheme("int", 4, 0, True),
    WeightScheme("int", 8, 0),
    WeightScheme("int", 2, 64, False),
    WeightScheme("bf16", 16),
)
CACHE = 100 << 20  # bytes of weights between two uses of the same one

Call = Callable[[int], object]


def random_weight(scheme: WeightScheme, rows: int, columns: int) -> QTensor:
    """Codes of no meaning: speed does not depend on them."""
    made = QTensor.empty(format_of(scheme), (rows, columns))
    for tensor in made.tensors().values():
        if tensor.dtype.is_floating_point:
            tensor.fill_(0.01)
        else:
            tensor.random_(0, 127)
    return made


def ours(
    backend: CPUBackend, scheme: WeightScheme, shape: tuple[int, int], activations: str, x: Tensor
) -> tuple[Call, int]:
    first = random_weight(scheme, *shape)
    weights = [first, *(random_weight(scheme, *shape) for _ in range(CACHE // first.nbytes))]
    calls = [backend.linear(weight, activations=activations) for weight in weights]
    return lambda i: calls[i % len(calls)](x), first.nbytes


def theirs(shape: tuple[int, int], x: Tensor) -> dict[str, tuple[Call, int]]:
    """torch's operations on weights of the same shape."""
    rows, columns = shape
    copies = CACHE // (rows * columns) + 1
    int8 = [torch.randint(-127, 127, (rows, columns), dtype=torch.int8) for _ in range(copies)]
    nibbles = [torch.randint(0, 16, (rows, columns), dtype=torch.int32) for _ in range(2)]
    int4 = [torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibble, 1) for nibble in nibbles for _ in range(copies)]
    bf16 = [torch.randn(rows, columns, dtype=torch.bfloat16) for _ in range(copies // 2 + 1)]
    fp32 = [torch.randn(rows, columns) for _ in range(2)]
    scales, table = torch.ones(rows, dtype=torch.bfloat16), torch.randn(columns // 128, rows, 2).bfloat16()
    half, eight = x.bfloat16(), x.to(torch.int8)
    return {
        "torch _int_mm (W8A8)": (lambda i: torch.ops.aten._int_mm(eight, int8[i % copies].t()), rows * columns),
        "torch _weight_int8pack_mm": (
            lambda i: torch.ops.aten._weight_int8pack_mm(half, int8[i % copies], scales),
            rows * columns,
        ),
        "torch _weight_int4pack_mm_for_cpu g128": (
            lambda i: torch.ops.aten._weight_int4pack_mm_for_cpu(half, int4[i % len(int4)], 128, table),
            rows * columns // 2 + table.nbytes,
        ),
        "torch bf16 F.linear": (lambda i: torch.nn.functional.linear(half, bf16[i % len(bf16)]), 2 * rows * columns),
        "torch fp32 F.linear": (lambda i: torch.nn.functional.linear(x, fp32[i % 2]), 4 * rows * columns),
    }


def measure(calls: dict[str, tuple[Call, int]], rounds: int) -> dict[str, float]:
    """Median seconds of each, all of them once a round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 2):
        for name, (call, _) in calls.items():
            begin = time.perf_counter()
            call(i)
            if i >= 2:
                times[name].append(time.perf_counter() - begin)
            time.sleep(0.003)  # torch's threads spin on for a moment after their work
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    backend = CPUBackend(threads=args.threads)
    shape = (args.rows, args.columns)
    print(f"[{args.rows} × {args.columns}], {args.threads} threads, medians of {args.rounds} alternating rounds\n")
    for tokens in (1, args.tokens):
        x = torch.randn(tokens, args.columns)
        calls: dict[str, tuple[Call, int]] = {}
        for scheme in SCHEMES:
            for activations in ("16", "int8") if scheme.type == "int" else ("16",):
                calls[f"qrun {scheme}, A{activations.removeprefix('int')}"] = ours(
                    backend, scheme, shape, activations, x
                )
        calls |= theirs(shape, x)
        big = torch.ones(CACHE // 4)
        calls["plain read"] = (lambda _, big=big: big.sum(), big.nbytes)
        found = measure(calls, args.rounds if tokens == 1 else max(3, args.rounds // 3))
        read = calls["plain read"][1] / found["plain read"]
        if tokens == 1:
            print("| 1 token | GB/s | of a plain read |\n|---|--:|--:|")
            for name, seconds in found.items():
                speed = calls[name][1] / seconds
                print(f"| {name} | {speed / 1e9:.1f} | {speed / read:.0%} |")
        else:
            print(f"\n| {tokens} tokens | GFLOP/s |\n|---|--:|")
            for name, seconds in found.items():
                if name != "plain read":
                    print(f"| {name} | {2 * tokens * args.rows * args.columns / seconds / 1e9:.0f} |")


if __name__ == "__main__":
    main()
