"""Two bits a weight as a trellis code: each weight is decoded from its own two bits and the four that follow.

Sixty-four values for two bits, at the price of a search: four of the sixty-four are open at each weight, and the
cheapest path of all is taken. Scales are of 4 bits a group over one a row. Knows no calibration.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from qrun.formats.base import Format, Layout, Shape, pad_columns
from qrun.formats.packing import grouped, pack, unpack
from qrun.formats.viterbi import cheapest

# Trained on normal numbers by alternating the search and the means of what each state was taken for (10.8 dB, where
# the best four values have 9.3 dB and no code can have more than 12.04); the second half is the first, negated.
_HALF: Final = (
    -68, 18, -14, 86, -65, 88, -23, 10, -33, 13, 53, -98, -34, 64, -127, 21,
    -11, 41, 77, 5, -1, 40, -59, 110, 46, -24, 6, -47, 24, -23, 38, -64,
)  # fmt: skip
VALUES: Final = (*_HALF, *(-value for value in reversed(_HALF)))
"""The value of each window: code k lowest, then k + 1 and k + 2."""
GROUP: Final = 32
_UNIT: Final = 0.019457  # how many standard deviations a value of 1 is
_TOP: Final = 15
_LARGEST: Final = torch.finfo(torch.float32).max / (128 * _TOP)  # of a row's scale: no weight may decode to infinity
_PASSES: Final = 3


@dataclass(frozen=True)
class TrellisFormat(Format):
    """w = VALUES[window] · scale · scale2, with K padded to Kp, a multiple of 64.

    codes: u8 [..., N, Kp/4], 2-bit codes as a little-endian bit stream; weight k's window is bits 2k … 2k+5 of the
        row, which zeros follow. What padding decodes to is of no account.
    scale: u8 [..., N, Kp/64], 4 bits a group of 32, the even group in the low half. scale2: BF16 [..., N, 1].
    """

    family: ClassVar[str] = "trellis"

    def __str__(self) -> str:
        return f"trellis g{GROUP}"

    def padded(self, k: int) -> int:
        """Kp, the number of stored columns for K logical ones."""
        return k + -k % (2 * GROUP)

    def layout(self, shape: Shape) -> Layout:
        *lead, k = shape
        kp = self.padded(k)
        return {
            "codes": ((*lead, kp // 4), torch.uint8),
            "scale": ((*lead, kp // (2 * GROUP)), torch.uint8),
            "scale2": ((*lead, 1), torch.bfloat16),
        }

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        """VALUES as fp32 [64]."""
        return torch.tensor(VALUES, dtype=torch.float32, device=device)

    def _encode(self, w: Tensor, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return encode(w)

    def _decode(self, parts: Mapping[str, Tensor], k: int) -> Tensor:
        states = windows(unpack(parts["codes"], 2))
        values = self.table(states.device).index_select(0, states.reshape(-1).int()).view(states.shape)
        scale = unpack(parts["scale"], 4).float().mul_(parts["scale2"].float())
        return grouped(values, GROUP).mul_(scale[..., None]).flatten(-2)[..., :k]


def windows(codes: Tensor) -> Tensor:
    """2-bit codes u8 [n, Kp] -> the states u8 [n, Kp] that they and the two after each make."""
    ahead = torch.nn.functional.pad(codes, (0, 2))
    return codes | ahead[:, 1:-1] << 2 | ahead[:, 2:] << 4


def encode(w: Tensor, importance: Tensor | None = None) -> dict[str, Tensor]:
    """The tensors of rows ``w`` [n, K], of the least Σ importance · error² that a few passes find.

    A pass is one search of the path, and then each group's scale is fitted to what was found.

    Args:
        importance: what an error counts in each column, [K], not negative; by default all the same.
    """
    n, k = w.shape
    peak = w.abs().amax(1, keepdim=True).float()
    peak = torch.where(torch.isfinite(1 / peak), peak, 1.0)
    target = pad_columns(w.float() / peak, 2 * GROUP)
    weight = target.new_ones(k) if importance is None else importance / importance.mean()
    weight = pad_columns(weight[None], 2 * GROUP)
    root = weight.sqrt()
    pull = grouped(weight, GROUP)
    groups = grouped(target, GROUP)  # [n, G, 32]
    scale = (groups.square() * pull).sum(-1).div_(pull.sum(-1).clamp_(min=1e-30)).sqrt_().mul_(_UNIT)
    table = TrellisFormat().table(w.device)
    best = target.new_full((n, 1), torch.inf)
    states = torch.zeros_like(target, dtype=torch.uint8)
    kept = torch.zeros_like(scale), peak.new_zeros(n, 1)
    for _ in range(_PASSES):
        steps, row = stored_scales(scale, peak)
        each = (steps * row / peak).repeat_interleave(GROUP, 1).mul_(root)
        found = cheapest(target * root, each, table)
        values = grouped(table.index_select(0, found.reshape(-1).int()).view(target.shape), GROUP)
        error = (groups - values * (steps * row / peak)[..., None]).square_().mul_(pull).sum((1, 2))[:, None]
        better = error < best
        best = torch.where(better, error, best)
        states = torch.where(better, found, states)
        kept = torch.where(better, steps, kept[0]), torch.where(better, row, kept[1])
        norm = (values.square() * pull).sum(-1)
        scale = ((groups * values).mul_(pull).sum(-1) / norm).nan_to_num_(0.0).clamp_(min=0.0)
    return store(states, *kept)


def stored_scales(scale: Tensor, peak: Tensor) -> tuple[Tensor, Tensor]:
    """Scales [n, G], relative to ``peak`` [n, 1], as they are stored: steps 0 … 15 [n, G] and a row's scale [n, 1]."""
    row = (scale.amax(1, keepdim=True) * (peak / _TOP)).clamp_(max=_LARGEST).bfloat16().float()
    ratio = (scale * (peak / row)).nan_to_num_(0.0, 0.0)
    steps = ratio.round().clamp_(max=_TOP)
    return torch.where(ratio > 0.25, steps.clamp(min=1), steps), row


def store(states: Tensor, steps: Tensor, row: Tensor) -> dict[str, Tensor]:
    """The format's tensors from states [n, Kp], steps [n, G] and rows' scales [n, 1]."""
    return {
        "codes": pack(states & 3, 2),
        "scale": pack(steps.to(torch.uint8), 4),
        "scale2": row.bfloat16(),
    }
