"""A tile of a weight times a few tokens, whatever its codes: what `gpu_gemv_core` does with each step along K.

What the decoded codes' offsets and their zero points add to a dot comes off it again, by Σx.
"""
# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false

import triton
import triton.language as tl

from qrun.kernels.gpu_bits import e4m3_decode
from qrun.kernels.gpu_decode import e4m3_words, fields, looked_up


@triton.jit
def as_scales(s, SCALE: tl.constexpr):
    """Stored scales as float32."""
    if SCALE == "e8m0":
        wide = (s.to(tl.int32) << 23).to(tl.float32, bitcast=True)  # the least, 2^-127, as 0
    elif SCALE == "e4m3":
        wide = e4m3_decode(s)
    else:
        wide = s.to(tl.float32)
    return wide


@triton.constexpr_function
def spans(KIND, GROUP, PLANE, TILE):
    """Parts of a tile that have a scale each: as many as groups that divide it, else one or, for odd groups, planes."""
    if GROUP == 0 or GROUP % TILE == 0 or KIND == "fp8":
        return 1
    return TILE // GROUP if TILE % GROUP == 0 else TILE // PLANE


@triton.jit
def spans_at(scale, zero, t, rows, NP, GROUP: tl.constexpr, ZERO: tl.constexpr, TILE: tl.constexpr,
             SPANS: tl.constexpr):  # fmt: skip
    """Scales and zeros of the spans of tile t, as they are stored, one [ROWS] each."""
    scales = ()
    zeros = ()
    for j in tl.static_range(SPANS):
        at = (t * TILE + j * (TILE // SPANS)) // GROUP * NP + rows
        scales = scales + (tl.load(scale + at),)  # noqa: RUF005
        if ZERO:
            zeros = zeros + (tl.load(zero + at),)  # noqa: RUF005
        else:
            zeros = zeros + (0,)  # noqa: RUF005
    return scales, zeros


@triton.jit
def values_of(x, x_rows, x_stride, there, k, SIZE: tl.constexpr, ONE: tl.constexpr):
    """x [SIZE, COLS] of the columns' rows at k …"""
    at = x + x_rows[None, :] * x_stride + k + tl.arange(0, SIZE)[:, None]
    if ONE:
        values = tl.load(at)
    else:
        values = tl.load(at, mask=there[None, :], other=0.0)
    return values


@triton.jit
def sums_over(sums, s_rows, sums_stride, there, g, COUNT: tl.constexpr, BITS: tl.constexpr, FIRST: tl.constexpr,
              RUN: tl.constexpr, ONE: tl.constexpr):  # fmt: skip
    """Σx over COUNT runs of 32 from the g-th, and the same with each divided as its plane stands in the words."""
    whole = tl.zeros_like(s_rows).to(tl.float32)
    shifted = whole
    for i in tl.static_range(COUNT):
        if ONE:
            one = tl.load(sums + s_rows * sums_stride + g + i)
        else:
            one = tl.load(sums + s_rows * sums_stride + g + i, mask=there, other=0.0)
        whole += one
        shifted += one * (1.0 / (1 << (BITS * ((FIRST + i) % RUN))))
    return whole, shifted


@triton.jit
def planes_times(acc, off, t, words, x, x_rows, x_stride, sums, s_rows, sums_stride, there, scales, zeros, scale, zero,
                 rows, NP, table, KIND: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr,
                 PLANE: tl.constexpr, PTX: tl.constexpr, ASM: tl.constexpr, ONE: tl.constexpr,
                 AHEAD: tl.constexpr):  # fmt: skip
    """The tile t of 2- or 4-bit codes, in words [ROWS, PLANE/2], times x: added to acc [ROWS, COLS].

    Of a single token (ONE), what offsets and zero points add to acc is added to off [ROWS] too. AHEAD: scales and
    zeros are there.
    """
    HALF: tl.constexpr = x.dtype.element_ty
    BASE: tl.constexpr = 128.0 if tl.bfloat16 == HALF else 1024.0
    BITS: tl.constexpr = 2 if KIND == "int2" else 4
    PLANES: tl.constexpr = 16 // BITS
    TILE: tl.constexpr = PLANES * PLANE
    # Fields that stand above each other in a mantissa; further ones are shifted down first.
    RUN: tl.constexpr = 3 if BITS == 2 else (1 if tl.bfloat16 == HALF else 2)
    SPANS: tl.constexpr = spans(KIND, GROUP, PLANE, TILE)
    PER: tl.constexpr = PLANES // SPANS
    ahead = None
    for j in tl.static_range(SPANS):
        part = tl.zeros_like(acc) if GROUP > 0 else acc
        for i in tl.static_range(PER):
            xp = values_of(x, x_rows, x_stride, there, t * TILE + (j * PER + i) * PLANE, PLANE, ONE)
            if KIND == "codebook":
                if (j * PER + i) % 2 == 0:
                    a, ahead = looked_up(words, table, (j * PER + i) // 2, HALF, PTX)
                else:
                    a = ahead
            else:
                a = fields(words, BITS, (j * PER + i) // RUN * RUN, (j * PER + i) % RUN, HALF, ASM)
                xp = lowered(xp, BITS * ((j * PER + i) % RUN))
            part = tl.dot(a, xp, part)
        s = tl.full((acc.shape[0],), 1.0, tl.float32)
        if GROUP > 0:
            group = (t * TILE + j * (PER * PLANE)) // GROUP
            s = as_scales(scales[j] if AHEAD else tl.load(scale + group * NP + rows), SCALE)
        if KIND != "codebook":
            whole, shifted = sums_over(
                sums, s_rows, sums_stride, there, t * PLANES + j * PER, PER, BITS, j * PER, RUN, ONE
            )
            z = tl.full((acc.shape[0],), 1 << (BITS - 1), tl.float32)
            if ZERO:
                z = (zeros[j] if AHEAD else tl.load(zero + group * NP + rows)).to(tl.float32)
            part, off = corrected(part, off, s, z, whole, shifted * BASE, ONE)
        acc = acc + part * s[:, None] if GROUP > 0 else part
    return acc, off


@triton.jit
def corrected(part, off, s, z, whole, shifted, ONE: tl.constexpr):
    """part without what offsets and zero points have added to it; of a single token off has that, times s, instead."""
    if ONE:
        off += s * (shifted + z * whole)
    else:
        part -= shifted[None, :] + z[:, None] * whole[None, :]
    return part, off


@triton.jit
def lowered(x, BY: tl.constexpr):
    """x / 2^BY."""
    if BY > 0:
        x = (x.to(tl.float32) * (1.0 / (1 << BY))).to(x.dtype)
    return x


@triton.jit
def bytes_times(acc, off, t, codes, x, x_rows, x_stride, sums, s_rows, sums_stride, there, scales, zeros, scale, zero,
                rows, NP, GROUPS, KIND: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr,
                TILE: tl.constexpr, PTX: tl.constexpr, ONE: tl.constexpr, AHEAD: tl.constexpr):  # fmt: skip
    """The same for a tile t of 8- or 16-bit codes: [ROWS, TILE], or words of four [ROWS, TILE/4]."""
    HALF: tl.constexpr = x.dtype.element_ty
    xp = values_of(x, x_rows, x_stride, there, t * TILE, TILE, ONE)
    if PTX != "":
        a = e4m3_words(codes, PTX)
    elif KIND == "fp8":
        a = e4m3_decode(codes).to(HALF)
    else:
        a = codes.to(HALF)
    if KIND == "fp8":
        acc += tl.dot(a, xp) * tl.load(scale + rows // 128 * GROUPS + t)[:, None]
    elif GROUP == 0:
        acc = tl.dot(a, xp, acc)
    else:
        at = t * TILE // GROUP * NP + rows
        s = as_scales(scales[0] if AHEAD else tl.load(scale + at), SCALE)
        part = tl.dot(a, xp)
        if ZERO:
            z = (zeros[0] if AHEAD else tl.load(zero + at)).to(tl.float32) - 128.0
            whole, _ = sums_over(sums, s_rows, sums_stride, there, t * (TILE // 32), TILE // 32, 0, 0, 1, ONE)
            part, off = corrected(part, off, s, z, whole, 0.0 * whole, ONE)
        acc += part * s[:, None]
    return acc, off
