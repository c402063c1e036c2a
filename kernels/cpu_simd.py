"""512-bit vectors, raw addresses and atomics for Numba kernels.

Vectors are Numba types of their own, so a kernel is written one machine instruction at a time in Python and does not
depend on what the auto-vectoriser finds. LLVM splits them where the CPU has narrower registers; the two operations
that only some CPUs have (the byte dot product and the lane permutation) choose their form once, from the host's
features. An address is an int64; nothing here checks bounds. Knows nothing of weights or models.
"""
# pyright: basic
# Numba is untyped: strict checking of its decorators would only say so once a line.

import operator
import os
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, models, register_model

FEATURES = llvm.get_host_cpu_features()
VNNI = bool(FEATURES.get("avx512vnni")) and bool(FEATURES.get("avx512bw"))
WIDE = bool(FEATURES.get("avx512f")) and bool(FEATURES.get("avx512bw"))
X86 = llvm.get_process_triple().startswith(("x86_64", "amd64"))

_BIT, _BYTE, _I32, _I64, _F32 = ir.IntType(1), ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_F, _I, _B = ir.VectorType(_F32, 16), ir.VectorType(_I32, 16), ir.VectorType(_BYTE, 64)


class Vector(types.Type):
    """A vector value in a register; `native` is its LLVM type."""

    def __init__(self, name, native):
        self.native = native
        super().__init__(name=name)


F32x16 = Vector("f32x16", _F)
I32x16 = Vector("i32x16", _I)
I8x64 = Vector("i8x64", _B)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, vector.native)


