"""A few tokens through a quantized weight: y = W x, the codes read once and multiplied as they arrive.

W is the dot's left operand, so that one token costs eight columns and not sixteen rows of padding; zero points and the
offsets of the decoded codes come off after each dot by Σx. Pieces of K, or a token's experts, are programs of their
own, and the last to finish adds them up, in order. How x was made and what y means is the caller's affair.
"""
# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false

import triton
import triton.language as tl

from qrun.kernels.gpu_norm import swiglu
from qrun.kernels.gpu_tile import bytes_times, planes_times, spans, spans_at


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
        y = swiglu(gate, up).to(HALF).reshape(ROWS // 2, COLS)
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


@triton.jit(do_not_specialize=["M"])
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
    else:
        s_rows = x_rows
        used = there
    if GROUPED:
        last = tl.where(tl.load(order + column * COLS) < 0, first, last)  # a block without columns has nothing to do
    acc = tl.zeros((ROWS, COLS), tl.float32)
    off = tl.zeros((ROWS,), tl.float32)
    # Scales are too narrow for the compiler's pipeline: loaded where they are used, each would be waited for. With many
    # columns there are no registers for them, and a tile takes longer than the wait.
    AHEAD: tl.constexpr = COLS == 8 and GROUP > 0 and KIND != "fp8"
    SPANS: tl.constexpr = spans(KIND, GROUP, PLANE, TILE)
    next_scales = (0,)
    next_zeros = (0,)
    if AHEAD:
        next_scales, next_zeros = spans_at(
            scale, zero, tl.minimum(first, TILES - 1), rows, NP, GROUP, ZERO, TILE, SPANS
        )
    PLANES: tl.constexpr = KIND == "int2" or KIND == "int4" or KIND == "codebook"
    STEP: tl.constexpr = PLANE // 2 if PLANES else (TILE // 4 if PTX != "" else TILE)  # elements of a row's tile
    codes = w + expert * NP * (TILES * STEP) + rows[:, None] * (TILES * STEP) + tl.arange(0, STEP)[None, :]
    for t in tl.range(first, last, num_stages=STAGES):
        scales, zeros = next_scales, next_zeros
        if AHEAD:
            next_scales, next_zeros = spans_at(
                scale, zero, tl.minimum(t + 1, last - 1), rows, NP, GROUP, ZERO, TILE, SPANS
            )
        held = tl.load(codes + t * STEP, eviction_policy="evict_first")
        if PLANES:
            acc, off = planes_times(
                acc, off, t, held, x, x_rows, x_stride, sums, s_rows, sums_stride, there, scales, zeros, scale, zero,
                rows, NP, table, KIND, GROUP, SCALE, ZERO, PLANE, PTX, ASM, ONE, AHEAD,
            )  # fmt: skip
        else:
            acc, off = bytes_times(
                acc, off, t, held, x, x_rows, x_stride, sums, s_rows, sums_stride, there, scales, zeros, scale, zero,
                rows, NP, GROUPS, KIND, GROUP, SCALE, ZERO, TILE, PTX, ONE, AHEAD,
            )  # fmt: skip
    if ONE:
        acc -= off[:, None]
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
        if ONE:  # whose columns are all the same
            place = partial + column * pieces * NP + rows
            tl.store(place + piece * NP, tl.sum(tl.where(c[None, :] == 0, acc, 0.0), 1))
        else:
            place = partial + (column * pieces * NP + rows[:, None]) * COLS + c[None, :]
            tl.store(place + piece * NP * COLS, acc)
        tl.debug_barrier()
        mine = tl.atomic_add(lane, 1, sem="acq_rel") == pieces - 1
        if mine:
            if ONE:
                total = tl.zeros((ROWS,), tl.float32)
                for s in range(pieces):
                    total += tl.load(place + s * NP, cache_modifier=".cg")
                acc = tl.broadcast_to(total[:, None], (ROWS, COLS))
            else:
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
