"""The KV cache: keys and values of every position, each layer's in its KV formats.

It knows storage and lengths. What a stored number means is its KVFormat's affair, and who attends is the backend's.
"""

import torch
from torch import Tensor

from qrun.formats.kv import KVFormat


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

    @property
    def bytes_per_token(self) -> int:
        parts = [self.codes] if self.scale is None else [self.codes, self.scale]
        return sum(p[:, :1].nbytes for p in parts)


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

    def truncate(self, length: int) -> None:
        """Forget every position from ``length`` on."""
        self.length = min(self.length, length)

    @property
    def bytes_per_token(self) -> int:
        """What one position takes over all layers, scales included."""
        return sum(layer.k.bytes_per_token + layer.v.bytes_per_token for layer in self.layers)
