"""How fast this machine reads memory: the limit that decoding runs against. Measured, not looked up. Knows no model."""

import statistics
import time
from collections.abc import Callable
from typing import Final

import torch

from qrun.free import available

SIZE: Final = 256 << 20
"""Bytes read a time: far more than any cache holds."""
GPU_SIZE: Final = 2 << 30
"""The same for a GPU, where it must also take long beside a launch; less where there is little memory."""
IN_A_ROW: Final = 8
"""Passes over a GPU's memory between two looks at the clock, for the same reason."""


def read_bandwidth(
    threads: int | None = None, *, device: str = "cpu", size: int | None = None, repeats: int = 9
) -> float:
    """Bytes per second that ``threads`` threads read together: the median of ``repeats`` passes over ``size`` bytes.

    The pass is a dot product of the two halves of a buffer: two plain streams of loads and next to no arithmetic. On a
    GPU it is that or a sum, whichever is faster. ``threads`` are the CPU's: by default as many as torch uses, and that
    number is the same afterwards.
    """
    if device != "cpu":
        return _device_bandwidth(device, size or min(GPU_SIZE, available(device) // 4), repeats)
    halves = torch.ones(2, (size or SIZE) // 8)  # written once, so every page is really there
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        return halves.nbytes / _median(lambda: torch.dot(halves[0], halves[1]), repeats)
    finally:
        torch.set_num_threads(before)


def _device_bandwidth(device: str, size: int, repeats: int) -> float:
    module = torch.get_device_module(device)
    halves = torch.ones(2, size // 8, device=device)

    def passes(read: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            for _ in range(IN_A_ROW):
                read()
            module.synchronize()

        return run

    reads = (halves.sum, lambda: torch.dot(halves[0], halves[1]))
    return IN_A_ROW * halves.nbytes / min(_median(passes(read), repeats) for read in reads)


def _median(run: Callable[[], object], repeats: int) -> float:
    """Seconds of a run, after one to warm up."""
    seconds: list[float] = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:])
