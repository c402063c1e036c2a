"""Weights from their canonical formats into the few layouts that an Intel GPU's kernels read, once, at load, and their
values again in plain torch. It multiplies nothing."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from qrun.formats import (
    AffineFormat,
    CodebookFormat,
    Format,
    Fp8Format,
    NvFp4Format,
    PermutedFormat,
    PlainFormat,
    QTensor,
    Shape,
)
from qrun.formats.packing import grouped, pack, unpack
from qrun.formats.superblock import SuperBlockFormat

Kind = Literal["int4", "int8", "fp8", "codebook", "plain"]
NIBBLES = ("int4", "codebook")
CHANNEL_ALIGN = 32
LEAST_GROUP = 16
_PIECE = 1 << 24  # codes taken apart at a time
_LOW, _HIGH, _USUAL = -10, 0, -5  # exponents of the largest scale: what float16 may have, and what it is brought to


@dataclass(frozen=True, kw_only=True, eq=False)
class Placed:
    """A weight [n, k]: w = ((decode(code) - zero) * scale + offset) * factor, the same buffers for every kernel.

    kp: k up to a multiple of 32 and of ``group``; G = kp / group; half: the dtype of the card's products. What columns
    of padding decode to is of no account.

    codes: int4 and codebook: int32 [n, kp/8], little-endian nibbles, even k low; int8: int8 [n, kp]; fp8:
        float8_e4m3fn [n, kp]; plain: half [n, k].
    group: columns that share a scale, 16 … kp; kp is a scale a row, per channel; 0 only for plain.
    scale: half [G, n]; float32 for fp8 and per channel; none for plain.
    zero: int8 [G, n] for int4, 8 where it is symmetric; none else.
    offset: half [G, n] or none: what fractional zeros and minima leave, so y += (sums of x over groups) @ offset.
    table: float32 [16] for codebook, the values of its codes.
    factor: a float32 scalar or none, for the whole product.
    """

    kind: Kind
    n: int
    k: int
    codes: Tensor
    group: int
    scale: Tensor | None = None
    zero: Tensor | None = None
    offset: Tensor | None = None
    table: Tensor | None = None
    factor: Tensor | None = None

    @property
    def kp(self) -> int:
        """Stored columns."""
        return self.codes.shape[-1] * (8 if self.kind in NIBBLES else 1)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        every = (self.codes, self.scale, self.zero, self.offset, self.table, self.factor)
        return sum(tensor.nbytes for tensor in every if tensor is not None)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """How weights of a format with k columns are placed."""

    kind: Kind
    group: int
    kp: int
    offset: bool = False
    factor: bool = False

    def nbytes(self, n: int) -> int:
        """Bytes of n rows."""
        if self.kind == "plain":
            return n * self.kp * 2
        groups = n * (self.kp // self.group)
        wide = self.kind == "fp8" or self.group == self.kp
        codes = n * self.kp // (2 if self.kind in NIBBLES else 1)
        each = (4 if wide else 2) + (self.kind == "int4") + 2 * self.offset
        return codes + groups * each + (64 if self.kind == "codebook" else 0) + 4 * self.factor


def places(weight: QTensor) -> bool:
    """Whether there is a layout for the weight's format and shape."""
    return _plan(weight.format, weight.shape[-1]) is not None


def placed_bytes(form: Format, shape: Shape) -> int:
    """Bytes that weights [..., N, K] take on the card, those that are not placed as they are stored.

    Exact, but for the factor of four bytes that scales out of float16's range are given.
    """
    if isinstance(form, PermutedFormat):
        return placed_bytes(form.inner, shape) + 8 * math.prod(shape[:-2]) * shape[-1]  # the order, in int64
    plan = _plan(form, shape[-1])
    if plan is None:
        return sum(math.prod(size) * dtype.itemsize for size, dtype in form.layout(shape).values())
    return math.prod(shape[:-2]) * plan.nbytes(shape[-2])


def _plan(form: Format, k: int) -> _Plan | None:
    if isinstance(form, PlainFormat):
        # Who asks for 32 bits wants them.
        return _Plan(kind="plain", group=0, kp=k) if form.dtype.itemsize == 2 else None
    if isinstance(form, Fp8Format):
        return _grouped(form.block_columns, k, "fp8")
    if isinstance(form, CodebookFormat):
        return _grouped(form.group, k, "codebook", factor=isinstance(form, NvFp4Format))
    if isinstance(form, SuperBlockFormat):
        form = form.wide
    if not isinstance(form, AffineFormat):
        return None
    left = form.minimum or form.zero_dtype != torch.uint8 or (form.bits == 8 and not form.symmetric)
    return _grouped(form.group, k, "int4" if form.bits <= 4 else "int8", offset=left)


