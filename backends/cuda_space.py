"""The memory that a model's blocks pass their work on in: one token's buffers stay where they are, as a graph wants.

A block's products for up to `MOST` tokens go through buffers by name, made once at their largest; what comes for more
tokens is the allocator's. It knows sizes, not what is in them.
"""

import math

import torch
from torch import Tensor

from qrun.kernels.gpu_gemv import MOST, Operand, Scratch

WIDTH_ALIGN = 256
"""Operands are padded to a multiple of this: no weight is padded further."""
EXPANDED = 1 << 27
"""Weights expanded at a time for many tokens."""


def padded(count: int, multiple: int = WIDTH_ALIGN) -> int:
    return -(-count // multiple) * multiple


class Space:
    """Buffers of one model on one device, its operands in ``half``."""

    def __init__(self, device: torch.device, half: torch.dtype) -> None:
        self.device = device
        self.half = half
        self._parts: dict[tuple[object, ...], Tensor] = {}
        self._outgrown: list[Tensor] = []  # a graph may still write into them

    def _part(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros by name and shape, the same ones every time."""
        key = (name, shape, dtype)
        part = self._parts.get(key)
        if part is None:
            part = self._parts[key] = torch.zeros(shape, dtype=dtype, device=self.device)
        return part

    def _grown(self, name: str, size: int, dtype: torch.dtype) -> Tensor:
        """At least ``size`` zeros or left-overs by name."""
        key = (name, dtype)
        part = self._parts.get(key)
        if part is None or part.numel() < size:
            if part is not None:
                self._outgrown.append(part)
            part = self._parts[key] = torch.zeros(size, dtype=dtype, device=self.device)
        return part

    def floats(self, name: str, tokens: int, width: int) -> Tensor:
        """float32 [tokens, width], at most `MOST` tokens."""
        return self._part(name, (MOST, width), torch.float32)[:tokens]

    def operand(self, name: str, tokens: int, width: int, ssq: Tensor | None = None) -> Operand:
        """An operand for ``tokens`` rows of ``width``, zero where it is padded."""
        wide = padded(width)
        rows = padded(tokens, MOST)  # by slots: a token has several
        return Operand(
            x=self._part(f"{name} {width}", (rows, wide), self.half)[:tokens],
            sums=self._part(f"{name} {width} sums", (rows, wide // 32), torch.float32)[:tokens],
            width=width,
            ssq=ssq,
        )

    def squares(self, parts: int, tokens: int) -> Tensor:
        """float32 [parts, tokens], contiguous."""
        return self._grown("squares", parts * MOST, torch.float32)[: parts * tokens].view(parts, tokens)

    def integers(self, name: str, count: int) -> Tensor:
        """int32 zeros [count]."""
        return self._part(name, (count,), torch.int32)

    def scratch(self, partial: int, counter: int) -> Scratch:
        """Room for a product's pieces and their counters."""
        return Scratch(
            partial=self._grown("partial", max(partial, 1), torch.float32),
            counter=self._grown("counter", counter, torch.int32),
        )

    def queries(self, tokens: int, heads: int, width: int) -> Tensor:
        """[tokens, heads, width] in ``half``, contiguous."""
        return self._grown("queries", tokens * heads * width, self.half)[: tokens * heads * width].view(
            tokens, heads, width
        )

    def partials(self, shape: tuple[int, ...]) -> Tensor:
        """float32 of the shape, for the splits of an attention."""
        size = math.prod(shape)
        return self._grown("attention", size, torch.float32)[:size].view(shape)

    def expanded(self, rows: int, width: int) -> Tensor:
        """[some of the rows, width] in ``half``, for weights that are expanded part by part."""
        step = max(128, min(rows, EXPANDED // width // 128 * 128))
        return self._grown("expanded", min(rows, step) * width, self.half)[: min(rows, step) * width].view(-1, width)
