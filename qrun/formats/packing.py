"""Codes of 2 to 8 bits <-> bytes, as one little-endian bit stream: code i occupies bits [i·b, i·b + b).

So with 4 bits the even code is the low nibble, with 2 bits the first of four codes is lowest, and 3, 5, 6 and 7 bits
straddle bytes. Knows neither scales nor shapes.
"""

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
    shifts = torch.arange(0, 8 * bits, bits, device=codes.device)
    words = (grouped(codes, 8).long() << shifts).sum(-1)  # eight codes fill exactly `bits` bytes
    spread = torch.arange(0, 8 * bits, 8, device=codes.device)
    return ((words[..., None] >> spread) & 0xFF).to(torch.uint8).flatten(-2)


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
    spread = torch.arange(0, 8 * bits, 8, device=packed.device)
    words = (grouped(packed, bits).long() << spread).sum(-1)
    shifts = torch.arange(0, 8 * bits, bits, device=packed.device)
    return ((words[..., None] >> shifts) & mask).to(torch.uint8).flatten(-2)
