"""Attention of many tokens: cached positions expanded once to scratch, then FlashAttention-2 over that (Dao 2023).

It does not know how many pieces a prompt comes in, nor what the cache's formats mean beyond decoding them.
"""
# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl
from torch import Tensor

from qrun.kernels.gpu_aot import Variant
from qrun.kernels.gpu_bits import narrow
from qrun.kernels.gpu_kv import POINTERS, Side, codes_width, load_tile, packed, padded, power_of_two, read, scale_width


@triton.jit
def hadamard_signs(OP: tl.constexpr):
    """[32, 32] in OP: -1 where i & j has an odd number of bits, else 1."""
    i = tl.arange(0, 32)
    odd = i[:, None] & i[None, :]
    odd ^= odd >> 4
    odd ^= odd >> 2
    odd ^= odd >> 1
    return (1 - 2 * (odd & 1)).to(tl.float32).to(OP)


@triton.jit(do_not_specialize=["capacity", "start", "count"])
def expand_kernel(
    codes,
    scale,
    out,
    capacity,
    start,
    count,
    KIND: tl.constexpr,
    ROTATE: tl.constexpr,
    DIM: tl.constexpr,
    DB: tl.constexpr,
    BN: tl.constexpr,
    ASM: tl.constexpr,
):
    """Program (b, h): block b of the positions from ``start`` on, of kv head h."""
    DP: tl.constexpr = (DIM + 31) // 32 * 32
    OP: tl.constexpr = out.dtype.element_ty
    head = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    d = tl.arange(0, DB)
    before = head * capacity + start
    codes += before * codes_width(KIND, DIM)
    scale += before * scale_width(KIND, DIM)
    if ROTATE:
        tl.static_assert(KIND == "int4")
        w = load_tile(codes, n, count, DP // 8, DB // 8, True, False)
        x = tl.reshape((w[:, :, None] >> (tl.arange(0, 8) * 4)[None, None, :]) & 15, (BN * DB // 32, 32))
        # Exact: codes are integers below 9, and 32 of them are summed.
        x = tl.dot((x - 8).to(tl.float32).to(OP), hadamard_signs(OP))
        s = load_tile(scale, n, count, DP // 32, DB // 32, True, False).to(tl.float32) * 0.17677669529663687
        x = tl.reshape(tl.reshape(x, (BN, DB // 32, 32)) * s[:, :, None], (BN, DB))
        x = narrow(x, OP)
    else:
        x = read(codes, scale, n, count, KIND, DIM, DB, OP, True, False, ASM)
        if KIND == "fp8":
            x = narrow(x.to(tl.float32) * load_tile(scale, n, count, 1, 1, True, False), OP)
    to = out + (head * count + n)[:, None] * DP + d[None, :]
    tl.store(to, x, mask=(n[:, None] < count) & (d[None, :] < DP))


@triton.jit
def sweep(
    q,
    top,
    weight,
    acc,
    keys,
    values,
    low,
    high,
    at,
    there,
    WINDOW: tl.constexpr,
    DP: tl.constexpr,
    BN: tl.constexpr,
    MASKED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Blocks of keys from ``low`` to ``high`` into the running maximum, weight [BM] and sum [BM, DB]; base 2.

    Queries stand ``at`` keys; keys end before ``there``.
    """
    DB: tl.constexpr = q.shape[1]
    for base in tl.range(low, high, BN, num_stages=STAGES):
        n = base + tl.arange(0, BN)
        k = load_tile(keys, n, there, DP, DB, MASKED, False)
        scores = tl.dot(q, tl.trans(k)) * 1.4426950408889634
        if MASKED:
            seen = n[None, :] <= at[:, None]
            if WINDOW > 0:
                seen &= n[None, :] > at[:, None] - WINDOW
            scores = tl.where(seen, scores, float("-inf"))
        peak = tl.maximum(top, tl.max(scores, 1))
        if MASKED:
            safe = tl.where(peak == float("-inf"), 0.0, peak)  # a query that sees nothing yet
        else:
            safe = peak
        shrink = tl.exp2(top - safe)
        p = tl.exp2(scores - safe[:, None])
        weight = weight * shrink + tl.sum(p, 1)
        v = load_tile(values, n, there, DP, DB, MASKED, False)
        acc = tl.dot(p.to(q.dtype), v, acc * shrink[:, None])
        top = peak
    return top, weight, acc


@triton.jit(do_not_specialize=["tokens", "positions", "offset"])
def flash_kernel(
    q,
    keys,
    values,
    out,
    tokens,
    positions,
    offset,
    out_row,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DB: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program (h, b): a block of queries of head h, the last block first as it has most to do.

    Query i stands at key i + ``offset`` of keys [kv_heads, ``positions``, DP].
    """
    DP: tl.constexpr = (DIM + 31) // 32 * 32
    head = tl.program_id(0)
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    m = block * BM + tl.arange(0, BM)
    d = tl.arange(0, DB)
    q_at = q + (m.to(tl.int64)[:, None] * HEADS + head) * DP + d[None, :]
    tile = tl.load(q_at, mask=(m[:, None] < tokens) & (d[None, :] < DP), other=0.0)
    before = (head // GROUP).to(tl.int64) * positions * DP
    keys += before
    values += before
    at = m + offset
    first = block * BM + offset  # the key that the first query stands at
    end = tl.minimum(positions, first + BM)
    low = 0
    left = 0  # from here on every query of the block sees every key, up to right
    if WINDOW > 0:
        low = tl.maximum(first - WINDOW + 1, 0) // BN * BN
        left = tl.minimum(tl.cdiv(tl.maximum(first + BM - WINDOW, 0), BN) * BN, end)
    right = tl.maximum((first + 1) // BN * BN, left)
    top = tl.full((BM,), float("-inf"), tl.float32)
    weight = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, DB), tl.float32)
    if WINDOW > 0:
        top, weight, acc = sweep(
            tile, top, weight, acc, keys, values, low, left, at, positions, WINDOW, DP, BN, True, 1
        )
    top, weight, acc = sweep(
        tile, top, weight, acc, keys, values, left, right, at, positions, WINDOW, DP, BN, False, STAGES
    )
    top, weight, acc = sweep(tile, top, weight, acc, keys, values, right, end, at, positions, WINDOW, DP, BN, True, 1)
    to = out + m.to(tl.int64)[:, None] * out_row + head * DIM + d[None, :]
    weight = tl.where(m < tokens, weight, 1.0)  # a row of padding may have seen nothing
    y = narrow(acc / weight[:, None], out.dtype.element_ty)
    tl.store(to, y, mask=(m[:, None] < tokens) & (d[None, :] < DIM))


def expand_kv(side: Side, *, dim: int, start: int, stop: int, rotate: bool, out: Tensor) -> None:
    """Positions start … stop-1 into out [kv_heads, stop-start, DP]; int4 is rotated back if ``rotate``."""
    codes, scale = packed(side)
    wide = power_of_two(padded(dim))
    block = max(16, 4096 // wide)
    assert out.is_contiguous() and out.shape[1] == stop - start
    expand_kernel[(triton.cdiv(stop - start, block), codes.shape[0])](
        codes,
        scale,
        out,
        codes.shape[1],
        start,
        stop - start,
        KIND=side.kind,
        ROTATE=rotate and side.kind == "int4",
        DIM=dim,
        DB=wide,
        BN=block,
        ASM=codes.is_cuda,
        num_warps=4,
    )


def flash(
    q: Tensor, keys: Tensor, values: Tensor, *, dim: int, start: int, first: int, window: int, out: Tensor
) -> None:
    """Causal attention of q [M, heads, DP] at positions start … over keys and values [kv_heads, T, DP].

    ``first`` is the position of keys[:, 0]; a query sees the last ``window`` positions, itself included, or all if 0.
    q is as ``append`` leaves it; out [M, ≥ heads·dim].
    """
    tokens, heads, _ = q.shape
    assert q.is_contiguous() and keys.is_contiguous() and values.is_contiguous() and out.stride(1) == 1
    wide = power_of_two(padded(dim))
    blocks = _blocks(wide)
    flash_kernel[(heads, triton.cdiv(tokens, blocks["BM"]))](
        q,
        keys,
        values,
        out,
        tokens,
        keys.shape[1],
        start - first,
        out.stride(0),
        WINDOW=window,
        HEADS=heads,
        GROUP=heads // keys.shape[0],
        DIM=dim,
        DB=wide,
        **blocks,
        num_warps=8,
    )


def _blocks(wide: int) -> dict[str, int]:
    """Block sizes for heads of ``wide`` and eight warps, within 99 KiB of shared memory, or what sm_90 has."""
    if wide > 128:
        return {"BM": 64, "BN": 32, "STAGES": 2}
    return {"BM": 128, "BN": 64, "STAGES": 3}


def variants() -> list[Variant]:
    """Expanding each cache format, V of int4 rotated back too; prefill for heads of 64 and 128."""
    made = []
    for kind, rotate in (("bf16", False), ("int8", False), ("int4", False), ("int4", True), ("fp8", False)):
        codes, scale = POINTERS[kind]
        made.append(
            Variant(
                name=f"expand {kind}{' rotated' if rotate else ''}",
                kernel=expand_kernel,
                types={"codes": codes, "scale": scale, "out": "*bf16"}
                | dict.fromkeys(("capacity", "start", "count"), "i32"),
                constants={"KIND": kind, "ROTATE": rotate, "DIM": 128, "DB": 128, "BN": 32, "ASM": True},
            )
        )
    types: dict[str, str] = dict.fromkeys(("q", "keys", "values", "out"), "*bf16")
    types |= dict.fromkeys(("tokens", "positions", "offset", "out_row"), "i32")
    for dim in (256, 128, 64):
        made.append(
            Variant(
                name=f"flash {dim}",
                kernel=flash_kernel,
                types=types,
                constants={"WINDOW": 0, "HEADS": 32, "GROUP": 4, "DIM": dim, "DB": dim, **_blocks(dim)},
                warps=8,
                multiples=("out_row",),
            )
        )
    return made
