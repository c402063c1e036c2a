"""How fast this machine reads memory: the limit that decoding runs against. Measured, not looked up. Knows no model."""

import statistics
import time
from typing import Final

import torch

SIZE: Final = 256 << 20
"""Bytes read a time: far more than any cache holds."""


def read_bandwidth(threads: int | None = None, *, size: int = SIZE, repeats: int = 9) -> float:
    """Bytes per second that ``threads`` threads read together: the median of ``repeats`` passes over ``size`` bytes.

    The pass is a dot product of the two halves of a buffer: two plain streams of loads and next to no arithmetic.
    ``threads`` defaults to the number torch uses, and that number is the same afterwards.
    """
    halves = torch.ones(2, size // 8)  # written once, so every page is really there
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        seconds: list[float] = []
        for _ in range(repeats + 1):
            begun = time.perf_counter()
            torch.dot(halves[0], halves[1])
            seconds.append(time.perf_counter() - begun)
    finally:
        torch.set_num_threads(before)
    return halves.nbytes / statistics.median(seconds[1:])
