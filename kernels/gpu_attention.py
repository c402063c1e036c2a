"""Attention of one token over the cache as it is stored, its length split over programs; the last to finish combines.

The grid is fixed and the length lies in device memory, so a graph of it serves every length up to what the grid was
chosen for. It knows neither what wrote the cache nor who chose the formats.
"""
# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl
from torch import Tensor

from qrun.kernels.gpu_aot import Variant
from qrun.kernels.gpu_append import hadamard32
from qrun.kernels.gpu_bits import round_bf16
from qrun.kernels.gpu_kv import (
    Side,
    codes_width,
    load_tile,
    packed,
    padded,
    power_of_two,
    read,
    scale_width,
    side_types,
)


@triton.jit
def attend(
    qt,
    top,
    weight,
    acc,
    rows,
    stop,
    cache,
    K_KIND: tl.constexpr,
    V_KIND: tl.constexpr,
    DIM: tl.constexpr,
    MASKED: tl.constexpr,
    ASM: tl.constexpr,
):
    """One block of positions into the running maximum [COLS], weight [COLS] and sum [DB, COLS] (online softmax)."""
    DB: tl.constexpr = qt.shape[0]
    OP: tl.constexpr = qt.dtype
    k_codes, k_scale, v_codes, v_scale = cache
    k = read(k_codes, k_scale, rows, stop, K_KIND, DIM, DB, OP, MASKED, False, ASM)
    scores = tl.dot(k, qt) * 1.4426950408889634  # [BN, COLS], to base 2
    if K_KIND == "fp8":
        scores *= load_tile(k_scale, rows, stop, 1, 1, MASKED, False)
    if MASKED:
        scores = tl.where(rows[:, None] < stop, scores, float("-inf"))
    peak = tl.maximum(top, tl.max(scores, 0))
    shrink = tl.exp2(top - peak)
    p = tl.exp2(scores - peak[None, :])
    weight = weight * shrink + tl.sum(p, 0)
    if V_KIND == "fp8":
        p *= load_tile(v_scale, rows, stop, 1, 1, MASKED, False)
    v = read(v_codes, v_scale, rows, stop, V_KIND, DIM, DB, OP, MASKED, True, ASM)
    acc = tl.dot(v, p.to(OP), acc * shrink[None, :])
    return peak, weight, acc


