"""A few tokens through a quantized weight: y = W x, the codes read once and multiplied as they arrive.

W is the dot's left operand, so that one token costs eight columns and not sixteen rows of padding; zero points and the
offsets of the decoded codes come off after each dot by Σx. Pieces of K, or a token's experts, are programs of their
own, and the last to finish adds them up, in order. How x was made and what y means is the caller's affair.
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
        wide = (s.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    elif SCALE == "e4m3":
        wide = e4m3_decode(s)
    else:
        wide = s.to(tl.float32)
    return wide


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
def planes_times(acc, off, t, words, x, x_rows, x_stride, sums, s_rows, sums_stride, there, scale, zero, table, rows,
                 NP, KIND: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr,
                 PLANE: tl.constexpr, PTX: tl.constexpr, ASM: tl.constexpr, ONE: tl.constexpr):  # fmt: skip
    """The tile t of 2- or 4-bit codes, in words [ROWS, PLANE/2], times x: added to acc [ROWS, COLS].

    What offsets and zero points have added to acc is added to off [ROWS, 1 or COLS].
    """
    HALF: tl.constexpr = x.dtype.element_ty
    BASE: tl.constexpr = 128.0 if tl.bfloat16 == HALF else 1024.0
    BITS: tl.constexpr = 2 if KIND == "int2" else 4
    PLANES: tl.constexpr = 16 // BITS
    TILE: tl.constexpr = PLANES * PLANE
    # Fields that stand above each other in a mantissa; further ones are shifted down first.
    RUN: tl.constexpr = 3 if BITS == 2 else (1 if tl.bfloat16 == HALF else 2)
    EVEN: tl.constexpr = GROUP == 0 or GROUP % TILE == 0 or TILE % GROUP == 0
    if not EVEN:
        PER: tl.constexpr = 1
    else:
        PER: tl.constexpr = PLANES if GROUP == 0 or GROUP > TILE else GROUP // PLANE
    SPANS: tl.constexpr = PLANES // PER  # parts of the tile with a scale each
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
        group = (t * TILE + j * (PER * PLANE)) // GROUP if GROUP > 0 else 0
        if GROUP > 0:
            s = as_scales(tl.load(scale + group * NP + rows), SCALE)
            acc += part * s[:, None]
        else:
            s = tl.full(rows.shape, 1.0, tl.float32)
            acc = part
        if KIND != "codebook":
            whole, shifted = sums_over(
                sums, s_rows, sums_stride, there, t * PLANES + j * PER, PER, BITS, j * PER, RUN, ONE
            )
            if ZERO:
                z = tl.load(zero + group * NP + rows).to(tl.float32)
            else:
                z = tl.full(rows.shape, 1 << (BITS - 1), tl.float32)
            off += corrected(s, z, whole, shifted * BASE, ONE)
    return acc, off


@triton.jit
def corrected(s, z, whole, shifted, ONE: tl.constexpr):
    """s · (shifted + z · whole): [ROWS] for one token, else [ROWS, COLS]."""
    if ONE:
        extra = s * (shifted + z * whole)
    else:
        extra = s[:, None] * (shifted[None, :] + z[:, None] * whole[None, :])
    return extra


@triton.jit
def lowered(x, BY: tl.constexpr):
    """x / 2^BY."""
    if BY > 0:
        x = (x.to(tl.float32) * (1.0 / (1 << BY))).to(x.dtype)
    return x


@triton.jit
def bytes_times(acc, off, t, codes, x, x_rows, x_stride, sums, s_rows, sums_stride, there, scale, zero, rows, NP,
                GROUPS,
                KIND: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr,
                TILE: tl.constexpr, PTX: tl.constexpr, ONE: tl.constexpr):  # fmt: skip
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
        s = as_scales(tl.load(scale + at), SCALE)
        acc += tl.dot(a, xp) * s[:, None]
        if ZERO:
            whole, _ = sums_over(sums, s_rows, sums_stride, there, t * (TILE // 32), TILE // 32, 0, 0, 1, ONE)
            off += corrected(s, tl.load(zero + at).to(tl.float32) - 128.0, whole, 0.0 * whole, ONE)
    return acc, off


@triton.jit
def finish(acc, block, rows, x_rows, used, y_rows, there, bias, ssq, parts, eps, residual, out, out_stride, norm, emit,
           emit_stride, emit_sums, emit_sums_stride, emit_ssq, M, N, WIDTH, HALF: tl.constexpr, EPILOGUE: tl.constexpr,
           NORMED: tl.constexpr, BIASED: tl.constexpr, EMIT: tl.constexpr, PARTS: tl.constexpr,
           CHUNK: tl.constexpr):  # fmt: skip
    """What becomes of the finished products acc [ROWS, COLS]."""
    ROWS: tl.constexpr = acc.shape[0]
    COLS: tl.constexpr = acc.shape[1]
    if NORMED:
        p = tl.arange(0, PARTS)
        square = tl.load(ssq + p[:, None] * M + x_rows[None, :], mask=(p[:, None] < parts) & used[None, :], other=0.0)
        acc *= tl.rsqrt(tl.sum(square, 0) / WIDTH + eps)[None, :]
    if BIASED:
        acc += tl.load(bias + rows)[:, None]
    if EPILOGUE == "silu":
        both = acc.reshape(ROWS // (2 * CHUNK), 2, CHUNK, COLS)
        gate, up = tl.split(tl.permute(both, (0, 2, 3, 1)))
        small = tl.exp(-tl.abs(gate))  # so that nothing overflows
        y = (gate * tl.where(gate > 0, 1.0, small) / (1.0 + small) * up).to(HALF).reshape(ROWS // 2, COLS)
        rows = block * (ROWS // 2) + tl.arange(0, ROWS // 2)
        inside = (rows < N // 2)[:, None] & there[None, :]
        tl.store(out + y_rows[None, :] * out_stride + rows[:, None], y, mask=inside)
        put_sums(y, inside, block, y_rows, there, emit_sums, emit_sums_stride, N // 2)
    else:
        inside = (rows < N)[:, None] & there[None, :]
        if EPILOGUE == "residual":
            acc += tl.load(residual + y_rows[None, :] * out_stride + rows[:, None], mask=inside, other=0.0)
        tl.store(out + y_rows[None, :] * out_stride + rows[:, None], acc, mask=inside)
        if EMIT:
            acc = tl.where(inside, acc, 0.0)
            tl.store(emit_ssq + block * M + y_rows, tl.sum(acc * acc, 0), mask=there)
            y = (acc * tl.load(norm + rows, mask=rows < N, other=0.0)[:, None]).to(HALF)
            tl.store(emit + y_rows[None, :] * emit_stride + rows[:, None], y, mask=inside)
            put_sums(y, inside, block, y_rows, there, emit_sums, emit_sums_stride, N)


@triton.jit
def put_sums(y, inside, block, y_rows, there, sums, sums_stride, N):
    """Store the sums of y [R, COLS] over each 32 rows, as the next product wants them."""
    GROUPS: tl.constexpr = y.shape[0] // 32
    wide = tl.where(inside, y.to(tl.float32), 0.0)
    g = block * GROUPS + tl.arange(0, GROUPS)
    tl.store(
        sums + y_rows[None, :] * sums_stride + g[:, None],
        tl.sum(wide.reshape(GROUPS, 32, y.shape[1]), 1),
        mask=(g * 32 < N)[:, None] & there[None, :],
    )


@triton.jit
def gemv_kernel(
    x, x_stride, sums, sums_stride, w, scale, zero, table, scale2, bias, ssq, parts, eps, residual,
    out, out_stride, norm, emit, emit_stride, emit_sums, emit_sums_stride, emit_ssq, partial, counter,
    chosen, gates, order, M, N, NP, TILES, GROUPS, WIDTH, SPLIT,
    KIND: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr, PLANE: tl.constexpr,
    TILE: tl.constexpr, EPILOGUE: tl.constexpr, NORMED: tl.constexpr, SLOTS: tl.constexpr, SHARE: tl.constexpr,
    COMBINE: tl.constexpr, GROUPED: tl.constexpr, ONE: tl.constexpr, BIASED: tl.constexpr, SCALED2: tl.constexpr,
    EMIT: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr,
    STAGES: tl.constexpr, CHUNK: tl.constexpr, PTX: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K] Wᵀ, a program for ROWS rows of W, COLS of the tokens and one of the pieces of K.

    EPILOGUE: store y; silu: of each CHUNK rows and the next, silu(y) * y' in the type of x, with its sums; residual:
    residual + y, and with EMIT that times ``norm`` in the type of x, with its sums and its squares' sums, for the next
    product.
    NORMED: x was not yet divided by its root mean square; Σx² comes in ``parts`` pieces.
    SLOTS > 0: column b is slot b % SLOTS of token b // SLOTS, whose expert is chosen[b]; x has a row per token
    (SHARE) or per slot. COMBINE: a token's slots are the pieces, each weighted by its gate. GROUPED: the columns of
    block b are the slots order[b·COLS …] (below 0: none), all of the expert chosen[b].
    """
    HALF: tl.constexpr = x.dtype.element_ty
    block = tl.program_id(0) // SPLIT
    piece = tl.program_id(0) % SPLIT
    pieces = SPLIT
    column = tl.program_id(1)
    rows = block * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, COLS)
    expert = tl.zeros((), tl.int64)
    if SLOTS > 0:
        expert = tl.load(chosen + column).to(tl.int64)
        if GROUPED:
            y_rows = tl.load(order + column * COLS + c)
            there = y_rows >= 0
            x_rows = y_rows // SLOTS if SHARE else y_rows
        else:
            there = c < 1
            y_rows = c + column
            x_rows = c + (column // SLOTS if SHARE else column)
    else:
        y_rows = column * COLS + c
        x_rows = y_rows
        there = y_rows < M
    if COMBINE:
        piece = column % SLOTS
        pieces = SLOTS
        gate = tl.load(gates + column)
        column = column // SLOTS
        y_rows = c + column
    if KIND == "fp8":
        scale += expert * (NP // 128) * GROUPS
    elif KIND != "plain":
        scale += expert * NP * GROUPS
    if ZERO:
        zero += expert * NP * GROUPS
    first = 0
    last = TILES
    if not COMBINE:
        each = tl.cdiv(TILES, SPLIT)
        first = piece * each
        last = tl.minimum(first + each, TILES)
    # A single token is multiplied in every column, and what comes off is the same in all of them.
    if ONE:
        s_rows = tl.program_id(1) // SLOTS if SLOTS > 0 and SHARE else tl.program_id(1)
        x_rows = tl.zeros((COLS,), tl.int32) + s_rows
        used = c >= 0
        off = tl.zeros((ROWS,), tl.float32)
    else:
        s_rows = x_rows
        used = there
        off = tl.zeros((ROWS, COLS), tl.float32)
    if GROUPED:
        last = tl.where(tl.load(order + column * COLS) < 0, first, last)  # a block without columns has nothing to do
    acc = tl.zeros((ROWS, COLS), tl.float32)
    if KIND == "int2" or KIND == "int4" or KIND == "codebook":
        STEP: tl.constexpr = PLANE // 2
        codes = w + expert * NP * (TILES * STEP) + rows[:, None] * (TILES * STEP) + tl.arange(0, STEP)[None, :]
        for t in tl.range(first, last, num_stages=STAGES):
            held = tl.load(codes + t * STEP, eviction_policy="evict_first")
            acc, off = planes_times(
                acc, off, t, held, x, x_rows, x_stride, sums, s_rows, sums_stride, there, scale, zero, table, rows, NP,
                KIND, GROUP, SCALE, ZERO, PLANE, PTX, ASM, ONE,
            )  # fmt: skip
    else:
        WIDE: tl.constexpr = TILE // 4 if PTX != "" else TILE
        codes = w + expert * NP * (TILES * WIDE) + rows[:, None] * (TILES * WIDE) + tl.arange(0, WIDE)[None, :]
        for t in tl.range(first, last, num_stages=STAGES):
            held = tl.load(codes + t * WIDE, eviction_policy="evict_first")
            acc, off = bytes_times(
                acc, off, t, held, x, x_rows, x_stride, sums, s_rows, sums_stride, there, scale, zero, rows, NP,
                GROUPS, KIND, GROUP, SCALE, ZERO, TILE, PTX, ONE,
            )  # fmt: skip
    if ONE:
        acc -= off[:, None]
    else:
        acc -= off
    if GROUP == 0 and KIND != "fp8" and KIND != "plain":
        acc *= tl.load(scale + rows)[:, None]
    if SCALED2:
        acc *= tl.load(scale2 + expert)
    if COMBINE:
        acc *= gate
    mine = True
    if PIECES:
        # The last of the pieces to arrive adds them all, in their order, so the sum is the same every time.
        lane = counter + column * tl.cdiv(NP, ROWS) + block
        place = partial + (column * pieces * NP + rows[:, None]) * COLS + c[None, :]
        tl.store(place + piece * NP * COLS, acc)
        tl.debug_barrier()
        mine = tl.atomic_add(lane, 1, sem="acq_rel") == pieces - 1
        if mine:
            acc = tl.zeros((ROWS, COLS), tl.float32)
            for s in range(pieces):
                acc += tl.load(place + s * NP * COLS, cache_modifier=".cg")
            tl.store(lane, 0)
    if mine:
        if BIASED:
            bias += expert * NP
        finish(
            acc, block, rows, x_rows, used, y_rows, there, bias, ssq, parts, eps, residual, out, out_stride, norm, emit,
            emit_stride, emit_sums, emit_sums_stride, emit_ssq, M, N, WIDTH, HALF, EPILOGUE, NORMED, BIASED, EMIT,
            PARTS, CHUNK,
        )  # fmt: skip
