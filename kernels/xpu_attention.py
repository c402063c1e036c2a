"""Attention of one token over a quantized cache where it lies, on an Intel GPU: its length split over programs, whose
results a second kernel merges.

Neither matrix engines, assembly nor barriers: a program is one subgroup. The grid is fixed and the length lies in
device memory, so that a recorded step serves every length up to what the grid was chosen for. It knows neither what
wrote the cache nor who chose its formats.
"""
# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl
from torch import Tensor

from qrun.kernels.gpu_aot import Variant
from qrun.kernels.gpu_append import hadamard32
from qrun.kernels.gpu_bits import narrow
from qrun.kernels.gpu_kv import Side, load_tile, packed, padded, power_of_two, read, side_types

TILE = 1024
"""Numbers of K or V that a program has at once: 32 a lane."""
MOST_SPLITS = 64


@triton.jit(do_not_specialize=["capacity", "splits"])
def decode_kernel(
    q,
    length,
    k_codes,
    k_scale,
    v_codes,
    v_scale,
    partial,
    capacity,
    splits,
    K_ROW: tl.constexpr,
    K_SCALES: tl.constexpr,
    V_ROW: tl.constexpr,
    V_SCALES: tl.constexpr,
    K_KIND: tl.constexpr,
    V_KIND: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DB: tl.constexpr,
    BN: tl.constexpr,
):
    """Program (split, kv head): its positions for the GROUP heads of q that share the kv head, by an online softmax.

    partial [heads, splits, DB + 2] gets the sum weighted by the softmax, its maximum to base 2, and its weight.
    """
    DP: tl.constexpr = (DIM + 31) // 32 * 32
    GP: tl.constexpr = triton.next_power_of_2(GROUP)
    split = tl.program_id(0)
    kv_head = tl.program_id(1)
    d = tl.arange(0, DB)
    n = tl.arange(0, BN)
    head = tl.arange(0, GP)
    stop = tl.load(length).to(tl.int32)
    start = tl.maximum(stop - WINDOW, 0) if WINDOW > 0 else 0
    each = tl.cdiv(tl.cdiv(stop - start, BN), splits) * BN
    begin = start + split * each
    end = tl.minimum(begin + each, stop)
    before = kv_head.to(tl.int64) * capacity
    k_codes += before * K_ROW
    k_scale += before * K_SCALES
    v_codes += before * V_ROW
    v_scale += before * V_SCALES
    top = tl.full((GP,), float("-inf"), tl.float32)
    weight = tl.zeros((GP,), tl.float32)
    acc = tl.zeros((GP, DB), tl.float32)
    for base in range(begin, end, BN):
        rows = base + n
        k = read(k_codes, k_scale, rows, end, K_KIND, DIM, DB, tl.float32, True, False, False)
        v = read(v_codes, v_scale, rows, end, V_KIND, DIM, DB, tl.float32, True, False, False)
        if K_KIND == "fp8":
            k *= load_tile(k_scale, rows, end, 1, 1, True, False)
        if V_KIND == "fp8":
            v *= load_tile(v_scale, rows, end, 1, 1, True, False)
        for g in range(GROUP):  # not unrolled: a tenth of the code, and of the time to compile it
            mine = tl.load(q + (kv_head * GROUP + g) * DP + d, mask=d < DP, other=0.0).to(tl.float32)
            scores = tl.sum(k * mine[None, :], 1) * 1.4426950408889634  # to base 2
            scores = tl.where(rows < end, scores, float("-inf"))
            old = tl.max(tl.where(head == g, top, float("-inf")), 0)
            peak = tl.maximum(old, tl.max(scores, 0))
            shrink = tl.exp2(old - peak)
            p = tl.exp2(scores - peak)
            top = tl.where(head == g, peak, top)
            weight = tl.where(head == g, weight * shrink + tl.sum(p, 0), weight)
            acc = tl.where((head == g)[:, None], acc * shrink + tl.sum(p[:, None] * v, 0)[None, :], acc)
    to = partial + ((kv_head * GROUP + head) * splits + split).to(tl.int64) * (DB + 2)
    real = head < GROUP
    tl.store(to[:, None] + d[None, :], acc, mask=real[:, None])
    tl.store(to + DB, top, mask=real)
    tl.store(to + DB + 1, weight, mask=real)


