"""A packed weight's rows back to 16-bit floats in a scratch, for a vendor's matmul; it multiplies nothing.

Every value is (code - zero) · scale in float32, rounded once: bit for bit what the canonical format stands for.
"""
# pyright: basic, reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qrun.kernels.gpu_aot import Variant
from qrun.kernels.gpu_bits import e4m3_decode, narrow
from qrun.kernels.gpu_packed import BITS, Packed

_ROWS = 16
_COLUMNS = 512


@triton.jit
def e8m0_decode(code):
    """A power of two by its biased exponent, 2^(code - 127), to float32; code 0 is subnormal there."""
    exponent = code.to(tl.int32)
    return tl.where(exponent == 0, 0x400000, exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _scales(scale_ptr, scale2_ptr, row, k, K, G, GROUP: tl.constexpr, SCALE: tl.constexpr):
    """The float32 scales of rows [R] at columns k [T]: [R, T], or [R, 1] per channel."""
    if SCALE == "channel":
        scale = tl.load(scale_ptr + row)[:, None]
    else:
        if SCALE == "block":
            at = (row // 128)[:, None] * G + (k // GROUP)[None, :]
        else:
            at = row[:, None] + (k // GROUP)[None, :] * G
        scale = tl.load(scale_ptr + at, mask=(k < K)[None, :], other=0)
        if SCALE == "e8m0":
            scale = e8m0_decode(scale)
        elif SCALE == "e4m3":
            scale = e4m3_decode(scale) * tl.load(scale2_ptr)
        else:
            scale = scale.to(tl.float32)
    return scale


@triton.jit
def _store(out_ptr, value, row, local, rows, k, K, C, stride):
    """value [R, T, W] at rows local [R] and columns k [T] onwards; zeros from K on."""
    column = k[:, None] + tl.arange(0, value.shape[2])[None, :]  # [T, W]
    value = tl.where((column < K)[None, :, :], value, 0.0)
    place = local.to(tl.int64)[:, None, None] * stride + column[None, :, :]
    there = (local < rows)[:, None, None] & (column < C)[None, :, :]
    tl.store(out_ptr + place, narrow(value, out_ptr.dtype.element_ty), mask=there)


@triton.jit
def expand_planes(
    codes_ptr,
    scale_ptr,
    zero_ptr,
    table_ptr,
    scale2_ptr,
    out_ptr,
    start,
    rows,
    K,
    KP,
    C,
    G,
    stride,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    PLANE: tl.constexpr,
    STEP: tl.constexpr,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """int2, int4 and codebook words [Np, KP·BITS/32]: plane p of a word's pair begins at bits STEP·p and STEP·p + HALF.

    `zero_ptr` and `table_ptr` may be None: a symmetric integer's zero is 2^(BITS-1). A scale serves whole planes.
    """
    TILE: tl.constexpr = PLANES * PLANE
    WORDS: tl.constexpr = PLANE // 2
    local = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row = start + tl.minimum(local, rows - 1)
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    word = tile[:, None] * WORDS + tl.arange(0, WORDS)[None, :]  # [T, W]
    place = row.to(tl.int64)[:, None, None] * (KP // TILE * WORDS) + word[None, :, :]
    w = tl.load(codes_ptr + place, mask=(tile < KP // TILE)[None, :, None], other=0)
    for p in tl.static_range(PLANES):
        low = (w >> (STEP * p)) & ((1 << BITS) - 1)
        high = (w >> (STEP * p + HALF)) & ((1 << BITS) - 1)
        code = tl.join(low, high).reshape(ROWS, TILES, PLANE)
        k = tile * TILE + p * PLANE
        scale = _scales(scale_ptr, scale2_ptr, row, k, K, G, GROUP, SCALE)
        if table_ptr is not None:
            value = tl.load(table_ptr + code)
        elif zero_ptr is not None:
            at = row[:, None] + (k // GROUP)[None, :] * G
            zero = tl.load(zero_ptr + at, mask=(k < K)[None, :], other=0)
            value = (code - zero.to(tl.int32)[:, :, None]).to(tl.float32)
        else:
            value = (code - (1 << (BITS - 1))).to(tl.float32)
        _store(out_ptr, value * scale[:, :, None], row, local, rows, k, K, C, stride)


@triton.jit
def expand_bytes(
    codes_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    start,
    rows,
    K,
    KP,
    C,
    G,
    stride,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """int8 codes [Np, KP], their zeros counted from -128, or e4m3 as uint8; 32 columns share a scale."""
    local = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row = start + tl.minimum(local, rows - 1)
    k = (tl.program_id(0) * TILES + tl.arange(0, TILES)) * 32
    column = k[:, None] + tl.arange(0, 32)[None, :]  # [T, 32]
    place = row.to(tl.int64)[:, None, None] * KP + column[None, :, :]
    code = tl.load(codes_ptr + place, mask=(k < KP)[None, :, None], other=0)
    scale = _scales(scale_ptr, None, row, k, K, G, GROUP, SCALE)
    if SCALE == "block":
        value = e4m3_decode(code)
    elif zero_ptr is not None:
        at = row[:, None] + (k // GROUP)[None, :] * G
        zero = tl.load(zero_ptr + at, mask=(k < K)[None, :], other=0)
        value = (code.to(tl.int32) + 128 - zero.to(tl.int32)[:, :, None]).to(tl.float32)
    else:
        value = code.to(tl.float32)
    _store(out_ptr, value * scale[:, :, None], row, local, rows, k, K, C, stride)


def _constants(kind: str, group: int, scale: str, plane: int) -> dict[str, Any]:
    common = {"GROUP": group, "SCALE": scale, "ROWS": _ROWS}
    if kind not in BITS:
        return {**common, "TILES": _COLUMNS // 32}
    bits = BITS[kind]
    step, half = (8, 4) if kind == "codebook" else (bits, 16)
    planes = 16 // bits
    tiles = _COLUMNS // (planes * plane)
    return {**common, "BITS": bits, "PLANES": planes, "PLANE": plane, "STEP": step, "HALF": half, "TILES": tiles}


def _scale_kind(packed: Packed, scale: Tensor) -> str:
    if packed.kind == "fp8":
        return "block"
    if packed.group == 0:
        return "channel"
    if scale.dtype == torch.uint8:
        return "e8m0" if packed.scale2 is None else "e4m3"
    return "float"


def expand(packed: Packed, out: Tensor, *, start: int = 0) -> None:
    """Rows start … start+R-1 of a weight to out [R, C] of 16-bit floats or float32; columns from k on become zeros.

    out: its columns are contiguous, its rows may be further apart; C is at most the padded width, and R rows exist.
    """
    rows, columns = out.shape
    scale = packed.scale
    assert scale is not None and packed.codes.ndim == 2, (packed.kind, packed.codes.shape)
    assert start >= 0 and start + rows <= packed.rows, (start, rows, packed.rows)
    assert columns <= packed.width, (columns, packed.width)
    assert out.stride(1) == 1 and packed.group % packed.plane == 0, (out.stride(), packed.group)
    sizes = (start, rows, packed.k, packed.width, columns, scale.stride(0), out.stride(0))
    grid = (triton.cdiv(columns, _COLUMNS), triton.cdiv(rows, _ROWS))
    constants = _constants(
        packed.kind, 128 if packed.kind == "fp8" else packed.group, _scale_kind(packed, scale), packed.plane
    )
    if packed.kind in BITS:
        expand_planes[grid](
            packed.codes, scale, packed.zero, packed.table, packed.scale2, out, *sizes, **constants, num_warps=4
        )
    else:
        expand_bytes[grid](packed.codes, scale, packed.zero, out, *sizes, **constants, num_warps=4)


def variants() -> list[Variant]:
    """Each kind of weight with its usual scales."""
    sizes = ("start", "rows", "K", "KP", "C", "G", "stride")
    kinds = (
        # kind, scale, its type, group, plane, whether it has zeros
        ("int4", "float", "*bf16", 64, 32, True),
        ("int4", "channel", "*fp32", 0, 32, False),
        ("int2", "float", "*bf16", 64, 32, True),
        ("codebook", "float", "*bf16", 64, 32, False),
        ("codebook", "e8m0", "*u8", 32, 32, False),
        ("codebook", "e4m3", "*u8", 16, 16, False),
        ("int8", "channel", "*fp32", 0, 32, False),
        ("int8", "float", "*bf16", 64, 32, True),
        ("fp8", "block", "*fp32", 128, 32, False),
    )
    made: list[Variant] = []
    for kind, scale, scale_type, group, plane, zeros in kinds:
        codes = "*i32" if kind in BITS else "*u8" if kind == "fp8" else "*i8"
        pointers = {"codes_ptr": codes, "scale_ptr": scale_type, "out_ptr": "*bf16"}
        if zeros:
            pointers["zero_ptr"] = "*u8"
        if kind == "codebook":
            pointers["table_ptr"] = "*fp32"
        if scale == "e4m3":
            pointers["scale2_ptr"] = "*fp32"
        names = ("zero_ptr", "table_ptr", "scale2_ptr") if kind in BITS else ("zero_ptr",)
        made.append(
            Variant(
                name=f"expand {kind} {scale}",
                kernel=expand_planes if kind in BITS else expand_bytes,
                types={**pointers, **dict.fromkeys(sizes, "i32")},
                constants={
                    **{name: None for name in names if name not in pointers},
                    **_constants(kind, group, scale, plane),
                },
                multiples=("KP", "C", "stride"),
            )
        )
    return made
