"""What lies between the qkv product and attention: head norms, rope, and K and V into the cache, in one launch.

Codes are bit for bit those of the cache's formats in plain torch, which is why products are not fused into sums here.
It does not know how the cache is read, nor who chose the formats.
"""
# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from qrun.kernels.gpu_aot import Variant
from qrun.kernels.gpu_bits import e4m3_encode, rint, round_bf16
from qrun.kernels.gpu_kv import Side, padded, power_of_two


@triton.jit
def hadamard32(x):
    """float32 [R, 32]: each row times Sylvester's orthonormal matrix, by butterflies."""
    lane = tl.arange(0, 32)[None, :]
    for bit in tl.static_range(5):
        partner = tl.gather(x, tl.broadcast_to(lane ^ (1 << bit), x.shape), 1)
        x = tl.where((lane & (1 << bit)) == 0, x + partner, partner - x)
    return x * 0.17677669529663687


@triton.jit
def reciprocal(x):
    """1/x exactly rounded, and 0 where that is not finite."""
    # Above 2^-128, compared 2^24 times as large: a constant below float32's least normal number would be a float64.
    usable = tl.abs(x) * 16777216.0 > 4.930380657631324e-32
    return tl.where(usable, tl.div_rn(1.0, tl.where(usable, x, 1.0)), 0.0)


@triton.jit
def put(x, i, codes, scale, KIND: tl.constexpr, DIM: tl.constexpr):
    """One vector x [GB, 32], zero from DIM on, with indices i, as codes and scale at the given places."""
    GB: tl.constexpr = x.shape[0]
    GROUPS: tl.constexpr = (DIM + 31) // 32
    g = tl.arange(0, GB)
    if KIND == "fp32":
        tl.store(codes + i, x, mask=i < DIM)
    elif KIND == "bf16":
        tl.store(codes + i, round_bf16(x).to(tl.bfloat16), mask=i < DIM)
    elif KIND == "fp8":
        peak = tl.max(tl.max(tl.abs(x), 1), 0)
        # Where 448 / peak is finite, above 448 * 2^-128; torch makes that quotient a reciprocal and a product.
        peak = tl.where(peak > 1.3165536729209621e-36, peak, 448.0)
        tl.store(scale, tl.div_rn(peak, 448.0))
        tl.store(codes + i, e4m3_encode(x * (tl.div_rn(1.0, peak) * 448.0)), mask=i < DIM)
    elif KIND == "int8":
        s = round_bf16(tl.div_rn(tl.max(tl.abs(x), 1), 127.0))
        tl.store(scale + g, s.to(tl.bfloat16), mask=g < GROUPS)
        code = tl.minimum(tl.maximum(rint(x * reciprocal(s)[:, None]), -127.0), 127.0)
        tl.store(codes + i, code.to(tl.int8), mask=i < GROUPS * 32)
    else:
        tl.static_assert(KIND == "int4")
        x = hadamard32(x)
        low = tl.min(x, 1)
        high = tl.max(x, 1)
        s = round_bf16(tl.where(-low > high, low, high) * -0.125)
        tl.store(scale + g, s.to(tl.bfloat16), mask=g < GROUPS)
        code = tl.floor(x * reciprocal(s)[:, None] + 8.5)
        code = tl.minimum(tl.maximum(code, 0.0), 15.0).to(tl.int32)
        even, odd = tl.split(tl.reshape(code, (GB, 16, 2)))
        b = g[:, None] * 16 + tl.arange(0, 16)[None, :]
        tl.store(codes + b, (even | (odd << 4)).to(tl.uint8), mask=b < GROUPS * 16)


@triton.jit
def append_kernel(
    qkv,
    positions,
    cos,
    sin,
    q_norm,
    k_norm,
    k_codes,
    k_scale,
    v_codes,
    v_scale,
    q_out,
    qkv_row,
    k_codes_head,
    k_codes_row,
    k_scale_head,
    k_scale_row,
    v_codes_head,
    v_codes_row,
    v_scale_head,
    v_scale_row,
    eps,
    shrink,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    GB: tl.constexpr,
    NORM: tl.constexpr,
    K_KIND: tl.constexpr,
    V_KIND: tl.constexpr,
):
    """Program (m, h): head h of q, then k, then v, of token m. qkv float32 [M, (HEADS + 2·KV_HEADS)·DIM]."""
    HALF: tl.constexpr = DIM // 2
    DP: tl.constexpr = (DIM + 31) // 32 * 32
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    i = tl.arange(0, GB)[:, None] * 32 + tl.arange(0, 32)[None, :]
    real = i < DIM
    row = qkv + token * qkv_row + head * DIM
    x = tl.load(row + i, mask=real, other=0.0)
    if head < HEADS + KV_HEADS:
        second = i >= HALF
        y = tl.load(row + tl.where(second, i - HALF, i + HALF), mask=real, other=0.0)
        if NORM:
            of_q = head < HEADS
            inverse = tl.rsqrt(tl.sum(tl.sum(x * x, 1), 0) / DIM + eps)
            here = real & of_q
            there = real & (head >= HEADS)
            j = tl.where(second, i - HALF, i + HALF)
            x *= inverse
            y *= inverse
            x *= tl.load(q_norm + i, mask=here, other=0.0) + tl.load(k_norm + i, mask=there, other=0.0)
            y *= tl.load(q_norm + j, mask=here, other=0.0) + tl.load(k_norm + j, mask=there, other=0.0)
        angle = token * HALF + tl.where(second, i - HALF, i)
        c = tl.load(cos + angle, mask=real, other=0.0)
        s = tl.load(sin + angle, mask=real, other=0.0)
        x = tl.where(second, x * c + y * s, x * c - y * s)
    if head < HEADS:
        x *= shrink
        if K_KIND == "int4":
            x = hadamard32(x)
        tl.store(q_out + (token * HEADS + head) * DP + i, x.to(q_out.dtype.element_ty), mask=i < DP)
    else:
        at = tl.load(positions + token).to(tl.int64)
        if head < HEADS + KV_HEADS:
            to = (head - HEADS).to(tl.int64)
            codes = k_codes + to * k_codes_head + at * k_codes_row
            put(x, i, codes, k_scale + to * k_scale_head + at * k_scale_row, K_KIND, DIM)
        else:
            to = (head - HEADS - KV_HEADS).to(tl.int64)
            codes = v_codes + to * v_codes_head + at * v_codes_row
            put(x, i, codes, v_scale + to * v_scale_head + at * v_scale_row, V_KIND, DIM)


