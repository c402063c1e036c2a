"""The router of a mixture of experts in one launch: RMSNorm, logits, softmax and the choice of experts, all in float32.

It does not know what the experts compute; always-chosen (shared) ones are only numbers appended to the choice.
"""
# pyright: basic, reportCallIssue=false

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from qrun.kernels.gpu_aot import Variant

BLOCK = 1024  # of the model's width, at a time
AHEAD = 4  # so many blocks are on their way at once
FEW = 8  # up to this many tokens a program computes one expert's logit, beyond it four


@triton.jit
def _places(score, EP: tl.constexpr, CHUNK: tl.constexpr):
    """score [EP] -> for each, how many come before it in descending order; the lower index first among equals.

    Counting is one reduction where repeated argmax would be top_k of them, one after the other.
    """
    at = tl.arange(0, EP)
    columns = tl.arange(0, CHUNK)
    rows = tl.arange(0, EP // CHUNK)
    table = score.reshape(EP // CHUNK, CHUNK)
    before = tl.zeros((EP,), tl.int32)
    for chunk in range(EP // CHUNK):
        others = tl.max(tl.where(rows[:, None] == chunk, table, float("-inf")), axis=0)
        first = (chunk * CHUNK + columns)[None, :] < at[:, None]
        ahead = (others[None, :] > score[:, None]) | ((others[None, :] == score[:, None]) & first)
        before += tl.sum(ahead.to(tl.int32), axis=1)
    return before


@triton.jit
def router_kernel(
    x, norm, router, correction, logits, counter, gates, chosen, eps, norm_min,
    E: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, EP: tl.constexpr,
    CHUNK: tl.constexpr, TOP_K: tl.constexpr, SHARED: tl.constexpr, SHARED_P: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """Program (i, m): logits of experts ROWS·i … of token m; a token's last program chooses."""
    token = tl.program_id(1)
    experts = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float32)
    products = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, H, BLOCK * UNROLL):
        for part in tl.static_range(UNROLL):
            k = start + part * BLOCK + columns
            row = tl.load(x + token * H + k, mask=k < H, other=0.0)
            weight = tl.load(norm + k, mask=k < H, other=0.0)
            inside = (experts < E)[:, None] & (k < H)[None, :]
            w = tl.load(router + experts[:, None] * H + k[None, :], mask=inside, other=0.0)
            squares += row * row
            products += w * (row * weight)[None, :]
    scale = tl.rsqrt(tl.sum(squares, axis=0) / H + eps)
    tl.store(logits + token * E + experts, tl.sum(products, axis=1) * scale, mask=experts < E)

    tl.debug_barrier()  # every thread's logits are written before one of them says so
    if tl.atomic_add(counter + token, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(counter + token, 0)
        at = tl.arange(0, EP)
        found = tl.load(logits + token * E + at, mask=at < E, other=float("-inf"), cache_modifier=".cg")
        chances = tl.exp(found - tl.maximum(tl.max(found, axis=0), -3e38))
        chances = chances / tl.sum(chances, axis=0)
        score = chances
        if correction is not None:
            score += tl.load(correction + at, mask=at < E, other=0.0)
        # NaN has no order, and an expert that does not exist must never be chosen.
        score = tl.where(score == score, score, -1e30)
        place = _places(tl.where(at < E, score, float("-inf")), EP, CHUNK)
        taken = place < TOP_K
        if NORMALISE:
            chances = chances / tl.maximum(tl.sum(tl.where(taken, chances, 0.0), axis=0), norm_min)
        out = token * (TOP_K + SHARED)
        tl.store(gates + out + place, chances, mask=taken)
        tl.store(chosen + out + place, at, mask=taken)
        if SHARED > 0:
            more = tl.arange(0, SHARED_P)
            tl.store(gates + out + TOP_K + more, tl.full((SHARED_P,), 1.0, tl.float32), mask=more < SHARED)
            tl.store(chosen + out + TOP_K + more, E + more, mask=more < SHARED)


def _constants(tokens: int, experts: int, width: int, *, top_k: int, shared: int, normalise: bool) -> dict[str, Any]:
    padded = triton.next_power_of_2(max(experts, 2))
    block = min(BLOCK if tokens <= FEW else BLOCK // 2, triton.next_power_of_2(width))
    blocks = triton.cdiv(width, block)
    return {
        "E": experts,
        "H": width,
        "ROWS": 1 if tokens <= FEW else 4,
        "BLOCK": block,
        "UNROLL": triton.cdiv(blocks, triton.cdiv(blocks, AHEAD)),
        "EP": padded,
        "CHUNK": padded if padded <= 64 else max(2048 // padded, 1),
        "TOP_K": top_k,
        "SHARED": shared,
        "SHARED_P": triton.next_power_of_2(max(shared, 1)),
        "NORMALISE": normalise,
    }


def route(
    x: Tensor,
    norm: Tensor,
    eps: float,
    router: Tensor,
    correction: Tensor | None,
    *,
    top_k: int,
    shared: int,
    normalise: bool,
    norm_min: float,
    logits: Tensor,
    counter: Tensor,
    gates: Tensor,
    chosen: Tensor,
) -> tuple[Tensor, Tensor]:
    """Choose experts for x [M, H], the residual stream: for each token the top_k of E, likeliest first, then E, E+1 … .

    All float32 but the int32 ``counter`` [M], which is zero before and after, and ``chosen``. ``norm`` [H] is the
    RMSNorm's weight, ``router`` [E, H], ``correction`` [E] (it selects only), ``logits`` [M, E] is scratch. Fills and
    returns ``gates`` and ``chosen`` [M, top_k + shared]; the gate of a shared expert is 1.
    """
    tokens, width = x.shape
    experts = router.shape[0]
    constants = _constants(tokens, experts, width, top_k=top_k, shared=shared, normalise=normalise)
    router_kernel[(triton.cdiv(experts, int(constants["ROWS"])), tokens)](
        x,
        norm,
        router,
        correction,
        logits,
        counter,
        gates,
        chosen,
        eps,
        norm_min,
        **constants,
        num_warps=4,
        num_stages=1,
    )
    return gates, chosen


def variants() -> list[Variant]:
    """ERNIE-4.5-21B-A3B and a wide model of 128 experts, for one token and for several."""
    tensors = ("x", "norm", "router", "correction", "logits", "gates")
    types = dict.fromkeys(tensors, "*fp32") | {
        "counter": "*i32",
        "chosen": "*i32",
        "eps": "fp32",
        "norm_min": "fp32",
    }
    return [
        Variant(
            name=f"route {experts}x{width} {tokens} tokens",
            kernel=router_kernel,
            types=types,
            constants=_constants(tokens, experts, width, top_k=top_k, shared=shared, normalise=True),
        )
        for experts, width, top_k, shared in ((64, 2560, 6, 2), (128, 8192, 8, 0))
        for tokens in (1, 64)
    ]
