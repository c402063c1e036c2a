"""Weights in integer formats that no kernel reads, as equal ones in a format that some do. Knows no kernels."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from qrun.formats.affine import AffineFormat
from qrun.formats.base import Format, QTensor
from qrun.formats.codebook import CodebookFormat, MxFp4Format
from qrun.formats.packing import pack, unpack
from qrun.formats.superblock import SuperBlockFormat

LANES = (2, 4, 8)
"""Bits of the codes that the kernels take apart."""


def readable(weight: QTensor) -> QTensor:
    """The same weight with integer codes of 2, 4 or 8 bits, and with the scales and minima of another tool's checkpoint
    in float32; itself where it is so already, or is not integers."""
    if isinstance(weight.format, SuperBlockFormat):
        weight = weight.format.widen(weight)
    elif isinstance(weight.format, CodebookFormat):
        weight = _integers(weight, weight.format)
    form = weight.format
    if not isinstance(form, AffineFormat):
        return weight
    if form.bits not in LANES:
        weight = _wider(weight, form)
    return weight if form.ours else _float(weight, form)


def read_as(form: Format) -> Format:
    """The format that `readable` gives weights of this one."""
    if isinstance(form, SuperBlockFormat):
        form = form.wide
    elif isinstance(form, CodebookFormat):
        form = _integral(form)
    if not isinstance(form, AffineFormat):
        return form
    form = replace(form, bits=stored_bits(form))
    if form.ours:
        return form
    if form.symmetric:
        return replace(form, scale_dtype=torch.float32)
    return replace(form, scale_dtype=torch.float32, zero_dtype=torch.float32, minimum=True)


def stored_bits(form: AffineFormat) -> int:
    """Bits a code of the format takes here."""
    return next(bits for bits in LANES if bits >= form.bits)


def _factor(form: CodebookFormat) -> int:
    """What makes the values whole numbers of a byte; 0 if nothing small does."""
    for factor in (1, 2):
        if all((factor * value).is_integer() and abs(factor * value) < 128 for value in form.values):
            return factor
    return 0


def _integral(form: CodebookFormat) -> Format:
    """8-bit integers for a codebook of such, or of halves, else the format itself."""
    if not _factor(form):
        return form
    halved = torch.bfloat16 if isinstance(form, MxFp4Format) else form.scale_dtype
    return AffineFormat(8, form.group, True, scale_dtype=halved if halved.itemsize > 1 else torch.float32)


def _integers(weight: QTensor, form: CodebookFormat) -> QTensor:
    whole = _integral(form)
    if not isinstance(whole, AffineFormat):
        return weight
    factor = _factor(form)
    values = (factor * form.codebook(weight.device)).to(torch.int8)
    scale = form.scales(weight) / factor  # exact: a power of two
    codes = values[unpack(weight.codes, 4).int()]
    return replace(weight, format=whole, codes=codes, scale=scale.to(whole.scale_dtype), scale2=None)


def _wider(weight: QTensor, form: AffineFormat) -> QTensor:
    """Codes of odd widths in the next of `LANES`; symmetric ones around its middle."""
    bits = stored_bits(form)
    codes = unpack(weight.codes, form.bits)
    if form.symmetric and bits == 8:
        codes = codes.to(torch.int16).sub_(1 << (form.bits - 1)).to(torch.int8)
    else:
        codes = pack(codes + ((1 << (bits - 1)) - (1 << (form.bits - 1)) if form.symmetric else 0), bits)
    return replace(weight, format=replace(form, bits=bits), codes=codes)


def _float(weight: QTensor, form: AffineFormat) -> QTensor:
    """float32 scales; zeros as float32 minima, scale times zero, but of symmetric codes, whose zero is known."""
    scale = weight.scale
    assert scale is not None, "an integer format has scales"
    scale = scale.float()
    zero = weight.zero
    assert isinstance(weight.format, AffineFormat)
    wide = replace(weight.format, scale_dtype=torch.float32)
    if zero is None:
        return replace(weight, format=wide, scale=scale)
    minimum = zero.float() if form.minimum else scale * zero.float()
    wide = replace(wide, zero_dtype=torch.float32, minimum=True)
    return replace(weight, format=wide, scale=scale, zero=minimum)


def common(forms: Sequence[Format]) -> AffineFormat | None:
    """A format that holds weights of each of these as they are, if all are integers; large, for it serves them all."""
    wide = [form.wide if isinstance(form, SuperBlockFormat) else form for form in forms]
    if not all(isinstance(form, AffineFormat) for form in wide):
        return None
    integers = [form for form in wide if isinstance(form, AffineFormat)]
    group = math.gcd(*(form.group or 32 for form in integers))
    bits = max(stored_bits(form) for form in integers)
    return AffineFormat(bits, group, scale_dtype=torch.float32, zero_dtype=torch.float32, minimum=True)


def as_common(weight: QTensor, form: AffineFormat) -> QTensor:
    """A weight [N, K] of integers in a format that `common` gave for its own and others."""
    if isinstance(weight.format, SuperBlockFormat):
        weight = weight.format.widen(weight)
    own, scale = weight.format, weight.scale
    assert isinstance(own, AffineFormat) and scale is not None, "integers have scales"
    k = weight.shape[-1]
    codes = weight.codes.view(torch.uint8) ^ 128 if own.signed else unpack(weight.codes, own.bits)
    padding = max(0, form.padded(k) - codes.shape[-1])
    codes = torch.nn.functional.pad(codes, (0, padding))[..., : form.padded(k)].contiguous()
    scale = scale.float()
    if weight.zero is None:
        minimum = scale * (1 << (own.bits - 1))
    else:
        minimum = weight.zero.float() if own.minimum else scale * weight.zero.float()
    groups = form.padded(k) // form.group
    each = (own.group // form.group) if own.group else groups
    parts = [part.repeat_interleave(each, -1)[..., :groups].contiguous() for part in (scale, minimum)]
    return replace(weight, format=form, codes=pack(codes, form.bits), scale=parts[0], zero=parts[1])
