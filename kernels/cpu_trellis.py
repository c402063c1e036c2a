"""Trellis codes read in place: six bits of the stream a weight, looked up in a table of 64 bytes.

The windows of a block's bytes are its words shifted, the next word's bits moving in from above; a lookup then needs
only the low six bits of each byte. So four planes of weights come out in the order that `cpu_gemv` has activations in.
Values are unsigned, 128 more than the code's; scales are of 4 bits a group of 32, over one a row.
"""
# pyright: basic

import numpy as np
from llvmlite import ir
from numba import types

from qrun.kernels.cpu_pool import arg, inline
from qrun.kernels.cpu_simd import (
    _B,
    _BYTE,
    _F,
    _I,
    _I32,
    FEATURES,
    X86,
    F32x16,
    I8x64,
    _call,
    _op,
    _splat,
    dot_u8s8,
    fma,
    get_bf16,
    get_f32,
    get_i32,
    get_u8,
    load_bytes,
    load_bytes_first,
    load_f32,
    prefetch,
    shl_i32,
    splat,
    splat_i32,
    store_four_sums,
    to_f32,
)

PER = 4
"""Weights a byte."""
MIDDLE = 128.0
"""What unsigned values have too much."""
GROUPS = 8
"""In a block of 64 bytes."""
_STRIDE = 16  # bytes of codes to a byte of scales
_AHEAD = 1024
_f32 = np.float32
VBMI = bool(FEATURES.get("avx512vbmi")) and bool(FEATURES.get("avx512bw"))
AVX2 = X86 and bool(FEATURES.get("avx2"))
_HALF = ir.VectorType(_BYTE, 32)


