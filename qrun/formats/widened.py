"""Weights in integer formats that no kernel reads, as equal ones in a format that some do. Knows no kernels."""

from dataclasses import replace

import torch

from qrun.formats.affine import AffineFormat
from qrun.formats.base import Format, QTensor
from qrun.formats.packing import pack, unpack

LANES = (2, 4, 8)
"""Bits of the codes that the kernels take apart."""


def readable(weight: QTensor) -> QTensor:
    """The same weight with integer codes of 2, 4 or 8 bits, and with the scales and minima of another tool's checkpoint
    in float32; itself where it is so already, or is not integers."""
    form = weight.format
    if not isinstance(form, AffineFormat):
        return weight
    if form.bits not in LANES:
        weight = _wider(weight, form)
    return weight if form.ours else _float(weight, form)


def read_as(form: Format) -> Format:
    """The format that `readable` gives weights of this one."""
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
