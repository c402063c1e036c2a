"""FastDeploy's WINT2: four weights from one byte, a straight line through 256 points of a convolutional code.

The arithmetic is FastDeploy's, in float32; it rounds scales and weights to the model's dtype besides. Knows no files.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from qrun.formats.base import Format, Layout, Shape, pad_columns
from qrun.formats.packing import grouped, pack, unpack

GROUP: Final = 64
_BYTE: Final = 4  # weights to a byte
_SHIFTS: Final = (9, 6, 3, 0)
_LINE: Final = (121.0, 64.0)  # of those tried the best for normal numbers: 9.4 dB
_SPREAD: Final = 1 / 14  # the scale for a standard deviation of 1
_TOP: Final = 15
_PASSES: Final = 2


@dataclass(frozen=True)
class CcqFormat(Format):
    """w = (((code >> (9, 6, 3, 0)[k % 4]) & 63) − 32) · (scale · scale2), code = floor(byte · zero[0] + zero[1] + ½).

    codes: u8 [..., N, ceil(K/4)], four weights a byte. scale: u8 [..., N, ceil(K/128)], 4 bits for 64 weights, the even
    group in the high half. scale2: ``scale_dtype`` [..., N, 1]. zero: FP32 [..., N, 2], the line of the row's codes.
    """

    family: ClassVar[str] = "ccq"
    scale_dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return "ccq2"

    def layout(self, shape: Shape) -> Layout:
        *lead, k = shape
        return {
            "codes": ((*lead, -(-k // _BYTE)), torch.uint8),
            "scale": ((*lead, -(-k // (2 * GROUP))), torch.uint8),
            "zero": ((*lead, 2), torch.float32),
            "scale2": ((*lead, 1), self.scale_dtype),
        }

    def _chunks(self, shape: Shape, elements: int) -> Iterator[tuple[int, int]]:
        """Few rows at a time, for each byte is compared with 256."""
        return super()._chunks(shape, elements // 64)

    def _encode(self, w: Tensor, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        n, k = w.shape
        peak = w.abs().amax(1, keepdim=True).float()
        peak = torch.where(torch.isfinite(1 / peak), peak, 1.0)
        largest = min(torch.finfo(self.scale_dtype).max, torch.finfo(torch.float32).max / (33 * _TOP))
        groups = grouped(pad_columns(w.float() / peak, 2 * GROUP), GROUP)  # [n, G, 64]
        points = _decoded(torch.arange(256, device=w.device), groups.new_tensor(_LINE).expand(1, 2))  # [256, 4]
        scale = groups.square().mean(-1).sqrt_().mul_(_SPREAD)
        codes = torch.zeros(*groups.shape[:2], GROUP // _BYTE, dtype=torch.uint8, device=w.device)
        local, row = torch.zeros_like(scale), scale.new_zeros(n, 1)
        for last in range(_PASSES):
            row = (scale.amax(1, keepdim=True) * (peak / _TOP)).clamp_(max=largest).to(self.scale_dtype).float()
            local = (scale * (peak / row)).nan_to_num_(0.0, 0.0).round_().clamp_(max=_TOP)
            each = (local * (row / peak))[..., None]
            quads = grouped((groups / each).nan_to_num_(0.0, 0.0, 0.0), _BYTE)
            codes = ((points.square().sum(1) - 2 * (quads @ points.t())).argmin(-1)).to(torch.uint8)
            if last < _PASSES - 1:
                found = points.index_select(0, codes.reshape(-1).int()).view(groups.shape)
                scale = ((groups * found).sum(-1) / found.square().sum(-1)).clamp_(min=0)
        return {
            "codes": codes.flatten(1)[:, : -(-k // _BYTE)],
            "scale": pack(local.to(torch.uint8).view(n, -1, 2).flip(-1).flatten(1), 4),
            "zero": groups.new_tensor(_LINE).expand(n, 2),
            "scale2": row.to(self.scale_dtype),
        }

    def _decode(self, parts: Mapping[str, Tensor], k: int) -> Tensor:
        values = _decoded(parts["codes"], parts["zero"]).flatten(-2)[:, :k]
        local = unpack(parts["scale"], 4).view(len(values), -1, 2).flip(-1).flatten(1)
        scale = local.float().mul_(parts["scale2"].float())
        return values.mul_(scale.repeat_interleave(GROUP, 1)[:, :k])


def _decoded(codes: Tensor, line: Tensor) -> Tensor:
    """Bytes [n, C] or [C] and lines [n, 2] -> fp32 [..., C, 4], −32 … 31."""
    point = codes.float().mul(line[:, :1]).add_(line[:, 1:]).add_(0.5).floor_().to(torch.int32)
    shifts = torch.tensor(_SHIFTS, dtype=torch.int32, device=codes.device)
    values = ((point[..., None] >> shifts) & 63).float().sub_(32)
    return values[0] if codes.ndim == 1 else values
