"""Integers with a scale, and maybe a zero point: int2 … int8, per channel or per group.

Per channel is FastDeploy's arithmetic to the letter (absmax, ties away from zero); per group is the search of
:mod:`qrun.formats.search`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qrun.formats.base import Format, Layout, Shape, columns_of_groups, pad_columns
from qrun.formats.packing import grouped, pack, unpack
from qrun.formats.search import affine_search, reciprocal
from qrun.recipe import WeightScheme

_CHANNEL_ALIGN = 32
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class AffineFormat(Format):
    """w = (q − zero) · scale, or q · scale − zero with ``minimum``; K padded to Kp, a multiple of the group (per
    channel: of 32).

    codes: int8 [..., N, Kp] for symmetric 8 bits (zero is 0); else u8 [..., N, Kp·bits/8], a little-endian bit stream,
        symmetric codes stored with 2^(bits−1) added. What padding decodes to is of no account.
    scale: ``scale_dtype`` [..., N, G]; by default BF16, and per channel (``group`` 0) FP32 [..., N, 1].
    zero: ``zero_dtype`` [..., N, G], absent when symmetric.

    Other dtypes than the default ones, and minima, are of other tools' checkpoints; nothing is quantized to them.
    """

    family: ClassVar[str] = "affine"
    bits: int = 4
    group: int = 64
    symmetric: bool = False
    scale_dtype: torch.dtype | None = None
    zero_dtype: torch.dtype = torch.uint8
    minimum: bool = False

    def __post_init__(self) -> None:
        channel = torch.float32 if self.group == 0 else torch.bfloat16
        object.__setattr__(self, "scale_dtype", self.scale_dtype or channel)  # equal formats compare equal
        plain = self.zero_dtype == torch.uint8 and not self.minimum
        if (
            not 2 <= self.bits <= 8
            or self.group % 8
            or self.group < 0
            or (self.group == 0 and not self.symmetric)
            or (self.symmetric and not plain)
            or (self.minimum and not self.zero_dtype.is_floating_point)
            or self.scale_dtype not in _FLOATS
            or self.zero_dtype not in (torch.uint8, *_FLOATS)
        ):
            raise ValueError(f"no such integer format: {self!r}")

    def __str__(self) -> str:
        return str(WeightScheme("int", self.bits, self.group, self.symmetric))

    @property
    def ours(self) -> bool:
        """Whether this is a format that weights are quantized to: the default dtypes, integer zeros."""
        return self == AffineFormat(self.bits, self.group, self.symmetric)

    @property
    def signed(self) -> bool:
        """Whether the codes are plain int8 values without an offset."""
        return self.bits == 8 and self.symmetric

    def padded(self, k: int) -> int:
        """Kp, the number of stored columns for K logical ones."""
        return k + -k % (self.group or _CHANNEL_ALIGN)

    def layout(self, shape: Shape) -> Layout:
        *lead, k = shape
        kp = self.padded(k)
        assert self.scale_dtype is not None, "set when it was made"
        scale = ((*lead, kp // self.group if self.group else 1), self.scale_dtype)
        codes = ((*lead, kp * self.bits // 8), torch.int8 if self.signed else torch.uint8)
        tensors: Layout = {"codes": codes, "scale": scale}
        return tensors if self.symmetric else {**tensors, "zero": (scale[0], self.zero_dtype)}

    def _encode(self, w: Tensor, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.ours:
            raise ValueError(f"{self!r} is read from checkpoints only; quantize to one with the default dtypes")
        if self.group == 0:
            codes, scale = _channel(w, 2 ** (self.bits - 1) - 1)
            codes = pad_columns(codes, _CHANNEL_ALIGN)
            return {"codes": self._store(codes if self.signed else codes.add_(2 ** (self.bits - 1))), "scale": scale}
        codes, found = affine_search(columns_of_groups(w, self.group), self.bits, self.symmetric)
        if self.signed:
            codes -= found.zero
        stored = self._store(codes.t().reshape(w.shape[0], -1))
        tensors = {"codes": stored, "scale": found.scale.view(w.shape[0], -1).bfloat16()}
        return tensors if self.symmetric else {**tensors, "zero": found.zero.view(w.shape[0], -1).to(torch.uint8)}

    def _store(self, codes: Tensor) -> Tensor:
        return codes.to(torch.int8) if self.signed else pack(codes.to(torch.uint8), self.bits)

    def _decode(self, parts: Mapping[str, Tensor], k: int) -> Tensor:
        codes = parts["codes"] if self.signed else unpack(parts["codes"], self.bits)
        scale = parts["scale"].float()[..., None]  # [n, G, 1]
        values = grouped(codes, codes.shape[-1] // scale.shape[-2]).float()
        zero = 2 ** (self.bits - 1) if self.symmetric else parts["zero"].float()[..., None]
        if self.minimum:
            return values.mul_(scale).sub_(zero).flatten(-2)[..., :k]
        if not self.signed:
            values -= zero
        return values.mul_(scale).flatten(-2)[..., :k]


def _channel(w: Tensor, bound: int) -> tuple[Tensor, Tensor]:
    """FastDeploy's per-channel codes (fp32 integers within ±bound) and scales (fp32 holding ``w``'s dtype's values)."""
    values = w.float()
    absmax = values.abs().amax(-1, keepdim=True)
    scaled = (values / absmax.clamp(min=torch.finfo(torch.float32).tiny)).mul_(bound)
    magnitude = scaled.abs()
    codes = magnitude.floor()
    codes += magnitude.sub_(codes) >= 0.5  # ties away from zero; x + 0.5 would round 0.49999997 up
    exact = absmax / bound
    stored = exact.to(w.dtype).float()
    return codes.copysign_(scaled).clamp_(-bound, bound), torch.where(reciprocal(stored) > 0, stored, exact)