def _grouped(group: int, k: int, kind: Kind, *, offset: bool = False, factor: bool = False) -> _Plan | None:
    if group == 0 or group >= k:
        group = k + -k % CHANNEL_ALIGN
    elif group % LEAST_GROUP:
        return None
    kp = k + -k % math.lcm(group, CHANNEL_ALIGN)
    return _Plan(kind=kind, group=group, kp=kp, offset=offset, factor=factor)


def place(weight: QTensor, half: torch.dtype) -> Placed:
    """The weight [N, K], one that `places`; codes that stand as the kernels read them are not copied.

    Raises:
        ValueError: there is no layout for it.
    """
    form = weight.format
    n, k = weight.shape
    plan = _plan(form, k)
    if plan is None:
        raise ValueError(f"an Intel GPU's kernels have no layout for {form} of shape {weight.shape}")
    if isinstance(form, PlainFormat):
        return _plain(weight, half)
    if isinstance(form, Fp8Format):
        codes = _columns(weight.codes.view(torch.uint8), plan.kp).view(weight.codes.dtype)
        assert weight.scale is not None, "fp8 has scales"
        scale = weight.scale.repeat_interleave(form.block_rows, 0)[:n]
        return Placed(kind="fp8", n=n, k=k, codes=codes, group=plan.group, scale=_across(scale, plan, torch.float32))
    if isinstance(form, CodebookFormat):
        return _codebook(weight, form, plan, half)
    if isinstance(form, SuperBlockFormat):
        weight = form.widen(weight)
    assert isinstance(weight.format, AffineFormat), "all others are integers"
    return _affine(weight, weight.format, plan, half)


