"""Codes of 2 to 8 bits <-> bytes, as one little-endian bit stream: code i occupies bits [i·b, i·b + b).

So with 4 bits the even code is the low nibble, with 2 bits the first of four codes is lowest, and 3, 5, 6 and 7 bits
straddle bytes. Knows neither scales nor shapes.
"""

from functools import reduce

import torch
from torch import Tensor


def grouped(x: Tensor, size: int) -> Tensor:
    """[..., G·size] as [..., G, size]."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def pack(codes: Tensor, bits: int) -> Tensor:
    """u8 codes [..., K], each below 2^bits, to u8 [..., K·bits/8]; K a multiple of 8."""
    if bits == 8:
        return codes
    if 8 % bits == 0:
        lanes = grouped(codes, 8 // bits)
        packed = lanes[..., 0].clone()
        for i in range(1, 8 // bits):
            packed |= lanes[..., i] << (i * bits)
        return packed
    lanes = grouped(codes, 8).unbind(-1)  # eight codes fill exactly `bits` bytes
    filled: list[Tensor] = []
    for byte in range(bits):
        shifts = [i * bits - 8 * byte for i in range(8)]
        parts = [lane << s if s >= 0 else lane >> -s for lane, s in zip(lanes, shifts, strict=True) if -bits < s < 8]
        filled.append(reduce(torch.bitwise_or, parts))
    return torch.stack(filled, -1).flatten(-2)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`pack`: u8 [..., K·bits/8] to u8 [..., K]."""
    if bits == 8:
        return packed
    mask = (1 << bits) - 1
    if 8 % bits == 0:
        word = packed.contiguous().to(torch.int16 if bits == 4 else torch.int32)
        spread = word  # one code to a byte of the (little-endian) word
        for i in range(1, 8 // bits):
            spread = spread | word << (i * (8 - bits))
        return (spread & (mask * (0x0101 if bits == 4 else 0x01010101))).view(torch.uint8)
    stored = grouped(packed, bits).unbind(-1)
    lanes: list[Tensor] = []
    for first in range(0, 8 * bits, bits):
        byte, shift = divmod(first, 8)
        lane = stored[byte] >> shift
        lanes.append((lane | stored[byte + 1] << (8 - shift) if shift + bits > 8 else lane) & mask)
    return torch.stack(lanes, -1).flatten(-2)
