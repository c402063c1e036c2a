"""Formats for the cache: one head's vector for one token, [..., D], to codes and scales and back.

All scales are dynamic; codes are computed against the scale as stored. Knows nothing of heads, positions or storage.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Final

import torch
from torch import Tensor

from qrun.formats.base import Layout
from qrun.formats.fp8 import fp8_scale, to_fp8
from qrun.formats.packing import grouped, pack, unpack
from qrun.formats.search import reciprocal
from qrun.recipe import CacheType

KV_GROUP: Final = 32
"""Consecutive values of a head that share a scale, and that the Hadamard rotation mixes."""


@dataclass(frozen=True)
class KVFormat(ABC):
    """How K or V vectors are stored, ``name`` being what the recipe calls it."""

    name: CacheType
    rotated: ClassVar[bool] = False
    """Whether codes hold :func:`hadamard32` of the values, so that q or the output may be rotated instead."""

    @abstractmethod
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Codes and scales, as :meth:`layout` has them, of ``x`` [..., D], floating point."""

    @abstractmethod
    def decode(self, codes: Tensor, scale: Tensor | None, head_dim: int) -> Tensor:
        """The values in model space, fp32 [..., head_dim]."""

    @abstractmethod
    def layout(self, head_dim: int) -> Layout:
        """codes, and scale where there is one: trailing shape and dtype for one vector."""

    def bits_per_value(self, head_dim: int) -> float:
        """Stored bits per value, scales and padding included."""
        return sum(8 * size[0] * dtype.itemsize for size, dtype in self.layout(head_dim).values()) / head_dim

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class PlainKV(KVFormat):
    """The values themselves: codes ``dtype`` [D]."""

    dtype: torch.dtype

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return x.to(self.dtype), None

    def decode(self, codes: Tensor, scale: Tensor | None, head_dim: int) -> Tensor:
        return codes.float()

    def layout(self, head_dim: int) -> Layout:
        return {"codes": ((head_dim,), self.dtype)}


@dataclass(frozen=True)
class Int8KV(KVFormat):
    """codes int8 [Dp], D padded to a multiple of 32; scale BF16 [Dp/32], absmax/127. Ties to even."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        groups = _groups(x)  # [..., G, 32]
        scale = (groups.abs().amax(-1, keepdim=True) / 127).bfloat16()
        codes = groups.mul(reciprocal(scale.float())).round_().clamp_(-127, 127)
        return codes.to(torch.int8).flatten(-2), scale.squeeze(-1)

    def decode(self, codes: Tensor, scale: Tensor | None, head_dim: int) -> Tensor:
        return _scaled(codes.float(), scale).flatten(-2)[..., :head_dim]

    def layout(self, head_dim: int) -> Layout:
        count = -(-head_dim // KV_GROUP)
        return {"codes": ((count * KV_GROUP,), torch.int8), "scale": ((count,), torch.bfloat16)}


@dataclass(frozen=True)
class Int4KV(KVFormat):
    """Rotated by :func:`hadamard32`, then ggml's Q4_0 rule: w = (q − 8) · scale.

    codes u8 [Dp/2], even index in the low nibble; scale BF16 [Dp/32], the value of largest magnitude (of two, the
    positive one) over −8, so negative as often as not; q = floor(x/scale + 8.5) within 0 … 15.
    """

    rotated: ClassVar[bool] = True

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        groups = hadamard32(_groups(x))
        low, high = torch.aminmax(groups, dim=-1, keepdim=True)
        scale = (torch.where(-low > high, low, high) / -8).bfloat16()
        codes = groups.mul_(reciprocal(scale.float())).add_(8.5).floor_().clamp_(0, 15)
        return pack(codes.to(torch.uint8).flatten(-2), 4), scale.squeeze(-1)

    def decode(self, codes: Tensor, scale: Tensor | None, head_dim: int) -> Tensor:
        values = _scaled(unpack(codes, 4).float().sub_(8), scale)
        return hadamard32(values).flatten(-2)[..., :head_dim]

    def layout(self, head_dim: int) -> Layout:
        count = -(-head_dim // KV_GROUP)
        return {"codes": ((count * KV_GROUP // 2,), torch.uint8), "scale": ((count,), torch.bfloat16)}


@dataclass(frozen=True)
class Fp8KV(KVFormat):
    """codes float8_e4m3fn [D]; scale FP32 [1], absmax/448 of the whole vector (1 for zeros)."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        values = x.float()
        scale, inverse = fp8_scale(values.abs().amax(-1, keepdim=True))
        return to_fp8(values * inverse), scale

    def decode(self, codes: Tensor, scale: Tensor | None, head_dim: int) -> Tensor:
        assert scale is not None
        return codes.float().mul_(scale)

    def layout(self, head_dim: int) -> Layout:
        return {"codes": ((head_dim,), torch.float8_e4m3fn), "scale": ((1,), torch.float32)}


_FORMATS: Final[Mapping[CacheType, KVFormat]] = {
    "bf16": PlainKV("bf16", torch.bfloat16),
    "fp32": PlainKV("fp32", torch.float32),
    "int8": Int8KV("int8"),
    "int4": Int4KV("int4"),
    "fp8": Fp8KV("fp8"),
}


def kv_format(name: CacheType) -> KVFormat:
    """The cache format that a recipe's ``k`` or ``v`` names."""
    return _FORMATS[name]


def hadamard32(x: Tensor) -> Tensor:
    """Each run of 32 along the last dimension (a multiple of 32) times the orthonormal Hadamard matrix; fp32.

    Its own inverse. Dot products of two rotated vectors are those of the vectors.
    """
    return (grouped(x.float(), KV_GROUP) @ _hadamard(x.device)).view(x.shape)


@lru_cache
def _hadamard(device: torch.device) -> Tensor:
    """Sylvester's matrix over sqrt(32)."""
    matrix = torch.ones(1, 1, device=device)
    while matrix.shape[0] < KV_GROUP:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / KV_GROUP**0.5


def _groups(x: Tensor) -> Tensor:
    """[..., D] as fp32 [..., G, 32], zeros appended."""
    return grouped(torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % KV_GROUP)), KV_GROUP)


def _scaled(values: Tensor, scale: Tensor | None) -> Tensor:
    assert scale is not None
    return grouped(values, KV_GROUP).mul_(scale.float()[..., None])