def expand(placed: Placed, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows start … stop-1, [stop-start, k], computed in float32 and rounded once."""
    codes = placed.codes[start:stop]
    if placed.kind == "plain":
        values = codes.float()
    else:
        if placed.kind in NIBBLES:
            codes = unpack(codes.view(torch.uint8), 4)
        if placed.table is not None:
            codes = placed.table.index_select(0, codes.flatten().int()).view(codes.shape)
        values = grouped(codes.float(), placed.group)  # [rows, G, group]
        if placed.zero is not None:
            values = values - _of_rows(placed.zero, start, stop)
        assert placed.scale is not None, "only plain weights have no scale"
        values = values * _of_rows(placed.scale, start, stop)
        if placed.offset is not None:
            values = values + _of_rows(placed.offset, start, stop)
        values = values.flatten(-2)[:, : placed.k]
    return (values if placed.factor is None else values * placed.factor).to(dtype)


def _of_rows(across: Tensor, start: int, stop: int) -> Tensor:
    """Of [G, n] those of some rows, float32 [rows, G, 1]."""
    return across[:, start:stop].t().float()[..., None]


def _plain(weight: QTensor, half: torch.dtype) -> Placed:
    n, k = weight.shape
    codes = weight.codes
    factor: float | None = None
    if half == torch.float16 and codes.dtype != half:
        peak = float(codes.abs().amax())
        if torch.finfo(half).max < peak < math.inf:
            factor = _power(peak, 0)
            codes = codes / factor
    codes = codes.to(half).contiguous()
    return Placed(kind="plain", n=n, k=k, codes=codes, group=0, factor=_scalar(factor, codes.device))


def _codebook(weight: QTensor, form: CodebookFormat, plan: _Plan, half: torch.dtype) -> Placed:
    n, k = weight.shape
    whole: Tensor | None = None
    scale = weight.scale
    if isinstance(form, NvFp4Format):
        # e4m3 values are exact in 16 bits; their products with the scale of the whole weight would not be.
        assert scale is not None and weight.scale2 is not None, "NVFP4 has scales in two levels"
        scale = scale.float()
        whole = weight.scale2.float().reshape(())
        whole = whole.reciprocal() if form.divides else whole
    else:
        scale = form.scales(weight)
    scale, _, factor = _in_range(scale, None, half)
    if factor is not None:
        whole = _scalar(factor, scale.device) if whole is None else whole * factor
    codes = _columns(weight.codes, plan.kp // 2).view(torch.int32)
    return Placed(
        kind="codebook", n=n, k=k, codes=codes, group=plan.group, scale=_across(scale, plan, half),
        table=form.codebook(codes.device), factor=whole,
    )  # fmt: skip


def _affine(weight: QTensor, form: AffineFormat, plan: _Plan, half: torch.dtype) -> Placed:
    n, k = weight.shape
    assert weight.scale is not None, "integers have scales"
    scale = weight.scale.float()  # [n, G]
    zero = torch.full_like(scale, 1 << (form.bits - 1)) if weight.zero is None else weight.zero.float()
    offset: Tensor | None = None
    if plan.offset:
        # The whole part of a zero is taken from the codes. What is left of it is small, and loses little when rounded.
        minimum = zero if form.minimum else zero * scale
        exact = (zero / scale).nan_to_num_(0.0, 0.0, 0.0) if form.minimum else zero
        zero = exact.round().clamp_(0, (1 << form.bits) - 1) if form.bits < 8 else torch.full_like(scale, 128)
        offset = zero * scale - minimum
    scale, offset, factor = _in_range(scale, offset, half)
    if plan.kind == "int8":
        codes = weight.codes if form.signed else _bytes(weight.codes, form.bits, zero, plan)
        codes = _columns(codes, plan.kp)
    else:
        codes = _nibbles(weight.codes, form, plan).view(torch.int32)
        if form.symmetric:
            zero.fill_(8)
    return Placed(
        kind=plan.kind,
        n=n,
        k=k,
        codes=codes,
        group=plan.group,
        scale=_across(scale, plan, half),
        zero=_across(zero.clamp_(-128, 127), plan, torch.int8, wide=torch.int8) if plan.kind == "int4" else None,
        offset=None if offset is None else _across(offset, plan, half, wide=half),
        factor=_scalar(factor, codes.device),
    )


def _bytes(packed: Tensor, bits: int, zero: Tensor, plan: _Plan) -> Tensor:
    """Codes [n, ·] less their zeros [n, G], as int8 [n, kp]."""
    out = torch.zeros(len(packed), plan.kp, dtype=torch.int8, device=packed.device)
    for rows in _pieces(len(packed), plan.kp):
        codes = unpack(packed[rows], bits)[:, : plan.kp].to(torch.int16)
        each = zero[rows].to(torch.int16).repeat_interleave(plan.group, 1)[:, : codes.shape[1]]
        out[rows, : codes.shape[1]] = (codes - each).clamp_(-128, 127).to(torch.int8)
    return out


def _nibbles(packed: Tensor, form: AffineFormat, plan: _Plan) -> Tensor:
    """Codes of 2 to 4 bits as u8 [n, kp/2]; symmetric ones moved to the middle of four bits."""
    if form.bits == 4:
        return _columns(packed, plan.kp // 2)
    shift = 8 - (1 << (form.bits - 1)) if form.symmetric else 0
    out = torch.empty(len(packed), plan.kp // 2, dtype=torch.uint8, device=packed.device)
    for rows in _pieces(len(packed), plan.kp):
        out[rows] = pack(_columns(unpack(packed[rows], form.bits) + shift, plan.kp), 4)
    return out


def _pieces(rows: int, columns: int) -> list[slice]:
    step = max(1, _PIECE // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _columns(codes: Tensor, width: int) -> Tensor:
    """[n, ·] with zero columns, or without those of padding, as [n, width]."""
    missing = width - codes.shape[1]
    return F.pad(codes, (0, missing)) if missing > 0 else codes[:, :width].contiguous()


def _across(rows: Tensor, plan: _Plan, dtype: torch.dtype, *, wide: torch.dtype = torch.float32) -> Tensor:
    """[n, G] of some groups as [G, n] of all; ``wide`` where there is one a row."""
    groups = plan.kp // plan.group
    return F.pad(rows, (0, groups - rows.shape[1])).t().to(wide if groups == 1 else dtype).contiguous()


def _scalar(value: float | None, device: torch.device) -> Tensor | None:
    return None if value is None else torch.tensor(value, dtype=torch.float32, device=device)


def _power(peak: float, exponent: int) -> float:
    """The power of two that brings a number to within [2^exponent, 2^(exponent + 1))."""
    return math.ldexp(1.0, min(126, max(-126, math.frexp(peak)[1] - 1 - exponent)))


def _in_range(scale: Tensor, offset: Tensor | None, half: torch.dtype) -> tuple[Tensor, Tensor | None, float | None]:
    """Scales and offsets that float16 holds without losing what matters, and the power of two that they lack."""
    if half != torch.float16 or (scale.shape[1] == 1 and offset is None):
        return scale, offset, None
    peak = float(scale.abs().amax())
    if offset is not None:
        peak = max(peak, float(offset.abs().amax()) / 16)
    if not 0 < peak < math.inf or 2.0**_LOW <= peak <= 2.0**_HIGH:
        return scale, offset, None
    factor = _power(peak, _USUAL)
    return scale / factor, None if offset is None else offset / factor, factor
