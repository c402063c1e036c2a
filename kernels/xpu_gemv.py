"""A few tokens times a quantized weight on an Intel GPU, or times experts by index: y = x Wᵀ, its codes read once.

Neither matrix engines nor assembly: sums of float32 products, so that it runs on every Intel GPU. It knows neither what
made the weight nor what the product is for.
"""
# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false

from dataclasses import dataclass
from typing import Literal

import torch
import triton
from torch import Tensor

from qrun.kernels.gpu_aot import Variant
from qrun.kernels.xpu_gemv_core import gemv_kernel

Kind = Literal["int4", "int8", "fp8", "codebook"]
MOST = 8
"""Tokens that one launch takes at most, where it is not by experts."""
WARPS = 4
WORDS = 128
"""Words of a row that a program has at once: one for each of its lanes."""
PROGRAMS = 256
"""Programs that a launch should have: rows are shared out until there are as many."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Matrix:
    """W [n, k] = ((decode(code) - zero) · scale + offset) · factor, or a stack of such; k padded in the codes alone.

    codes: last dimension contiguous, of bytes or int32, ``kp`` codes in a row. scale, zero, offset [G, n]: rows
    contiguous; zero int8, the others 16 bits or float32; of group ``group``, which divides kp and is a multiple of 16.
    table: float32 [16] for "codebook". factor: float32, one or one an expert.

    The strides are elements of each tensor as given: from an expert to the next, from a row of codes to the next, from
    a group to the next. scale, zero and offset have the same ones.
    """

    kind: Kind
    n: int
    k: int
    kp: int
    group: int
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    offset: Tensor | None = None
    table: Tensor | None = None
    factor: Tensor | None = None
    codes_row: int
    scale_group: int
    codes_expert: int = 0
    scale_expert: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Routed:
    """Which expert each row meets. chosen int [tokens · slots]; gates float32 of that size where slots are added up.

    shared_rows: x has one row for all slots of a token, and not one a slot.
    """

    chosen: Tensor
    slots: int
    shared_rows: bool
    gates: Tensor | None = None


def rows_for(n: int, blocks: int, tokens: int) -> int:
    """Rows of W a program: more share what is done to x, fewer keep more of the GPU busy and need fewer registers."""
    most = max(2, min(8, 16 // tokens))
    return next((rows for rows in (8, 4) if rows <= most and n * blocks >= rows * PROGRAMS), 2)


def gemv(x: Tensor, out: Tensor, w: Matrix, *, routed: Routed | None = None) -> None:
    """out = x Wᵀ, without a bias. x 16-bit or float32, and out of either, have contiguous rows.

    x [M ≤ 8, k], out [M, n]. With ``routed`` w is a stack, x [tokens, k] where rows are shared and else
    [tokens · slots, k]; out [tokens · slots, n], or, where there are gates, [tokens, n].
    """
    tokens = x.shape[0] if routed is None else 1
    slots = 0 if routed is None else routed.slots
    gates = None if routed is None else routed.gates
    blocks = 1 if routed is None else routed.chosen.numel() // (slots if gates is not None else 1)
    assert 1 <= tokens <= MOST and x.shape[1] == w.k and x.stride(1) == 1, (x.shape, x.stride(), w.k)
    assert out.shape == (tokens if routed is None else blocks, w.n) and out.stride(1) == 1, (out.shape, w.n)
    assert w.kp % 32 == 0 and w.kp % w.group == 0 and w.group % 16 == 0, (w.kp, w.group)
    if routed is not None:
        count = routed.chosen.numel() // (slots if routed.shared_rows else 1)
        assert routed.chosen.is_contiguous() and x.shape[0] == count, (x.shape, routed.chosen.shape)
    per = 8 if w.kind in ("int4", "codebook") else 4
    words = min(WORDS, 1 << (w.kp // per - 1).bit_length())
    bytes_each = w.codes.element_size()
    few = 1 << (tokens - 1).bit_length()
    rows = rows_for(w.n, blocks, few)
    gemv_kernel[(triton.cdiv(w.n, rows), blocks)](
        x,
        out,
        w.codes.view(torch.int32),
        w.scale,
        w.zero,
        w.offset,
        w.table,
        w.factor,
        None if routed is None else routed.chosen,
        gates,
        tokens,
        x.stride(0),
        out.stride(0),
        w.codes_row * bytes_each // 4,
        w.codes_expert * bytes_each // 4,
        w.scale_group,
        w.scale_expert,
        w.n,
        w.k,
        KP=w.kp,
        GROUP=w.group,
        KIND=w.kind,
        M=few,
        R=rows,
        W=words,
        EVEN=w.k == w.kp and w.kp % (words * per) == 0,
        SLOTS=slots,
        SHARED=routed is not None and routed.shared_rows,
        EACH=w.factor is not None and w.factor.numel() > 1,
        num_warps=WARPS,
        num_stages=1,
    )


def variants() -> list[Variant]:
    """Every kind for one token and for eight, and experts, of weights 4096 wide."""
    scales = {"int4": "*fp16", "int8": "*fp32", "fp8": "*fp32", "codebook": "*fp16"}
    names = ("x_row", "out_row", "codes_row", "codes_expert", "scale_group", "scale_expert", "N", "K")
    made: list[Variant] = []

    def add(name: str, kind: str, group: int, m: int, *, half: str = "*fp16", slots: int = 0, add_up: bool = False):
        types = {"x": half, "out": "*fp32", "codes": "*i32", "scale": scales[kind], "tokens": "i32"}
        types |= {"zero": "*i8"} if kind == "int4" else {}
        types |= {"table": "*fp32"} if kind == "codebook" else {}
        types |= {"chosen": "*i64"} if slots else {}
        types |= {"gates": "*fp32"} if add_up else {}
        absent = {"zero", "offset", "table", "factor", "chosen", "gates"} - types.keys()
        constants = {
            **dict.fromkeys(sorted(absent)),
            "KP": 4096,
            "GROUP": group,
            "KIND": kind,
            "M": m,
            "R": rows_for(4096, 1, m),
            "W": WORDS,
            "EVEN": True,
            "SLOTS": slots,
            "SHARED": not add_up,
            "EACH": False,
        }
        made.append(
            Variant(
                name=f"xpu gemv {name} M={m}",
                kernel=gemv_kernel,
                types=types | dict.fromkeys(names, "i32"),
                constants=constants,
                warps=WARPS,
                multiples=names,
                weights=rows_for(4096, 1, m) * WORDS * (8 if kind in ("int4", "codebook") else 4),
            )
        )

    for kind, group in (("int4", 128), ("int4", 32), ("int8", 4096), ("int8", 64), ("fp8", 128), ("codebook", 32)):
        for m in (1, 8):
            add(f"{kind} g{group}", kind, group, m)
    add("int4 g128 bf16", "int4", 128, 1, half="*bf16")
    add("experts int4 g128", "int4", 128, 1, slots=8)
    add("experts added up int4 g128", "int4", 128, 1, slots=8, add_up=True)
    return made
