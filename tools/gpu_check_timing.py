"""How long the device takes for calls, with nothing of them left in its caches, and how fast it reads and copies.

Calls are captured in a graph, as a decode step is, so the host's time does not count. It knows no kernels of qrun.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Work:
    """Calls that take turns; ``bytes`` and ``operations`` of one."""

    calls: list[Call]
    bytes: int = 0
    operations: int = 0


def rotate(make: Callable[[], Call], nbytes: int, operations: int = 0) -> Work:
    """As many calls of ``make`` as the caches ask for, each with ``nbytes`` of its own."""
    return Work([make() for _ in range(copies_of(nbytes))], nbytes, operations)


def copies_of(nbytes: int, *, most: int = 256) -> int:
    """How many copies of something to go through so that its first is out of the L2 cache when it comes again."""
    if not torch.cuda.is_available():
        return 2
    cuda: Any = torch.cuda
    return max(2, min(most, math.ceil(4 * cuda.get_device_properties(0).L2_cache_size / nbytes)))


def seconds(calls: Sequence[Call], *, least: int = 24, repeats: int = 7) -> float:
    """Median seconds of one call, the calls taking turns, at least ``least`` in a row."""
    rounds = math.ceil(least / len(calls))
    for _ in range(2):
        calls[0]()
    for call in calls:
        call()
    torch.cuda.synchronize()

    def all_of_them() -> None:
        for _ in range(rounds):
            for call in calls:
                call()

    run, graph = all_of_them, None
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_of_them()
        run = graph.replay
    except RuntimeError:  # not every operation of torch can be captured
        torch.cuda.synchronize()
    run()
    times: list[float] = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    del graph
    return statistics.median(times) / (rounds * len(calls))


def bandwidths(size: int = 1 << 30) -> dict[str, float]:
    """Bytes a second: of plain reads in torch's two best ways, of which the better is ``read``, and of a copy (both
    directions counted)."""
    a, b = torch.ones(2, size // 4, device="cuda")
    target = torch.empty_like(a)
    found = {
        "sum": a.nbytes / seconds([lambda: a.sum()], least=5),
        "dot": 2 * a.nbytes / seconds([lambda: torch.dot(a, b)], least=5),
        "amax": a.nbytes / seconds([lambda: a.view(1 << 12, -1).amax(1)], least=5),
        "copy": 2 * a.nbytes / seconds([lambda: target.copy_(a)], least=5),
    }
    return {**found, "read": max(found["sum"], found["dot"], found["amax"])}