@triton.jit
def combine(
    partial,
    out,
    sums,
    head,
    used,
    SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    COLS: tl.constexpr,
    DIM: tl.constexpr,
    DB: tl.constexpr,
    ROTATED: tl.constexpr,
    SUMS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """The first ``used`` of the splits' results [SPLITS, DB + 2, COLS], to GROUP heads of out from ``head`` on.

    AHEAD results are loaded at once.
    """
    c = tl.arange(0, COLS)
    d = tl.arange(0, DB)
    # Columns from GROUP on hold q's padding: finite, and not stored.
    place = tl.arange(0, triton.next_power_of_2(SPLITS))[:, None] * ((DB + 2) * COLS) + c[None, :]
    there = tl.arange(0, triton.next_power_of_2(SPLITS))[:, None] < used
    tops = tl.load(partial + DB * COLS + place, mask=there, other=float("-inf"), cache_modifier=".cg")
    top = tl.max(tops, 0)
    weights = tl.load(partial + (DB + 1) * COLS + place, mask=there, other=0.0, cache_modifier=".cg")
    weight = tl.sum(weights * tl.exp2(tops - top[None, :]), 0)
    acc = tl.zeros((DB, COLS), tl.float32)
    for base in range(0, used, AHEAD):
        for j in tl.static_range(AHEAD):
            at = partial + (base + j) * ((DB + 2) * COLS)
            good = base + j < used
            # Every row loads the maxima, so that they lie as the tile does.
            peak = tl.load(
                at + (DB * COLS + c[None, :] + 0 * d[:, None]), mask=good, other=float("-inf"), cache_modifier=".cg"
            )
            tile = tl.load(at + (d[:, None] * COLS + c[None, :]), mask=good, other=0.0, cache_modifier=".cg")
            acc += tile * tl.exp2(peak - top[None, :])
    GB: tl.constexpr = DB // 32
    y = tl.reshape(tl.trans(acc / weight[None, :]), (COLS * GB, 32))
    if ROTATED:
        y = hadamard32(y)
    if out.dtype.element_ty == tl.bfloat16:
        y = round_bf16(y)
    else:
        y = y.to(out.dtype.element_ty).to(tl.float32)
    row = tl.arange(0, COLS * GB)  # one group of 32 of one head
    i = (row % GB)[:, None] * 32 + tl.arange(0, 32)[None, :]
    to = out + (head + row // GB)[:, None] * DIM + i
    tl.store(to, y.to(out.dtype.element_ty), mask=(row < GROUP * GB)[:, None] & (i < DIM))
    if SUMS:
        tl.static_assert(DIM % 32 == 0)
        good = (row < GROUP * GB) & (row % GB < DIM // 32)
        tl.store(sums + (head + row // GB) * (DIM // 32) + row % GB, tl.sum(y, 1), mask=good)


@triton.jit(do_not_specialize=["capacity"])
def decode_kernel(
    q,
    length,
    k_codes,
    k_scale,
    v_codes,
    v_scale,
    partial,
    counter,
    out,
    sums,
    capacity,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    COLS: tl.constexpr,
    DIM: tl.constexpr,
    DB: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
    SUMS: tl.constexpr,
    STAGES: tl.constexpr,
    K_KIND: tl.constexpr,
    V_KIND: tl.constexpr,
    ASM: tl.constexpr,
):
    """Program (h, s): split s of kv head h, for its GROUP heads of q [heads, DP] at once."""
    DP: tl.constexpr = (DIM + 31) // 32 * 32
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    stop = tl.load(length).to(tl.int32)
    start = 0
    if WINDOW > 0:
        start = tl.maximum(stop - WINDOW, 0)
    blocks = tl.cdiv(stop - start, BN)
    each = tl.cdiv(blocks, SPLITS)
    used = tl.cdiv(blocks, each)  # splits that have anything to do
    own = partial + kv_head * (SPLITS * (DB + 2) * COLS)
    c = tl.arange(0, COLS)
    d = tl.arange(0, DB)
    if split < used:
        before = kv_head.to(tl.int64) * capacity
        cache = (
            k_codes + before * codes_width(K_KIND, DIM),
            k_scale + before * scale_width(K_KIND, DIM),
            v_codes + before * codes_width(V_KIND, DIM),
            v_scale + before * scale_width(V_KIND, DIM),
        )
        at = q + (kv_head * GROUP + c)[None, :] * DP + d[:, None]
        qt = tl.load(at, mask=(c < GROUP)[None, :] & (d < DP)[:, None], other=0.0)
        top = tl.full((COLS,), float("-inf"), tl.float32)
        weight = tl.zeros((COLS,), tl.float32)
        acc = tl.zeros((DB, COLS), tl.float32)
        n = tl.arange(0, BN)
        begin = start + split * each * BN
        end = tl.minimum(begin + each * BN, stop)
        whole = begin + (end - begin) // BN * BN
        for base in tl.range(begin, whole, BN, num_stages=STAGES):
            top, weight, acc = attend(qt, top, weight, acc, base + n, stop, cache, K_KIND, V_KIND, DIM, False, ASM)
        if whole < end:
            top, weight, acc = attend(qt, top, weight, acc, whole + n, stop, cache, K_KIND, V_KIND, DIM, True, ASM)
        to = own + split * ((DB + 2) * COLS)
        tl.store(to + d[:, None] * COLS + c[None, :], acc)
        tl.store(to + DB * COLS + c, top)
        tl.store(to + (DB + 1) * COLS + c, weight)
    tl.debug_barrier()
    if tl.atomic_add(counter + kv_head, 1, sem="acq_rel") == SPLITS - 1:
        tl.store(counter + kv_head, 0)
        combine(
            own,
            out,
            sums,
            kv_head * GROUP,
            used,
            SPLITS,
            GROUP,
            COLS,
            DIM,
            DB,
            V_KIND == "int4",
            SUMS,
            4 if DB * COLS < 1024 else 8192 // (DB * COLS),
        )


def columns(group: int) -> int:
    """Columns of the products for ``group`` query heads a kv head."""
    return max(8, power_of_two(group))


def split_count(processors: int, kv_heads: int, longest: int) -> int:
    """Splits for caches of at most ``longest`` positions: two programs a processor, hardly any with less than 128.

    The programs wait for memory and for each other's turns, so one would not keep a processor busy. Every number is a
    kernel to compile, so those that lengths ask for are powers of two.
    """
    return max(1, min(-(-2 * processors // kv_heads), 1 << (-(-longest // 128) - 1).bit_length(), 64))


def partial_shape(heads: int, kv_heads: int, dim: int, splits: int) -> tuple[int, int, int, int]:
    """The float32 scratch of :func:`decode_attention`; its counter is int32 [kv_heads], zero before the first call."""
    return kv_heads, splits, power_of_two(padded(dim)) + 2, columns(heads // kv_heads)


def decode_attention(
    q: Tensor,
    *,
    k: Side,
    v: Side,
    dim: int,
    length: Tensor,
    window: int,
    splits: int,
    partial: Tensor,
    counter: Tensor,
    out: Tensor,
    sums: Tensor | None,
) -> None:
    """One token's q [heads, DP], as ``append`` leaves it, over ``length`` positions into out [1, ≥ heads·dim].

    ``length`` is an integer tensor [1] on the device, at least 1; a query sees the last ``window`` positions, or all
    if 0. ``sums`` [1, ≥ heads·dim/32] gets the sums of the rounded out over each 32, where dim is a multiple of it.
    ``partial`` is of :func:`partial_shape`; ``counter`` is zero again afterwards.
    """
    kv_heads = k.codes.shape[0]
    group = q.shape[0] // kv_heads
    k_codes, k_scale = packed(k)
    v_codes, v_scale = packed(v)
    wide = power_of_two(padded(dim))
    assert q.is_contiguous() and partial.numel() >= kv_heads * splits * (wide + 2) * columns(group)
    decode_kernel[(kv_heads, splits)](
        q,
        length,
        k_codes,
        k_scale,
        v_codes,
        v_scale,
        partial,
        counter,
        out,
        out if sums is None else sums,
        k.codes.shape[1],
        WINDOW=window,
        GROUP=group,
        COLS=columns(group),
        DIM=dim,
        DB=wide,
        SPLITS=splits,
        SUMS=sums is not None,
        K_KIND=k.kind,
        V_KIND=v.kind,
        ASM=q.is_cuda,
        num_warps=4,
        **blocks(k.kind, v.kind, wide),
    )


def blocks(k: str, v: str, wide: int) -> dict[str, int]:
    """Positions in a block and stages for heads of ``wide``: what fits three times into 99 KiB and 128 registers."""
    size = {"fp32": 4, "bf16": 2}
    bytes_each = max(size.get(k, 1), size.get(v, 1))
    return {"BN": min(128, 8192 // wide, 16384 // (wide * bytes_each)), "STAGES": 3}


def variants() -> list[Variant]:
    """Pairs of cache formats, for 5 heads of 128 a kv head and for 8 of 64."""
    pairs = [
        ("bf16", "bf16", 2.5),
        ("int8", "int8", 6.5),
        ("int4", "int4", 6.0),
        ("fp8", "fp8", 7.2),
        ("int8", "int4", 6.2),
    ]
    made = []
    for k, v, limit in pairs:
        for dim, group in ((128, 5), (64, 8)):
            made.append(
                Variant(
                    name=f"decode attention {k} {v} {dim}",
                    kernel=decode_kernel,
                    types={"q": "*bf16", "length": "*i64", "out": "*bf16"}
                    | dict.fromkeys(("partial", "sums"), "*fp32")
                    | {"counter": "*i32"}
                    | {"capacity": "i32", **side_types(k, v)},
                    constants={
                        "WINDOW": 0,
                        "GROUP": group,
                        "COLS": columns(group),
                        "DIM": dim,
                        "DB": dim,
                        "SPLITS": 32,
                        "SUMS": True,
                        "K_KIND": k,
                        "V_KIND": v,
                        "ASM": True,
                        **blocks(k, v, dim),
                    },
                    weights=2 * dim * blocks(k, v, dim)["BN"],
                    limit=limit,
                )
            )
    return made
