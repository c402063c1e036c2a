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


@dataclass(frozen=True)
class AffineFormat(Format):
    """w = (q − zero) · scale, with K padded to Kp, a multiple of the group (per channel: of 32).

    codes: int8 [..., N, Kp] for symmetric 8 bits (zero is 0); else u8 [..., N, Kp·bits/8], a little-endian bit stream,
        symmetric codes stored with 2^(bits−1) added. Padding decodes to 0.
    scale: BF16 [..., N, G]; per channel (``group`` 0) FP32 [..., N, 1].
    zero: u8 [..., N, G], absent when symmetric.
    """

    family: ClassVar[str] = "affine"
    bits: int = 4
    group: int = 64
    symmetric: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8 or self.group % 8 or self.group < 0 or (self.group == 0 and not self.symmetric):
            raise ValueError(f"no such integer format: {self!r}")

    def __str__(self) -> str:
        return str(WeightScheme("int", self.bits, self.group, self.symmetric))

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
        if self.group == 0:
            scale = ((*lead, 1), torch.float32)
        else:
            scale = ((*lead, kp // self.group), torch.bfloat16)
        codes = ((*lead, kp * self.bits // 8), torch.int8 if self.signed else torch.uint8)
        tensors: Layout = {"codes": codes, "scale": scale}
        return tensors if self.symmetric else {**tensors, "zero": (scale[0], torch.uint8)}

    def _encode(self, w: Tensor, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
        if not self.signed:
            values -= 2 ** (self.bits - 1) if self.symmetric else parts["zero"].float()[..., None]
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
