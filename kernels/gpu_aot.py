"""What a kernel file says of itself to who compiles it without a GPU: a configuration that is used in production."""
# pyright: basic

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One configuration of one kernel.

    ``types`` gives each runtime argument its Triton type (``*bf16``, ``*i32``, ``fp32``, ``i32``); pointers are 16-byte
    aligned, and integers named in ``multiples`` are multiples of 16. All other arguments are in ``constants``.
    ``weights``: weights that one pass of the main loop reads in one program, or 0 where there is nothing to count.
    ``limit``: most instructions a weight on sm_90, or none. ``least``: the lowest compute capability it is for.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 1
    multiples: tuple[str, ...] = ()
    weights: int = 0
    limit: float | None = None
    least: int = 80