def parts(side: Side) -> tuple[Tensor, Tensor, list[int]]:
    """Codes and scale as kernels take them, and their strides by head and by position."""
    codes = side.codes.view(torch.uint8) if side.kind == "fp8" else side.codes
    scale = codes if side.scale is None else side.scale
    return codes, scale, [*codes.stride()[:2], *scale.stride()[:2]]


def append(
    qkv: Tensor,
    *,
    heads: int,
    kv_heads: int,
    dim: int,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    k: Side,
    v: Side,
    q_out: Tensor,
) -> None:
    """qkv [M, (heads + 2·kv_heads)·dim]: K and V into the cache at ``positions``, q ready for attention into q_out.

    qkv, cos and sin [M, dim/2] and the norms [dim] are float32; q_out [M, heads, DP] is contiguous, DP being dim in
    whole groups of 32. q comes out divided by sqrt(dim), and rotated if K is.
    """
    assert (q_norm is None) == (k_norm is None)
    assert q_out.is_contiguous() and cos.is_contiguous() and sin.is_contiguous() and qkv.stride(1) == 1
    k_codes, k_scale, k_strides = parts(k)
    v_codes, v_scale, v_strides = parts(v)
    append_kernel[(qkv.shape[0], heads + 2 * kv_heads)](
        qkv,
        positions,
        cos,
        sin,
        qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm,
        k_codes,
        k_scale,
        v_codes,
        v_scale,
        q_out,
        qkv.stride(0),
        *k_strides,
        *v_strides,
        eps,
        1 / math.sqrt(dim),
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        GB=power_of_two(padded(dim) // 32),
        NORM=q_norm is not None,
        K_KIND=k.kind,
        V_KIND=v.kind,
        num_warps=1,
        enable_fp_fusion=False,
    )


POINTERS = {
    "bf16": ("*bf16", "*bf16"),
    "fp32": ("*fp32", "*fp32"),
    "int8": ("*i8", "*bf16"),
    "int4": ("*u8", "*bf16"),
    "fp8": ("*u8", "*fp32"),
}
"""The Triton types of a side's codes and scale."""


def side_types(k: str, v: str) -> dict[str, str]:
    """The types of both sides' arguments, for kernels that name them as ``append_kernel`` does."""
    types = {}
    for letter, kind in (("k", k), ("v", v)):
        types |= {f"{letter}_{part}": pointer for part, pointer in zip(("codes", "scale"), POINTERS[kind], strict=True)}
        types |= {f"{letter}_{part}_{step}": "i32" for part in ("codes", "scale") for step in ("head", "row")}
    return types


def side_multiples(k: str, v: str) -> tuple[str, ...]:
    """Those strides of theirs that are multiples of 16 in heads of 64 and more and capacities that are."""
    names = []
    for letter, kind in (("k", k), ("v", v)):
        names += [f"{letter}_codes_head", f"{letter}_codes_row", f"{letter}_scale_head"]
        names += [f"{letter}_scale_row"] if kind in ("bf16", "fp32") else []
    return tuple(names)


def variants() -> list[Variant]:
    """Each cache format, for 32 heads of 128 on 8 kv heads."""
    floats = ["qkv", "cos", "sin", "q_norm", "k_norm"]
    return [
        Variant(
            name=f"append {kind}",
            kernel=append_kernel,
            types=dict.fromkeys(floats, "*fp32")
            | {"positions": "*i64", "q_out": "*bf16", "qkv_row": "i32", "eps": "fp32", "shrink": "fp32"}
            | side_types(kind, kind),
            constants={"HEADS": 32, "KV_HEADS": 8, "DIM": 128, "GB": 4, "NORM": True, "K_KIND": kind, "V_KIND": kind},
            warps=1,
            multiples=("qkv_row", *side_multiples(kind, kind)),
        )
        for kind in ("bf16", "int8", "int4", "fp8")
    ]