def _op(result: Any, *args: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Turns `build(builder, *values) -> value` into an intrinsic with exactly these types."""

    def wrap(build):
        count = len(args)
        sig = result(*args)

        def codegen(context, builder, sig, values):
            return build(builder, *values)

        def typing(*given):
            if any(
                isinstance(want, Vector) != isinstance(have, Vector) for want, have in zip(args, given, strict=True)
            ):
                return None
            return sig, codegen

        names = ", ".join(f"a{i}" for i in range(count))
        scope = {"typing": typing}
        exec(f"def {build.__name__}(typingctx{', ' if names else ''}{names}):\n    return typing({names})", scope)
        made = scope[build.__name__]
        made.__module__ = __name__
        made.__doc__ = build.__doc__
        return intrinsic(made)

    return wrap


def _call(builder, name, result, *values):
    module = builder.module
    function = module.globals.get(name)
    if function is None:
        function = ir.Function(module, ir.FunctionType(result, [v.type for v in values]), name)
    return builder.call(function, values)


def _pointer(builder, address, kind):
    return builder.inttoptr(address, kind.as_pointer())


def _splat(builder, value, kind):
    lane = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(
        lane, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(_I32, kind.count), None)
    )


def _load(builder, address, kind, align=1):
    value = builder.load(_pointer(builder, address, kind))
    value.align = align
    return value


def _first_lanes(builder, count, lanes):
    """<lanes x i1>: lane < count."""
    kind = ir.VectorType(_I32, lanes)
    index = ir.Constant(kind, list(range(lanes)))
    return builder.icmp_signed("<", index, _splat(builder, builder.trunc(count, _I32), kind))


def _load_first(builder, address, count, kind):
    suffix = f"v{kind.count}i{kind.element.width}"
    return _call(
        builder,
        f"llvm.masked.load.{suffix}.p0",
        kind,
        _pointer(builder, address, kind),
        ir.Constant(_I32, 1),
        _first_lanes(builder, count, kind.count),
        ir.Constant(kind, None),
    )


# --- memory -----------------------------------------------------------------------------------------------------------


@_op(types.void, types.int64)
def prefetch(b, address):
    """Ask for a cache line; any address will do."""
    name = "llvm.prefetch.p0"
    place = b.inttoptr(address, _BYTE.as_pointer())
    _call(b, name, ir.VoidType(), place, *(ir.Constant(_I32, flag) for flag in (0, 3, 1)))
    return


@_op(F32x16, types.int64)
def load_f32(b, address):
    return _load(b, address, _F, 4)


@_op(types.void, types.int64, F32x16)
def store_f32(b, address, value):
    b.store(value, _pointer(b, address, _F)).align = 4
    return


@_op(I32x16, types.int64)
def load_i32(b, address):
    return _load(b, address, _I)


@_op(I8x64, types.int64)
def load_bytes(b, address):
    return _load(b, address, _B)


@_op(I8x64, types.int64, types.int64)
def load_bytes_first(b, address, count):
    """The first `count` bytes, zeros after; reads nothing beyond."""
    return _load_first(b, address, count, _B)


_H = ir.VectorType(ir.IntType(16), 16)
_Q = ir.VectorType(_BYTE, 16)


def _bf16(builder, halves):
    return builder.bitcast(builder.shl(builder.zext(halves, _I), ir.Constant(_I, [16] * 16)), _F)


@_op(F32x16, types.int64)
def load_bf16(b, address):
    return _bf16(b, _load(b, address, _H))


@_op(F32x16, types.int64, types.int64)
def load_bf16_first(b, address, count):
    return _bf16(b, _load_first(b, address, count, _H))


@_op(F32x16, types.int64, types.int64)
def load_f32_first(b, address, count):
    """The first `count` floats, zeros after; reads nothing beyond."""
    return b.bitcast(_load_first(b, address, count, _I), _F)


@_op(F32x16, types.int64)
def load_s8_f32(b, address):
    """Sixteen signed bytes as floats."""
    return b.sitofp(b.sext(_load(b, address, _Q), _I), _F)


@_op(F32x16, types.int64)
def load_u8_f32(b, address):
    return b.uitofp(b.zext(_load(b, address, _Q), _I), _F)


@_op(F32x16, types.int64, types.int64)
def load_u8_f32_first(b, address, count):
    return b.uitofp(b.zext(_load_first(b, address, count, _Q), _I), _F)


@_op(I32x16, types.int64, types.int64)
def load_u8_i32_first(b, address, count):
    return b.zext(_load_first(b, address, count, _Q), _I)


@_op(I32x16, types.int64)
def load_u8_i32(b, address):
    return b.zext(_load(b, address, _Q), _I)


@_op(types.void, types.int64, I32x16)
def store_i32(b, address, value):
    b.store(value, _pointer(b, address, _I)).align = 4
    return


@_op(types.void, types.int64, I32x16)
def store_i32_u8(b, address, value):
    """The low byte of each lane."""
    b.store(b.trunc(value, _Q), _pointer(b, address, _Q)).align = 1
    return


def _shuffle(builder, x, y, lanes):
    return builder.shuffle_vector(x, y, ir.Constant(_I, lanes))


@_op(F32x16, F32x16, F32x16)
def evens(b, x, y):
    """Lanes 0, 2, … of x, then of y."""
    return _shuffle(b, x, y, list(range(0, 32, 2)))


@_op(F32x16, F32x16, F32x16)
def odds(b, x, y):
    """Lanes 1, 3, … of x, then of y."""
    return _shuffle(b, x, y, list(range(1, 32, 2)))


@_op(F32x16, F32x16, F32x16)
def zip_low(b, x, y):
    """x0 y0 x1 y1 … of the first eight lanes."""
    return _shuffle(b, x, y, [i // 2 + 16 * (i % 2) for i in range(16)])


@_op(F32x16, F32x16, F32x16)
def zip_high(b, x, y):
    """x8 y8 x9 y9 … of the last eight lanes."""
    return _shuffle(b, x, y, [8 + i // 2 + 16 * (i % 2) for i in range(16)])


@_op(types.float32, types.int64)
def get_f32(b, address):
    return _load(b, address, _F32, 4)


@_op(types.void, types.int64, types.float32)
def set_f32(b, address, value):
    b.store(value, _pointer(b, address, _F32)).align = 4
    return


@_op(types.int64, types.int64)
def get_i64(b, address):
    return _load(b, address, _I64, 8)


@_op(types.void, types.int64, types.int64)
def set_i64(b, address, value):
    b.store(value, _pointer(b, address, _I64)).align = 8
    return


@_op(types.int64, types.int64)
def get_u8(b, address):
    return b.zext(_load(b, address, _BYTE), _I64)


@_op(types.void, types.int64, types.int64)
def set_u8(b, address, value):
    b.store(b.trunc(value, _BYTE), _pointer(b, address, _BYTE)).align = 1
    return


@_op(types.void, types.int64, F32x16, types.int64)
def store_f32_first(b, address, value, count):
    """The first `count` lanes; touches nothing beyond."""
    name = "llvm.masked.store.v16f32.p0"
    _call(b, name, ir.VoidType(), value, _pointer(b, address, _F), ir.Constant(_I32, 4), _first_lanes(b, count, 16))
    return


@_op(types.float32, types.int64)
def get_bf16(b, address):
    half = _load(b, address, ir.IntType(16), 2)
    return b.bitcast(b.shl(b.zext(half, _I32), ir.Constant(_I32, 16)), _F32)


@_op(types.void, types.int64, types.float32)
def set_bf16(b, address, value):
    """Rounded to nearest even."""
    bits = b.bitcast(value, _I32)
    odd = b.and_(b.lshr(bits, ir.Constant(_I32, 16)), ir.Constant(_I32, 1))
    rounded = b.lshr(b.add(b.add(bits, ir.Constant(_I32, 0x7FFF)), odd), ir.Constant(_I32, 16))
    b.store(b.trunc(rounded, ir.IntType(16)), _pointer(b, address, ir.IntType(16))).align = 2
    return


@_op(types.int32, types.int64)
def get_i32(b, address):
    return _load(b, address, _I32, 1)


@_op(types.void, types.int64, types.int32)
def set_i32(b, address, value):
    b.store(value, _pointer(b, address, _I32)).align = 1
    return


@_op(types.int32, types.float32)
def bits_of(b, value):
    return b.bitcast(value, _I32)


@_op(types.float32, types.int32)
def float_of(b, bits):
    return b.bitcast(bits, _F32)


# --- arithmetic -------------------------------------------------------------------------------------------------------


@_op(F32x16, types.float32)
def splat(b, value):
    return _splat(b, value, _F)


@_op(I32x16, types.int32)
def splat_i32(b, value):
    return _splat(b, value, _I)


@_op(I8x64, types.int64)
def splat_bytes(b, value):
    return _splat(b, b.trunc(value, _BYTE), _B)


@_op(I8x64, types.int64)
def splat_quad(b, address):
    """Four bytes from memory, repeated sixteen times."""
    return b.bitcast(_splat(b, _load(b, address, _I32), _I), _B)


@_op(F32x16, F32x16, F32x16, F32x16)
def fma(b, x, y, z):
    return _call(b, "llvm.fma.v16f32", _F, x, y, z)


@_op(F32x16, F32x16, F32x16)
def fmax(b, x, y):
    return b.select(b.fcmp_ordered(">", x, y), x, y)


@_op(F32x16, F32x16, types.int64, types.int64, types.float32)
def keep(b, x, low, high, other):
    """Lanes low … high-1 of x, and `other` in the rest."""
    index = ir.Constant(_I, list(range(16)))
    inside = b.and_(
        b.icmp_signed(">=", index, _splat(b, b.trunc(low, _I32), _I)),
        b.icmp_signed("<", index, _splat(b, b.trunc(high, _I32), _I)),
    )
    return b.select(inside, x, _splat(b, other, _F))


@_op(F32x16, F32x16)
def fabs(b, x):
    return _call(b, "llvm.fabs.v16f32", _F, x)


@_op(F32x16, F32x16)
def rint(b, x):
    return _call(b, "llvm.rint.v16f32", _F, x)


@_op(F32x16, F32x16, F32x16)
def fdiv(b, x, y):
    return b.fdiv(x, y)


@_op(F32x16, F32x16)
def exp(b, x):
    """e to each lane, to about 2e-7 relative; below -87 it is 0 or tiny, above 88 it is huge."""

    def const(value):
        return ir.Constant(_F, [value] * 16)

    x = b.select(b.fcmp_ordered("<", x, const(-87.0)), const(-87.0), x)
    x = b.select(b.fcmp_ordered(">", x, const(88.0)), const(88.0), x)
    n = _call(b, "llvm.rint.v16f32", _F, b.fmul(x, const(1.4426950408889634)))
    r = _call(b, "llvm.fma.v16f32", _F, n, const(-0.693359375), x)
    r = _call(b, "llvm.fma.v16f32", _F, n, const(2.12194440e-4), r)
    y = const(1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        y = _call(b, "llvm.fma.v16f32", _F, y, r, const(c))
    y = _call(b, "llvm.fma.v16f32", _F, b.fmul(r, r), y, b.fadd(r, const(1.0)))
    power = b.shl(b.add(b.fptosi(n, _I), ir.Constant(_I, [127] * 16)), ir.Constant(_I, [23] * 16))
    return b.fmul(y, b.bitcast(power, _F))


@_op(types.float32, F32x16)
def sum_lanes(b, x):
    name = "llvm.vector.reduce.fadd.v16f32"
    function = b.module.globals.get(name) or ir.Function(b.module, ir.FunctionType(_F32, [_F32, _F]), name)
    return b.call(function, [ir.Constant(_F32, 0.0), x], fastmath=("reassoc",))


@_op(types.float32, F32x16)
def max_lanes(b, x):
    name = "llvm.vector.reduce.fmax.v16f32"
    function = b.module.globals.get(name) or ir.Function(b.module, ir.FunctionType(_F32, [_F]), name)
    return b.call(function, [x], fastmath=("nnan",))


@_op(types.void, types.int64, F32x16, F32x16, F32x16, F32x16)
def store_four_sums(b, address, x, y, z, w):
    """The sums of the lanes of four vectors, side by side."""

    def quarters(first, second, lanes):
        return _shuffle(b, first, second, [4 * q + lane % 16 + 16 * (lane // 16) for q in range(4) for lane in lanes])

    def folded(first, second):
        return b.fadd(quarters(first, second, (0, 16, 1, 17)), quarters(first, second, (2, 18, 3, 19)))

    xy, zw = folded(x, y), folded(z, w)
    total = b.fadd(quarters(xy, zw, (0, 1, 16, 17)), quarters(xy, zw, (2, 3, 18, 19)))
    undefined = ir.Constant(_F, ir.Undefined)
    for half in (8, 4):
        high = _shuffle(b, total, undefined, [(lane + half) % 16 for lane in range(16)])
        total = b.fadd(total, high)
    four = b.shuffle_vector(total, undefined, ir.Constant(ir.VectorType(_I32, 4), [0, 1, 2, 3]))
    b.store(four, _pointer(b, address, ir.VectorType(_F32, 4))).align = 4


@_op(F32x16, I32x16)
def to_f32(b, x):
    return b.sitofp(x, _F)


@_op(I32x16, F32x16)
def to_i32(b, x):
    """Truncates; the lanes must fit."""
    return b.fptosi(x, _I)


@_op(I32x16, F32x16)
def as_i32(b, x):
    return b.bitcast(x, _I)


@_op(F32x16, I32x16)
def as_f32(b, x):
    return b.bitcast(x, _F)


@_op(I32x16, I32x16, types.int64)
def shl_i32(b, x, count):
    return b.shl(x, _splat(b, b.trunc(count, _I32), _I))


@_op(I32x16, I32x16, types.int64)
def shr_i32(b, x, count):
    """Logical."""
    return b.lshr(x, _splat(b, b.trunc(count, _I32), _I))


@_op(I32x16, I32x16, types.int64)
def sar_i32(b, x, count):
    """Arithmetic."""
    return b.ashr(x, _splat(b, b.trunc(count, _I32), _I))


@_op(I32x16, I32x16, I32x16)
def and_i32(b, x, y):
    return b.and_(x, y)


@_op(I32x16, I8x64)
def bytes_as_i32(b, x):
    return b.bitcast(x, _I)


@_op(I8x64, I8x64, I8x64)
def xor_bytes(b, x, y):
    return b.xor(x, y)


@_op(I8x64, I8x64, I8x64)
def and_bytes(b, x, y):
    return b.and_(x, y)


@_op(I8x64, I8x64, types.int64)
def shr_bytes(b, x, count):
    """Shifts whole 32-bit lanes: mask afterwards."""
    return b.bitcast(b.lshr(b.bitcast(x, _I), _splat(b, b.trunc(count, _I32), _I)), _B)


def _dot_portable(b, total, unsigned, signed):
    wide = ir.VectorType(_I32, 64)
    products = b.mul(b.zext(unsigned, wide), b.sext(signed, wide))
    for j in range(4):
        pick = ir.Constant(_I, [4 * lane + j for lane in range(16)])
        total = b.add(total, b.shuffle_vector(products, ir.Constant(wide, ir.Undefined), pick))
    return total


@_op(I32x16, I32x16, I8x64, I8x64)
def dot_u8s8(b, total, unsigned, signed):
    """total[l] + the sum of four products unsigned[4l+j] * signed[4l+j], exact."""
    if VNNI:
        return _call(b, "llvm.x86.avx512.vpdpbusd.512", _I, total, b.bitcast(unsigned, _I), b.bitcast(signed, _I))
    return _dot_portable(b, total, unsigned, signed)


@_op(F32x16, F32x16, I32x16)
def permute(b, table, index):
    """table[index[l] & 15] in lane l."""
    if WIDE:
        return _call(b, "llvm.x86.avx512.permvar.sf.512", _F, table, index)
    result = ir.Constant(_F, ir.Undefined)
    index = b.and_(index, ir.Constant(_I, [15] * 16))
    for lane in range(16):
        at = ir.Constant(_I32, lane)
        result = b.insert_element(result, b.extract_element(table, b.extract_element(index, at)), at)
    return result


def _binary(function, vector, method):
    @lower_builtin(function, vector, vector)
    def lower(context, builder, sig, args):
        return getattr(builder, method)(*args)


for _function, _float, _int in (
    (operator.add, "fadd", "add"),
    (operator.sub, "fsub", "sub"),
    (operator.mul, "fmul", "mul"),
):
    _binary(_function, F32x16, _float)
    _binary(_function, I32x16, _int)

    @infer_global(_function)
    class _VectorArithmetic(ConcreteTemplate):
        cases = [signature(v, v, v) for v in (F32x16, I32x16)]  # noqa: RUF012


# --- between threads --------------------------------------------------------------------------------------------------


@_op(types.int64, types.int64, types.int64)
def atomic_add(b, address, value):
    """Adds; the value before."""
    return b.atomic_rmw("add", _pointer(b, address, _I64), value, "seq_cst")


@_op(types.int64, types.int64)
def atomic_get(b, address):
    return b.load_atomic(_pointer(b, address, _I64), "seq_cst", 8)


@_op(types.void, types.int64, types.int64)
def atomic_set(b, address, value):
    b.store_atomic(value, _pointer(b, address, _I64), "seq_cst", 8)
    return


@_op(types.int64, types.int64, types.int64)
def atomic_swap(b, address, value):
    """Stores; the value before."""
    return b.atomic_rmw("xchg", _pointer(b, address, _I64), value, "seq_cst")


@_op(types.int64, types.int64, types.int64, types.int64)
def atomic_replace(b, address, old, new):
    """Stores `new` where `old` stands; the value before."""
    return b.extract_value(b.cmpxchg(_pointer(b, address, _I64), old, new, "seq_cst", "seq_cst"), 0)


@_op(types.void)
def yield_core(b):
    """Lets another thread have this core."""
    if os.name == "posix":
        _call(b, "sched_yield", _I32)
    return


@_op(types.void)
def pause(b):
    """Tells the core that this is a spin loop."""
    if X86:
        _call(b, "llvm.x86.sse2.pause", ir.VoidType())
    return


@_op(types.int64, types.int64, types.int64, types.int64, types.int64)
def call_kernel(b, function, args, thread, job):
    """Calls int64 (*)(int64 args, int64 thread, int64 job)."""
    kind = ir.FunctionType(_I64, [_I64, _I64, _I64])
    return b.call(b.inttoptr(function, kind.as_pointer()), [args, thread, job])
