"""FP8 (e4m3fn) weights with a scale per block: 128x128 as FastDeploy and DeepSeek have them, a row, a part of one."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Final

import torch
from torch import Tensor

from qrun.formats.base import Format, Layout, QTensor, Shape

FP8_MAX: Final = 448.0
_BLOCK: Final = 128


@dataclass(frozen=True)
class Fp8Format(Format):
    """codes: float8_e4m3fn [..., N, K]; scale: FP32 multiplier [..., ceil(N/rows), ceil(K/columns)], absmax/448.

    ``rows`` or ``columns`` 0 means all of them; blocks at the edges may be ragged. A block of zeros has scale 1.
    """

    family: ClassVar[str] = "fp8"
    block_rows: int = _BLOCK
    block_columns: int = _BLOCK

    def __post_init__(self) -> None:
        if self.block_rows < 1 or self.block_columns < 0:
            raise ValueError(f"no such fp8 format: {self!r}")

    @property
    def row_align(self) -> int:
        """Rows are encoded in runs that begin at multiples of it."""
        return self.block_rows

    @property
    def blocks(self) -> bool:
        """Whether scales are of 128x128 blocks, as FastDeploy and DeepSeek store them."""
        return (self.block_rows, self.block_columns) == (_BLOCK, _BLOCK)

    def __str__(self) -> str:
        if (self.block_rows, self.block_columns) == (1, 0):
            return "fp8 channel"
        return f"fp8 {self.block_rows}x{self.block_columns or 'K'}"

    def _groups(self, k: int) -> int:
        return -(-k // self.block_columns) if self.block_columns else 1

    def layout(self, shape: Shape) -> Layout:
        *lead, n, k = shape
        return {
            "codes": (shape, torch.float8_e4m3fn),
            "scale": ((*lead, -(-n // self.block_rows), self._groups(k)), torch.float32),
        }

    def _rows_per(self, name: str) -> int:
        return self.block_rows if name == "scale" else 1

    def _encode(self, w: Tensor, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        n, k = w.shape
        high, wide = self.block_rows, self.block_columns or k
        padded = torch.nn.functional.pad(w.float(), (0, -k % wide, 0, -n % high))
        blocks = padded.view(-1, high, padded.shape[1] // wide, wide)
        scale, inverse = fp8_scale(blocks.abs().amax((1, 3), keepdim=True))
        codes = to_fp8(blocks.mul_(inverse)).view(padded.shape)[:n, :k]
        return {"codes": codes, "scale": scale[:, 0, :, 0]}

    def _decode(self, parts: Mapping[str, Tensor], k: int) -> Tensor:
        scale = parts["scale"]
        if self.block_columns:
            scale = scale.repeat_interleave(self.block_columns, -1)[:, :k]
        return parts["codes"].float().mul_(scale)

    @property
    def independent(self) -> Format | None:
        return None if self.block_rows == 1 else Fp8Format(1, self.block_columns)

    def apart(self, q: QTensor) -> QTensor:
        form = self.independent
        if form is None:
            return q
        assert q.scale is not None, "fp8 has scales"
        return replace(q, format=form, scale=q.scale.repeat_interleave(self.block_rows, -2)[: q.shape[-2]])


def fp8_scale(amax: Tensor) -> tuple[Tensor, Tensor]:
    """The multiplier amax/448 and its inverse 448/amax; 1 and 1 where amax is 0 or too small to invert."""
    inverse = FP8_MAX / amax
    usable = torch.isfinite(inverse)
    return torch.where(usable, amax / FP8_MAX, 1.0), torch.where(usable, inverse, 1.0)


def to_fp8(x: Tensor) -> Tensor:
    """fp32 to e4m3fn, to nearest even, saturating (torch's own cast overflows to NaN). Clobbers ``x``."""
    return x.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
