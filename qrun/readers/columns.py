"""Columns of integer codes as formats store them: padded, packed, and in the order of their groups."""

import torch
from torch import Tensor

from qrun.errors import CheckpointError
from qrun.formats import AffineFormat
from qrun.formats.packing import pack


def fitted(codes: Tensor, form: AffineFormat, k: int) -> Tensor:
    """u8 codes [N, K], 2^(bits−1) being zero where they are symmetric, as the format stores them."""
    padding = form.padded(k) - k
    if padding:
        codes = torch.nn.functional.pad(codes, (0, padding), value=1 << (form.bits - 1) if form.symmetric else 0)
    codes = codes.contiguous()
    return (codes ^ 128).view(torch.int8) if form.signed else pack(codes, form.bits)


def signed_codes(codes: Tensor, bits: int, name: str) -> Tensor:
    """int8 codes as u8, 2^(bits−1) being zero. Raises `CheckpointError`, naming the weight, if one is too large."""
    counted = codes.to(torch.int16) + (1 << (bits - 1))
    if bits < 8 and bool(((counted < 0) | (counted >= 1 << bits)).any()):
        raise CheckpointError(f"{name} has codes of more than {bits} bits: fetch the model again")
    return counted.to(torch.uint8)


def column_order(groups: Tensor, size: int, name: str) -> Tensor | None:
    """Columns in the order of their groups [K], each of ``size`` columns, int64 [K]; none where they are in it.

    Raises `CheckpointError`, naming the tensor, where a group has more or fewer columns.
    """
    groups = groups.long()
    usual = torch.arange(len(groups)).div(size, rounding_mode="floor")
    if torch.equal(groups, usual):
        return None
    order = torch.argsort(groups, stable=True)
    if not torch.equal(groups[order], usual):
        raise CheckpointError(f"{name} does not put {size} columns into each group: fetch the model again")
    return order
