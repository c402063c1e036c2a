"""The inside of the CPU's matrix products: a tile of 6 tokens × 64 outputs held in 24 vector registers.

Weights of a tile lie k by k (bytes: four k by four k), 64 outputs wide, so that one load serves 16 outputs and one
broadcast activation serves 64. Written as LLVM because 24 accumulators by name would be no easier to read.
"""
# pyright: basic

from llvmlite import ir
from numba import types

from qrun.kernels.cpu_simd import (
    _B,
    _F,
    _F32,
    _I,
    _I32,
    VNNI,
    F32x16,
    I32x16,
    _call,
    _dot_portable,
    _load,
    _op,
    _pointer,
    _splat,
)

TOKENS = 6
VECTORS = 4
WIDTH = 16 * VECTORS
Ints = types.UniTuple(I32x16, TOKENS * VECTORS)
Floats = types.UniTuple(F32x16, TOKENS * VECTORS)
_INTS, _FLOATS = ir.ArrayType(_I, TOKENS * VECTORS), ir.ArrayType(_F, TOKENS * VECTORS)
_I64 = types.int64


def _at(builder, address, offset):
    return builder.add(address, ir.Constant(ir.IntType(64), offset)) if offset else address


def _cells(builder, tile):
    return [builder.extract_value(tile, i) for i in range(TOKENS * VECTORS)]


def _tile(builder, cells, kind):
    tile = ir.Constant(kind, ir.Undefined)
    for i, cell in enumerate(cells):
        tile = builder.insert_value(tile, cell, i)
    return tile


def _weights(builder, address, kind):
    return [_load(builder, _at(builder, address, 64 * c), kind) for c in range(VECTORS)]


def _tokens(builder, address, stride):
    for _ in range(TOKENS):
        yield address
        address = builder.add(address, stride)


@_op(Ints)
def zero_ints(b):
    return ir.Constant(_INTS, None)


@_op(Floats)
def zero_floats(b):
    return ir.Constant(_FLOATS, None)


@_op(Ints, Ints, _I64, _I64, _I64)
def tile_dot(b, tile, weights, x, stride):
    """tile += four k: u8 weights [64][4] times signed bytes x [4] of each token."""
    cells = _cells(b, tile)
    columns = _weights(b, weights, _I)
    for i, token in enumerate(_tokens(b, x, stride)):
        quad = _splat(b, _load(b, token, _I32), _I)
        for c, column in enumerate(columns):
            at = VECTORS * i + c
            if VNNI:
                cells[at] = _call(b, "llvm.x86.avx512.vpdpbusd.512", _I, cells[at], column, quad)
            else:
                cells[at] = _dot_portable(b, cells[at], b.bitcast(column, _B), b.bitcast(quad, _B))
    return _tile(b, cells, _INTS)


@_op(Ints, Ints)
def tile_shift(b, tile):
    """Times 256."""
    return _tile(b, [b.shl(cell, ir.Constant(_I, [8] * 16)) for cell in _cells(b, tile)], _INTS)


@_op(Floats, Floats, _I64, _I64, _I64)
def tile_fma(b, tile, weights, x, stride):
    """tile += one k: float32 weights [64] times x of each token."""
    cells = _cells(b, tile)
    columns = _weights(b, weights, _F)
    for i, token in enumerate(_tokens(b, x, stride)):
        value = _splat(b, _load(b, token, _F32, 4), _F)
        for c, column in enumerate(columns):
            at = VECTORS * i + c
            cells[at] = _call(b, "llvm.fma.v16f32", _F, column, value, cells[at])
    return _tile(b, cells, _FLOATS)


@_op(Floats, _I64)
def tile_load(b, address):
    """[6][64] floats."""
    return _tile(b, [_load(b, _at(b, address, 64 * i), _F) for i in range(TOKENS * VECTORS)], _FLOATS)


@_op(types.void, _I64, Floats)
def tile_store(b, address, tile):
    for i, cell in enumerate(_cells(b, tile)):
        b.store(cell, _pointer(b, _at(b, address, 64 * i), _F)).align = 64
    return


def _flush(b, tile, out, scales, x_scales, stride):
    columns = None if scales is None else _weights(b, scales, _F)
    cells = _cells(b, tile)
    for i, token in enumerate(_tokens(b, x_scales, stride)):
        factor = _splat(b, _load(b, token, _F32, 4), _F)
        for c in range(VECTORS):
            at = VECTORS * i + c
            place = _at(b, out, 64 * at)
            scale = factor if columns is None else b.fmul(columns[c], factor)
            total = _call(b, "llvm.fma.v16f32", _F, b.sitofp(cells[at], _F), scale, _load(b, place, _F, 64))
            b.store(total, _pointer(b, place, _F)).align = 64
    return


@_op(types.void, Ints, _I64, _I64, _I64, _I64)
def tile_flush(b, tile, out, scales, x_scales, stride):
    """out [6][64] += tile · scales [64] · each token's scale."""
    return _flush(b, tile, out, scales, x_scales, stride)


@_op(types.void, Ints, _I64, _I64, _I64)
def tile_flush_tokens(b, tile, out, x_scales, stride):
    """out [6][64] += tile · each token's scale."""
    return _flush(b, tile, out, None, x_scales, stride)


@_op(types.void, _I64, _I64, _I64, _I64)
def transpose(b, source, stride, out, out_stride):
    """A 16 × 16 matrix of 32-bit words, from rows `stride` bytes apart to columns `out_stride` bytes apart."""
    rows = []
    for _ in range(16):
        rows.append(_load(b, source, _I))
        source = b.add(source, stride)
    for step in (8, 4, 2, 1):
        low = [j if j & step == 0 else 16 + j - step for j in range(16)]
        high = [j + step if j & step == 0 else 16 + j for j in range(16)]
        for i in range(16):
            if i & step == 0:
                x, y = rows[i], rows[i + step]
                rows[i] = b.shuffle_vector(x, y, ir.Constant(_I, low))
                rows[i + step] = b.shuffle_vector(x, y, ir.Constant(_I, high))
    for row in rows:
        b.store(row, _pointer(b, out, _I)).align = 4
        out = b.add(out, out_stride)
    return
