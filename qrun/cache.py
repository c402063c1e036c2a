"""The KV cache: keys and values of every position, each layer's in its KV formats.

It knows storage and lengths. What a stored number means is its KVFormat's affair, and who attends is the backend's.
"""

from typing import Self

import torch
from torch import Tensor

from qrun.formats.kv import KVFormat

PIECE = 512
"""Positions of a layer that are converted at a time."""


class KVStore:
    """One layer's keys or values: codes (and scales) [kv_heads, capacity, …] in one KV format.

    Memory is reserved at once and, on a CPU, taken from the system only as positions are written.
    """

    def __init__(self, kind: KVFormat, kv_heads: int, head_dim: int, capacity: int, device: torch.device) -> None:
        self.format = kind
        self.head_dim = head_dim
        made = {
            name: torch.empty((kv_heads, capacity, *shape), dtype=dtype, device=device)
            for name, (shape, dtype) in kind.layout(head_dim).items()
        }
        self.codes = made["codes"]
        self.scale = made.get("scale")

    @classmethod
    def of(cls, kind: KVFormat, head_dim: int, codes: Tensor, scale: Tensor | None) -> Self:
        """What is stored already, as `KVFormat.layout` has it behind [kv_heads, positions]."""
        made = cls(kind, 0, head_dim, 0, codes.device)
        made.codes, made.scale = codes, scale
        return made

    def parts(self) -> dict[str, Tensor]:
        """codes, and scale where there is one, by the names of `KVFormat.layout`."""
        return {"codes": self.codes} if self.scale is None else {"codes": self.codes, "scale": self.scale}

    def write(self, positions: Tensor, x: Tensor) -> None:
        """Store x [S, kv_heads, D] at positions [S]."""
        codes, scale = self.format.encode(x.transpose(0, 1))
        self.codes[:, positions] = codes
        if self.scale is not None and scale is not None:
            self.scale[:, positions] = scale

    def read(self, start: int, stop: int) -> Tensor:
        """Positions start … stop-1 as float32 [kv_heads, stop-start, D]."""
        scale = None if self.scale is None else self.scale[:, start:stop]
        return self.format.decode(self.codes[:, start:stop], scale, self.head_dim)

    def take(self, other: "KVStore", length: int) -> None:
        """Hold what another holds at its first ``length`` positions, encoded anew where it has another format."""
        if other.format == self.format:
            self.codes[:, :length].copy_(other.codes[:, :length])
            if self.scale is not None and other.scale is not None:
                self.scale[:, :length].copy_(other.scale[:, :length])
            return
        for start in range(0, length, PIECE):
            stop = min(start + PIECE, length)
            codes, scale = self.format.encode(other.read(start, stop))
            self.codes[:, start:stop] = codes
            if self.scale is not None and scale is not None:
                self.scale[:, start:stop] = scale

    def converted(self, kind: KVFormat, length: int) -> "KVStore":
        """Its first ``length`` positions in another format; itself where it has that format already."""
        if kind == self.format:
            return self
        kv_heads, capacity = self.codes.shape[:2]
        made = KVStore(kind, kv_heads, self.head_dim, capacity, self.codes.device)
        made.take(self, length)
        return made

    @property
    def bytes_per_token(self) -> int:
        return sum(part[:, :1].nbytes for part in self.parts().values())


class LayerCache:
    """The keys and values of one layer."""

    def __init__(self, k: KVStore, v: KVStore) -> None:
        self.k = k
        self.v = v

    def write(self, positions: Tensor, k: Tensor, v: Tensor) -> None:
        """Store keys and values [S, kv_heads, D] at positions [S]."""
        self.k.write(positions, k)
        self.v.write(positions, v)

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values of positions start … stop-1, float32 [kv_heads, stop-start, D]."""
        return self.k.read(start, stop), self.v.read(start, stop)


class KVCache:
    """All layers of one conversation. ``length`` positions are filled; the rest is room."""

    def __init__(
        self,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        k: KVFormat,
        v: KVFormat,
        device: torch.device,
    ) -> None:
        self.capacity = capacity
        self.length = 0
        self.layers = [
            LayerCache(
                KVStore(k, kv_heads, head_dim, capacity, device), KVStore(v, kv_heads, head_dim, capacity, device)
            )
            for _ in range(layers)
        ]

    def convert(self, k: KVFormat, v: KVFormat) -> None:
        """Encode what is filled anew in other formats: a layer at a time, each in new memory before its old one goes.

        An error leaves some layers converted and some not, and the contents of no further use.
        """
        for i, layer in enumerate(self.layers):
            self.layers[i] = LayerCache(layer.k.converted(k, self.length), layer.v.converted(v, self.length))

    def truncate(self, length: int) -> None:
        """Forget every position from ``length`` on."""
        self.length = min(self.length, length)

    @property
    def bytes_per_token(self) -> int:
        """What one position takes over all layers, scales included."""
        return sum(layer.k.bytes_per_token + layer.v.bytes_per_token for layer in self.layers)