@triton.jit
def merge_kernel(
    partial,
    out,
    DIM: tl.constexpr,
    DB: tl.constexpr,
    SPLITS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    ROTATED: tl.constexpr,
):
    """Program (head,): its splits' results into out [heads, DIM], turned back where V was rotated."""
    WIDE: tl.constexpr = triton.next_power_of_2(SPLITS)
    head = tl.program_id(0)
    partial += head.to(tl.int64) * SPLITS * (DB + 2)
    split = tl.arange(0, WIDE)
    top = tl.max(tl.load(partial + split * (DB + 2) + DB, mask=split < SPLITS, other=float("-inf")), 0)
    i = tl.arange(0, DB // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    acc = tl.zeros((DB // 32, 32), tl.float32)
    weight = 0.0
    for first in range(0, SPLITS, AT_ONCE):
        for j in tl.static_range(AT_ONCE):
            # A split that saw nothing has no weight; one that is not there is the last again, with none.
            at = partial + tl.minimum(first + j, SPLITS - 1) * (DB + 2)
            factor = tl.exp2(tl.load(at + DB) - top)
            factor = tl.where(first + j < SPLITS, factor, 0.0)
            weight += tl.load(at + DB + 1) * factor
            acc += tl.load(at + i) * factor
    y = acc / weight
    if ROTATED:
        y = hadamard32(y)
    tl.store(out + head * DIM + i, narrow(y, out.dtype.element_ty), mask=i < DIM)


def split_count(processors: int, kv_heads: int, longest: int) -> int:
    """Splits for caches of at most ``longest`` positions: sixteen programs a core, hardly any with less than 64.

    Every number is a merge to compile, so those that lengths ask for are powers of two.
    """
    return max(1, min(-(-16 * processors // kv_heads), 1 << (-(-longest // 64) - 1).bit_length(), MOST_SPLITS))


def partial_shape(heads: int, dim: int, splits: int) -> tuple[int, int, int]:
    """The float32 scratch of :func:`decode_attention`."""
    return heads, splits, power_of_two(padded(dim)) + 2


def widths(kind: str, dim: int) -> tuple[int, int]:
    """Elements of one position's codes and scales as `gpu_kv.packed` gives them."""
    groups = padded(dim) // 32
    codes = {"int8": groups * 8, "int4": groups * 4, "fp8": dim if dim % 4 else dim // 4}
    scales = {"int8": groups, "int4": groups, "fp8": 1}
    return codes.get(kind, dim), scales.get(kind, 0)


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
    out: Tensor,
) -> None:
    """One token's q [heads, DP], as ``append`` leaves it, over ``length`` positions into out [1, heads·dim].

    ``length`` is an integer tensor [1] on the device, at least 1; a query sees the last ``window`` positions, or all
    if 0. ``partial`` is of :func:`partial_shape`.
    """
    kv_heads, capacity = k.codes.shape[:2]
    heads = q.shape[0]
    assert q.is_contiguous() and out.is_contiguous() and out.numel() == heads * dim, (q.shape, out.shape, dim)
    assert partial.is_contiguous() and partial.shape == partial_shape(heads, dim, splits), (partial.shape, splits)
    k_codes, k_scale = packed(k)
    v_codes, v_scale = packed(v)
    decode_kernel[(splits, kv_heads)](
        q,
        length,
        k_codes,
        k_scale,
        v_codes,
        v_scale,
        partial,
        capacity,
        splits,
        **constants(k.kind, v.kind, dim, heads // kv_heads, window),
        num_warps=1,
        num_stages=1,
    )
    merge_kernel[(heads,)](partial, out, **merging(v.kind, dim, splits), num_warps=1, num_stages=1)


def constants(k: str, v: str, dim: int, group: int, window: int) -> dict[str, int | str]:
    """Those of the first kernel."""
    wide = power_of_two(padded(dim))
    (k_row, k_scales), (v_row, v_scales) = widths(k, dim), widths(v, dim)
    return {
        "K_ROW": k_row,
        "K_SCALES": k_scales,
        "V_ROW": v_row,
        "V_SCALES": v_scales,
        "K_KIND": k,
        "V_KIND": v,
        "WINDOW": window,
        "GROUP": group,
        "DIM": dim,
        "DB": wide,
        "BN": TILE // wide,
    }


def merging(v: str, dim: int, splits: int) -> dict[str, int | bool]:
    """Those of the second."""
    wide = power_of_two(padded(dim))
    return {"DIM": dim, "DB": wide, "SPLITS": splits, "AT_ONCE": min(4, splits), "ROTATED": v == "int4"}


def variants() -> list[Variant]:
    """Pairs of cache formats, for 4 heads of 128 a kv head, for 8 of 64, and for one of 256; and the merge."""
    made: list[Variant] = []
    for k, v in (("bf16", "bf16"), ("int8", "int8"), ("int4", "int4"), ("fp8", "fp8"), ("int8", "int4")):
        for dim, group in ((128, 4), (64, 8), (256, 1)):
            types = {"q": "*fp16", "length": "*i64", "partial": "*fp32", "capacity": "i32", "splits": "i32"}
            types |= side_types(k, v)
            made.append(
                Variant(
                    name=f"xpu decode attention {k} {v} {dim}",
                    kernel=decode_kernel,
                    types=types,
                    constants=constants(k, v, dim, group, 0),
                    warps=1,
                    weights=2 * TILE,
                )
            )
    made += [
        Variant(
            name=f"xpu merge {kind} 128",
            kernel=merge_kernel,
            types={"partial": "*fp32", "out": out},
            constants=merging(kind, 128, 32),
            warps=1,
        )
        for kind, out in (("int8", "*fp16"), ("int4", "*bf16"))
    ]
    return made
