"""A weight as the GPU kernels read it: raw tensors, rows padded, codes in planes of a tile. It multiplies nothing.

A tile of 4-bit codes is 128 consecutive k of a row in 16 int32 words, so that a plane of 32 values comes out of 16
words by one mask, already in pairs for 16-bit arithmetic:

    int4      nibble p of each half-word of word i: k = 32p + 2i in the low half-word, 32p + 2i + 1 in the high one
    codebook  byte p of word i: k = 32p + 2i in its low nibble, 32p + 2i + 1 in the high one; planes of 16 have 8 words
    int2      256 values in 16 words, bits 2p and 2p + 1 of each half-word, as int4
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal, Self

import torch
from torch import Tensor

Kind = Literal["int2", "int4", "codebook", "int8", "fp8", "plain"]
BITS = {"int2": 2, "int4": 4, "codebook": 4}
ROW_ALIGN = 128
"""Rows are padded with zeros to a multiple of this, so no kernel masks a weight."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """A weight [n, k], or a stack of them with one leading dimension on every tensor but ``table`` and ``scale2``.

    codes: int32 [Np, Kp·bits/32] for int2, int4 and codebook; int8 [Np, Kp]; uint8 [Np, Kp] for e4m3; 16-bit floats.
    scale: [G, Np], one per ``group`` of k, in BF16, or for codebooks also uint8, E8M0 for groups of 32 and e4m3 for
        those of 16; float32 [1, Np] per channel (``group`` 0); float32 [Np/128, Kp/128] for fp8.
    zero: uint8 [G, Np], or none: 2 for int2, 8 for int4; a zero of int8 counts from -128.
    values: the codebook, and table the same as float32 [16]. scale2: float32 [1] or [E, 1], a factor of the whole.
    pairs: 0, or rows come as that many of a gate and then as many of its up; n counts both.
    """

    kind: Kind
    n: int
    k: int
    codes: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None
    table: Tensor | None = None
    scale2: Tensor | None = None
    group: int = 0
    plane: int = 32
    values: tuple[float, ...] = ()
    pairs: int = 0

    @property
    def tile(self) -> int:
        """k values that the kernels take at a time; the padded width is a multiple of it."""
        return self.plane * 16 // BITS[self.kind] if self.kind in BITS else 128

    @property
    def rows(self) -> int:
        """Np, the stored rows."""
        return self.codes.shape[-2]

    @property
    def width(self) -> int:
        """Kp, the stored columns."""
        return self.codes.shape[-1] * (32 // BITS[self.kind] if self.kind in BITS else 1)

    @property
    def experts(self) -> int:
        """Weights in the stack; 0 for a weight by itself."""
        return self.codes.shape[0] if self.codes.ndim == 3 else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def __getitem__(self, expert: int) -> Self:
        """One weight of a stack, as a view."""
        return replace(self, **{name: t if name == "table" else t[expert] for name, t in self.tensors().items()})

    def holding(self, tensors: Mapping[str, Tensor]) -> Self:
        """The same weight in other tensors."""
        return replace(self, **tensors)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, those that are there."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def pack_planes(codes: Tensor, kind: Kind, plane: int = 32) -> Tensor:
    """uint8 codes [..., K], K a multiple of the tile, to int32 words [..., K·bits/32]."""
    bits = BITS[kind]
    planes = 16 // bits
    lead = codes.shape[:-1]
    pairs = codes.reshape(*lead, -1, planes, plane // 2, 2)  # [..., tile, p, i, half]
    words = torch.zeros(*pairs.shape[:-3], plane // 2, dtype=torch.int32, device=codes.device)
    for p in range(planes):
        for half in range(2):
            words |= pairs[..., p, :, half].to(torch.int32) << _shift(kind, p, half)
    return words.flatten(-2)


def unpack_planes(words: Tensor, kind: Kind, plane: int = 32) -> Tensor:
    """The inverse of :func:`pack_planes`: uint8 [..., K]."""
    bits = BITS[kind]
    tiles = words.reshape(*words.shape[:-1], -1, plane // 2)
    fields_of = [
        torch.stack([(tiles >> _shift(kind, p, half)) & ((1 << bits) - 1) for half in range(2)], -1)
        for p in range(16 // bits)
    ]
    return torch.stack(fields_of, -3).to(torch.uint8).flatten(-4)


def _shift(kind: Kind, plane: int, half: int) -> int:
    """Where in a word the code of a pair's half stands."""
    return 8 * plane + 4 * half if kind == "codebook" else BITS[kind] * plane + 16 * half