def _bytes(kind, *values):
    return ir.Constant(kind, list(values) * (kind.count // len(values)))


def _lookup_shuffled(builder, table, index):
    """By AVX2's lookup in 16 bytes, which gives 0 where bit 7 is set."""
    halves = []
    index = builder.and_(index, _bytes(_B, 63))
    for half in range(2):
        lanes = ir.Constant(ir.VectorType(_I32, 32), [32 * half + i for i in range(32)])
        at = builder.shuffle_vector(index, ir.Constant(_B, ir.Undefined), lanes)
        found = ir.Constant(_HALF, None)
        for quarter in range(4):
            lanes = ir.Constant(ir.VectorType(_I32, 32), [16 * quarter + i % 16 for i in range(32)])
            part = builder.shuffle_vector(table, ir.Constant(_B, ir.Undefined), lanes)
            # Exactly the indices of this quarter stay below 128.
            place = builder.add(builder.xor(at, _bytes(_HALF, 16 * quarter)), _bytes(_HALF, 0x70))
            found = builder.or_(found, _call(builder, "llvm.x86.avx2.pshuf.b", _HALF, part, place))
        halves.append(found)
    whole = ir.Constant(ir.VectorType(_I32, 64), list(range(64)))
    return builder.shuffle_vector(halves[0], halves[1], whole)


def _lookup_portable(builder, table, index):
    result = ir.Constant(_B, ir.Undefined)
    index = builder.and_(index, _bytes(_B, 63))
    for lane in range(64):
        at = ir.Constant(_I32, lane)
        place = builder.zext(builder.extract_element(index, at), _I32)
        result = builder.insert_element(result, builder.extract_element(table, place), at)
    return result


@_op(I8x64, I8x64, I8x64)
def lookup(b, table, index):
    """table[index[l] & 63] in lane l."""
    if VBMI:
        return _call(b, "llvm.x86.avx512.permvar.qi.512", _B, table, index)
    return _lookup_shuffled(b, table, index) if AVX2 else _lookup_portable(b, table, index)


@_op(I8x64, I8x64, I8x64, types.int64)
def windows(b, here, above, count):
    """Words shifted right, with the low bits of `above`, the words that follow each, moving in."""
    kind = ir.VectorType(_I32, 16)
    shift = _splat(b, b.trunc(count, _I32), kind)
    return b.bitcast(_call(b, "llvm.fshr.v16i32", _I, b.bitcast(above, _I), b.bitcast(here, _I), shift), _B)


@_op(F32x16, types.int32)
def steps(b, word):
    """The eight 4-bit numbers of a word, each in two lanes."""
    shifts = ir.Constant(_I, [4 * (lane // 2) for lane in range(16)])
    spread = b.lshr(_splat(b, word, _I), shifts)
    return b.sitofp(b.and_(spread, ir.Constant(_I, [15] * 16)), _F)


@_op(F32x16, F32x16)
def twice(b, x):
    """The first eight lanes, each in two."""
    lanes = ir.Constant(_I, [lane // 2 for lane in range(16)])
    return b.shuffle_vector(x, ir.Constant(_F, ir.Undefined), lanes)


@inline
def _block(address, left):
    if left >= 64:
        return load_bytes(address)
    return load_bytes_first(address, left)


@inline
def plane(codes, left, j, table):
    """Unsigned values of weights 4i + j, for bytes i of a block; `left` bytes of the row begin there."""
    here = _block(codes, left)
    if j == 0:
        return lookup(table, here)
    return lookup(table, windows(here, _block(codes + 4, left - 4), 2 * j))


@inline
def step(a, n, g):
    """Group g's scale in row n, before the row's own; 0 beyond the row's end."""
    each = arg(a, 1) // _STRIDE
    if g // 2 >= each:
        return _f32(0)
    both = get_u8(arg(a, 3) + n * each + g // 2)
    return _f32((both >> (4 * (g % 2))) & 15)


@inline
def _steps(a, n, t):
    """Block t's scales in row n, each in two lanes."""
    each = arg(a, 1) // _STRIDE
    at = arg(a, 3) + n * each + 4 * t
    left = each - 4 * t
    if left >= 4:
        return steps(get_i32(at))
    word = np.int32(0)
    for i in range(left):
        word |= np.int32(get_u8(at + i)) << np.int32(8 * i)
    return steps(word)


@inline
def _dot(codes, left, x, table):
    hi = splat_i32(np.int32(0))
    lo = splat_i32(np.int32(0))
    for j in range(PER):
        u = plane(codes, left, j, table)
        hi = dot_u8s8(hi, u, load_bytes(x + 128 * j))
        lo = dot_u8s8(lo, u, load_bytes(x + 128 * j + 64))
    return to_f32(shl_i32(hi, 8) + lo)


@inline
def four(a, planes, spans, sums, n0, n1, n2, n3, out):
    """Four rows at once, as `cpu_gemv` takes them; arguments 3 the groups' scales, 4 the rows' (bf16), 10 the table."""
    codes, row, blocks, table = arg(a, 0), arg(a, 1), arg(a, 2), load_bytes(arg(a, 10))
    c0, c1, c2, c3 = codes + n0 * row, codes + n1 * row, codes + n2 * row, codes + n3 * row
    f0 = splat(_f32(0))
    f1 = splat(_f32(0))
    f2 = splat(_f32(0))
    f3 = splat(_f32(0))
    for t in range(blocks):
        x, at, left = planes + t * 128 * PER, 64 * t, row - 64 * t
        s = splat(get_f32(spans + 4 * t))
        less = twice(load_f32(sums + 4 * GROUPS * t)) * splat(_f32(-MIDDLE / 2))
        prefetch(c0 + 4 * row + at)
        prefetch(c1 + 4 * row + at)
        prefetch(c2 + 4 * row + at)
        prefetch(c3 + 4 * row + at)
        f0 = fma(fma(_dot(c0 + at, left, x, table), s, less), _steps(a, n0, t), f0)
        f1 = fma(fma(_dot(c1 + at, left, x, table), s, less), _steps(a, n1, t), f1)
        f2 = fma(fma(_dot(c2 + at, left, x, table), s, less), _steps(a, n2, t), f2)
        f3 = fma(fma(_dot(c3 + at, left, x, table), s, less), _steps(a, n3, t), f3)
    rows = arg(a, 4)
    f0 = f0 * splat(get_bf16(rows + 2 * n0))
    f1 = f1 * splat(get_bf16(rows + 2 * n1))
    f2 = f2 * splat(get_bf16(rows + 2 * n2))
    f3 = f3 * splat(get_bf16(rows + 2 * n3))
    store_four_sums(out, f0, f1, f2, f3)
