"""Integers with scales in two levels, as llama.cpp's K-quants store them: a small integer per group times an FP16."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Final

import torch
from torch import Tensor

from qrun.formats.affine import AffineFormat
from qrun.formats.base import Format, Layout, QTensor, Shape
from qrun.formats.packing import grouped, unpack

SUPER: Final = 256
"""Weights that share the FP16 scale."""


@dataclass(frozen=True)
class SuperBlockFormat(Format):
    """w = q · (d · s) − (dmin · m) with ``minimum``, else w = q · (d · s); K a multiple of 256.

    codes: u8 [..., N, K·bits/8], a little-endian bit stream; without minimum 2^(bits−1) is added to q.
    scale: s, u8 [..., N, K/group·scale_bits/8], such a stream; without minimum 2^(scale_bits−1) is added to s.
    zero: m, as ``scale``, absent without minimum.
    scale2: FP16 [..., N, K/256] of d; with minimum [..., N, K/128], pairs of d and dmin.
    """

    family: ClassVar[str] = "superblock"
    bits: int
    group: int
    scale_bits: int
    minimum: bool

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 7 or self.group not in (16, 32) or not 4 <= self.scale_bits <= 8:
            raise ValueError(f"no such super-block format: {self!r}")

    def __str__(self) -> str:
        return f"int{self.bits} g{self.group} in {SUPER}"

    def layout(self, shape: Shape) -> Layout:
        *lead, k = shape
        if k % SUPER:
            raise ValueError(f"{self} needs rows of a multiple of {SUPER} weights, not {k}")
        scales = ((*lead, k // self.group * self.scale_bits // 8), torch.uint8)
        tensors: Layout = {
            "codes": ((*lead, k * self.bits // 8), torch.uint8),
            "scale": scales,
            "scale2": ((*lead, k // SUPER * (2 if self.minimum else 1)), torch.float16),
        }
        return {**tensors, "zero": scales} if self.minimum else tensors

    def _encode(self, w: Tensor, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raise ValueError(f"{self} is read from GGUF files only; quantize to an integer format with a group")

    def _scales(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """One scale and one minimum per group, fp32 [..., G]; exact: 11 bits times at most 8."""
        levels = parts["scale2"].float()
        if not self.minimum:
            s = unpack(parts["scale"], self.scale_bits).float() - 2 ** (self.scale_bits - 1)
            return _spread(levels, s), None
        d, dmin = grouped(levels, 2).unbind(-1)
        s, m = (unpack(parts[name], self.scale_bits).float() for name in ("scale", "zero"))
        return _spread(d, s), _spread(dmin, m)

    def _decode(self, parts: Mapping[str, Tensor], k: int) -> Tensor:
        scale, minimum = self._scales(parts)
        values = grouped(unpack(parts["codes"], self.bits), self.group).float()
        if minimum is None:
            return values.sub_(2 ** (self.bits - 1)).mul_(scale[..., None]).flatten(-2)
        return values.mul_(scale[..., None]).sub_(minimum[..., None]).flatten(-2)

    @property
    def wide(self) -> AffineFormat:
        """The format of the same codes with one level of FP32 scales and minima."""
        single = torch.float32
        if not self.minimum:
            return AffineFormat(self.bits, self.group, True, scale_dtype=single)
        return AffineFormat(self.bits, self.group, False, scale_dtype=single, zero_dtype=single, minimum=True)

    def widen(self, q: QTensor) -> QTensor:
        """The equal weight in the format `wide`: exact, and larger by what FP32 takes."""
        scale, minimum = self._scales(q.tensors())
        return replace(q, format=self.wide, scale=scale, zero=minimum, scale2=None)


def _spread(levels: Tensor, small: Tensor) -> Tensor:
    """[..., S] times [..., G], G/S neighbours at a time."""
    return (grouped(small, small.shape[-1] // levels.shape[-1]) * levels[..., None]).flatten(-2)
