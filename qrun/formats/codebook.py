"""Four-bit floats: sixteen fixed values times a scale per group. NF4, FP4, and the OCP and NVIDIA block formats."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import ClassVar, Final

import torch
from torch import Tensor

from qrun.formats.base import Format, Layout, QTensor, Shape, columns_of_groups
from qrun.formats.fp8 import FP8_MAX, to_fp8
from qrun.formats.packing import grouped, pack, unpack
from qrun.formats.search import Start, reciprocal, search

NF4: Final = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The NormalFloat values of the QLoRA paper, in code order."""
E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The OCP FP4 values, in code order: sign, two exponent bits, one mantissa bit."""

_FINE: Final = 4096  # steps of the table with which the search snaps; final codes are exact


@dataclass(frozen=True)
class CodebookFormat(Format):
    """w = values[code] · scale, with K padded to Kp, a multiple of the group.

    codes: u8 [..., N, Kp/2], even k in the low nibble; padding decodes to 0. scale: ``scale_dtype`` [..., N, G].
    A number halfway between two values goes to the one with the even code.
    """

    family: ClassVar[str] = "codebook"
    name: str
    values: tuple[float, ...]
    group: int
    scale_dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"{self.name} g{self.group}"

    def codebook(self, device: torch.device | str = "cpu") -> Tensor:
        """The value of each code, fp32 [16]."""
        return torch.tensor(self.values, device=device)

    def padded(self, k: int) -> int:
        """Kp, the number of stored columns for K logical ones."""
        return k + -k % self.group

    def layout(self, shape: Shape) -> Layout:
        *lead, k = shape
        kp = self.padded(k)
        return {
            "codes": ((*lead, kp // 2), torch.uint8),
            "scale": ((*lead, kp // self.group), self.scale_dtype),
        }

    def scales(self, q: QTensor) -> Tensor:
        """The scale of each group, fp32 [..., N, G]."""
        return self._load(q.tensors())

    def _starts(self, absmax: Tensor) -> list[Tensor]:
        """Scales [M] to try, not yet rounded."""
        top = max(self.values)
        return [absmax * (ratio / top) for ratio in (1.0, 0.9, 0.8)]

    def _store(self, scale: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        """fp32 scales as they are stored."""
        del shared
        return scale.to(self.scale_dtype)

    def _load(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Stored scales as fp32."""
        return parts["scale"].float()

    def _encode(self, w: Tensor, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        groups = columns_of_groups(w, self.group)  # [g, M]
        fine = _fine_table(self.values, groups.device)
        top = max(self.values)

        def snap(t: Tensor, zero: Tensor) -> object:
            step = t.mul_(_FINE / top).clamp_(-_FINE, _FINE).add_(_FINE + 0.5).to(torch.int32)
            return torch.index_select(fine, 0, step.view(-1), out=t.view(-1))

        def rounded(scale: Tensor) -> Tensor:
            return self._load({**shared, "scale": self._store(scale[:, None], shared)})[:, 0]

        scales = [rounded(scale) for scale in self._starts(groups.abs().amax(0))]
        nothing = torch.zeros_like(scales[0])
        scale = search(groups, (Start(scale, nothing) for scale in scales), snap, rounded).scale
        codes = _nearest(groups.mul_(reciprocal(scale)), self.values)
        return {
            "codes": pack(codes.t().reshape(w.shape[0], -1), 4),
            "scale": self._store(scale.view(w.shape[0], -1), shared),
        }

    def _decode(self, parts: Mapping[str, Tensor], k: int) -> Tensor:
        codes = unpack(parts["codes"], 4)
        values = self.codebook(codes.device).index_select(0, codes.reshape(-1).int()).view(codes.shape)
        scale = self._load(parts)[..., None]  # [n, G, 1]
        return grouped(values, self.group).mul_(scale).flatten(-2)[..., :k]


@dataclass(frozen=True)
class MxFp4Format(CodebookFormat):
    """OCP MXFP4: FP4 in groups of 32 with power-of-two scales; scale: u8 [..., N, G], E8M0 (2^(code − 127)).

    The standard's exponent, floor(log2 absmax) − 2, clips up to a quarter off the largest value; the next one, which
    does not, is taken where its error is smaller.
    """

    name: str = "mxfp4"
    values: tuple[float, ...] = E2M1
    group: int = 32
    scale_dtype: torch.dtype = torch.uint8

    def _starts(self, absmax: Tensor) -> list[Tensor]:
        exponent = torch.frexp(absmax).exponent - 1  # floor(log2)
        standard = torch.where(absmax > 0, torch.ldexp(torch.ones_like(absmax), exponent - 2), 0.0)
        return [standard, 2 * standard]

    def _store(self, scale: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        mantissa, exponent = torch.frexp(scale)  # mantissa in [0.5, 1)
        nearest = torch.where(mantissa < 0.5**0.5, exponent - 1, exponent)
        return torch.where(scale > 0, (nearest + 127).clamp(0, 254), 0).to(torch.uint8)

    def _load(self, parts: Mapping[str, Tensor]) -> Tensor:
        exponent = parts["scale"].float() - 127
        return torch.ldexp(torch.ones_like(exponent), exponent)


@dataclass(frozen=True)
class NvFp4Format(CodebookFormat):
    """NVFP4: FP4 in groups of 16; scale: e4m3fn [..., N, G], times scale2: FP32 [..., 1, 1], absmax/(6·448).

    The largest value of a group is mapped to 6 or to 4, whichever has the smaller error. With ``divides``, as some
    checkpoints have it, scale2 is what the scales are divided by.
    """

    name: str = "nvfp4"
    values: tuple[float, ...] = E2M1
    group: int = 16
    scale_dtype: torch.dtype = torch.float8_e4m3fn
    divides: bool = False

    def layout(self, shape: Shape) -> Layout:
        return {**super().layout(shape), "scale2": ((*shape[:-2], 1, 1), torch.float32)}

    def _rows_per(self, name: str) -> int:
        return sys.maxsize if name == "scale2" else 1

    def _shared(self, amax: Tensor) -> dict[str, Tensor]:
        if self.divides:
            raise ValueError(f"{self!r} is read from checkpoints only")
        scale2 = amax / (max(self.values) * FP8_MAX)
        return {"scale2": torch.where(torch.isfinite(1 / scale2), scale2, 1.0).view(1, 1)}

    def _starts(self, absmax: Tensor) -> list[Tensor]:
        return [absmax / 6, absmax / 4]

    def _store(self, scale: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        return to_fp8(scale / shared["scale2"])

    @property
    def independent(self) -> Format | None:
        return CodebookFormat(self.name, self.values, self.group, torch.float32)

    def apart(self, q: QTensor) -> QTensor:
        assert self.independent is not None, "scales by themselves are always possible"
        return replace(q, format=self.independent, scale=self._load(q.tensors()), scale2=None)

    def _load(self, parts: Mapping[str, Tensor]) -> Tensor:
        scale, scale2 = parts["scale"].float(), parts["scale2"]
        return scale / scale2 if self.divides else scale * scale2


@lru_cache
def _boundaries(values: tuple[float, ...]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Codes in ascending order of value, and the largest fp32 number that still belongs to each but the last."""
    code_of = {value: code for code, value in reversed(list(enumerate(values)))}  # +0 wins over -0
    limits: list[float] = []
    for low, high in pairwise(sorted(code_of)):
        middle = torch.tensor((low + high) / 2)
        below = torch.nextafter(middle, torch.tensor(-torch.inf))
        limits.append((middle if code_of[low] % 2 == 0 else below).item())
    return tuple(code_of[value] for value in sorted(code_of)), tuple(limits)


def _nearest(t: Tensor, values: tuple[float, ...]) -> Tensor:
    """u8 codes of the values nearest to ``t``."""
    order, limits = _boundaries(values)
    place = torch.bucketize(t, torch.tensor(limits, device=t.device), out_int32=True)
    codes = torch.tensor(order, dtype=torch.uint8, device=t.device)
    return codes.index_select(0, place.view(-1)).view(t.shape)


def _fine_table(values: tuple[float, ...], device: torch.device) -> Tensor:
    """The value nearest to each of the 2·_FINE + 1 steps from −top to top."""
    steps = torch.arange(-_FINE, _FINE + 1, device=device) * (max(values) / _FINE)
    return torch.tensor(values, device=device).index_select(0, _nearest(steps, values).int())
