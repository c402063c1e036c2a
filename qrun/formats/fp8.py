"""FP8 (e4m3fn) weights with one scale per 128x128 block, as FastDeploy and DeepSeek store them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from qrun.formats.base import Format, Layout, Shape

FP8_MAX: Final = 448.0
_BLOCK: Final = 128


@dataclass(frozen=True)
class Fp8BlockFormat(Format):
    """codes: float8_e4m3fn [..., N, K]; scale: FP32 multiplier [..., ceil(N/128), ceil(K/128)], absmax/448.

    A block of zeros has scale 1. Blocks at the edges may be ragged.
    """

    family: ClassVar[str] = "fp8"
    row_align: ClassVar[int] = _BLOCK

    def __str__(self) -> str:
        return "fp8 128x128"

    def layout(self, shape: Shape) -> Layout:
        *lead, n, k = shape
        return {
            "codes": (shape, torch.float8_e4m3fn),
            "scale": ((*lead, -(-n // _BLOCK), -(-k // _BLOCK)), torch.float32),
        }

    def _rows_per(self, name: str) -> int:
        return _BLOCK if name == "scale" else 1

    def _encode(self, w: Tensor, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        n, k = w.shape
        padded = torch.nn.functional.pad(w.float(), (0, -k % _BLOCK, 0, -n % _BLOCK))
        blocks = padded.view(-1, _BLOCK, padded.shape[1] // _BLOCK, _BLOCK)
        scale, inverse = fp8_scale(blocks.abs().amax((1, 3), keepdim=True))
        codes = to_fp8(blocks.mul_(inverse)).view(padded.shape)[:n, :k]
        return {"codes": codes, "scale": scale[:, 0, :, 0]}

    def _decode(self, parts: Mapping[str, Tensor], k: int) -> Tensor:
        scale = parts["scale"].repeat_interleave(_BLOCK, -1)[:, :k]
        return parts["codes"].float().mul_(scale)


def fp8_scale(amax: Tensor) -> tuple[Tensor, Tensor]:
    """The multiplier amax/448 and its inverse 448/amax; 1 and 1 where amax is 0 or too small to invert."""
    inverse = FP8_MAX / amax
    usable = torch.isfinite(inverse)
    return torch.where(usable, amax / FP8_MAX, 1.0), torch.where(usable, inverse, 1.0)


def to_fp8(x: Tensor) -> Tensor:
    """fp32 to e4m3fn, to nearest even, saturating (torch's own cast overflows to NaN). Clobbers ``x``."""
    return x.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
