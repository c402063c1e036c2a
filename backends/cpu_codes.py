"""How a format's integer codes lie, as the CPU's kernels are told. Knows formats, not programs."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from qrun.formats import AffineFormat, QTensor, TrellisFormat
from qrun.formats.trellis import GROUP, VALUES
from qrun.kernels import cpu_gemv, cpu_trellis
from qrun.kernels.cpu_pool import Array, aligned


@dataclass(frozen=True, eq=False, kw_only=True)
class Codes:
    """Unsigned codes (``flip`` is what their bytes are xored with), ``per`` to a byte, ``zero`` of which stands for 0
    unless ``zeros`` says so; a scale every ``group`` of them, or every row where it is 0."""

    name: str
    per: int
    group: int
    groups: int
    scales: int
    zeros: Tensor | None
    zero: float
    flip: int
    lanes: Array | None
    """Of scales in a block; a trellis has its table there."""


def codes_of(weight: QTensor) -> Codes | None:
    """How the weight's codes lie; none where the kernels do not read them."""
    form, k = weight.format, weight.shape[-1]
    if isinstance(form, TrellisFormat):
        table = aligned(64, np.uint8)
        table[:] = np.array(VALUES) + int(cpu_trellis.MIDDLE)
        blocks = -(-weight.codes.shape[-1] // 64)
        return Codes(
            name="trellis", per=cpu_trellis.PER, group=GROUP, groups=cpu_trellis.GROUPS * blocks,
            scales=cpu_gemv.TRELLIS, zeros=weight.scale2, zero=cpu_trellis.MIDDLE, flip=0, lanes=table,
        )  # fmt: skip
    if not isinstance(form, AffineFormat) or form.bits not in (2, 4, 8) or form.group % 16:
        return None
    per, scales, lanes = 8 // form.bits, cpu_gemv.ROW, None
    if form.group:
        scales = cpu_gemv.GROUP if form.ours else cpu_gemv.WIDE
        lanes = cpu_gemv.lane_groups(per, form.group)
    return Codes(
        name=f"int{form.bits}", per=per, group=form.group, groups=form.padded(k) // form.group if form.group else 1,
        scales=scales, zeros=weight.zero, zero=float(2 ** (form.bits - 1)), flip=128 if form.signed else 0, lanes=lanes,
    )  # fmt: skip
