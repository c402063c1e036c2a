"""The launch of `gpu_gemv_core`: which program shape serves which weight, what a product takes and leaves behind."""
# pyright: basic, reportCallIssue=false, reportOptionalMemberAccess=false

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
from torch import Tensor

from qrun.kernels.gpu_aot import Variant
from qrun.kernels.gpu_decode import E4M3_BF16, codebook_ptx
from qrun.kernels.gpu_gemv_core import gemv_kernel
from qrun.kernels.gpu_packed import BITS, Packed

MOST = 64
"""Columns of one program: more tokens are better served by expanding the weight."""
Epilogue = Literal["store", "silu", "residual"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape of a program: its rows of W, its warps and pipeline stages, and how many programs share K."""

    rows: int = 128
    warps: int = 4
    stages: int = 3
    split: int = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Operand:
    """What a product multiplies: x [M, Kp] in 16 bits with zeros beyond ``width``, and Σx over each 32, [M, Kp/32].

    ssq [parts, M]: x is still to be divided by its root mean square, whose squares' sums over ``width`` these are.
    """

    x: Tensor
    sums: Tensor
    width: int
    ssq: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Emit:
    """What a residual product leaves for the next: y times ``norm`` [N] float32 as an `Operand`'s tensors."""

    norm: Tensor
    x: Tensor
    sums: Tensor
    ssq: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Routed:
    """Which expert each column meets. chosen int32 [M·slots]; gates float32 [M·slots] where the slots are added up.

    shared_rows: x has one row for all slots of a token. order int32 [blocks, columns]: slots sorted by expert, each
    block of one expert, chosen int32 [blocks]; -1 where there is no slot.
    """

    slots: int
    chosen: Tensor
    shared_rows: bool
    gates: Tensor | None = None
    order: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Scratch:
    """partial float32, for the pieces' sums; counter int32, zeros, which every launch leaves as it found them."""

    partial: Tensor
    counter: Tensor


def columns_for(w: Packed, tokens: int) -> int:
    """Columns of a program for so many tokens: 8, 16, 32 or 64; of the eight planes of int2, 8 or 32."""
    if w.kind == "int2":
        return 8 if tokens <= 8 else 32
    return min(MOST, max(8, 1 << (tokens - 1).bit_length()))


def default_config(w: Packed, columns: int, processors: int, blocks: int = 1) -> Config:
    """A shape that compiles without spilling anywhere; pieces of K so that each processor has about four programs."""
    # Twice the rows share what looking codes up costs; with scales of 16 they would need too many registers.
    wide = w.pairs == 128 or (w.kind == "codebook" and w.plane == 32 and columns == 8 and w.rows % 256 == 0)
    rows = 256 if wide else 128
    programs = w.rows // rows * blocks
    tiles = w.width // w.tile
    split = max(1, min(tiles // 4, 4 * processors // programs, 16))
    stages = 2 if w.kind == "codebook" or (w.kind in BITS and columns > 8) else 3
    return Config(rows=rows, warps=4 if columns == 8 else 8, stages=stages, split=split)


def scratch_size(w: Packed, columns: int, blocks: int, pieces: int) -> int:
    """Floats of `Scratch.partial` for ``blocks`` blocks of columns in so many pieces; none for a single piece."""
    return 0 if pieces == 1 else blocks * pieces * w.rows * columns


def gemv(
    w: Packed,
    x: Operand,
    out: Tensor,
    *,
    scratch: Scratch,
    config: Config,
    epilogue: Epilogue = "store",
    bias: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    out_sums: Tensor | None = None,
    emit: Emit | None = None,
    routed: Routed | None = None,
    tokens: int | None = None,
) -> None:
    """out = x Wᵀ for M tokens, in one launch.

    store: out float32 [M, N]. silu: w's rows are in ``pairs``, out 16-bit [M, N/2 padded] with ``out_sums``.
    residual: out = residual + x Wᵀ float32 [M, N], and ``emit`` for the next product. ``bias`` float32 [Np]. With
    ``routed`` w is a stack; out has a row per slot, or, where gates are given, one per token.
    """
    m = x.x.shape[0] if tokens is None else tokens
    slots = routed.slots if routed is not None else 0
    combine = routed is not None and routed.gates is not None
    grouped = routed is not None and routed.order is not None
    if grouped:
        columns, blocks = routed.order.shape[1], routed.order.shape[0]
    elif slots:
        columns, blocks = 8, routed.chosen.shape[0]
    else:
        columns = columns_for(w, m)
        blocks = triton.cdiv(m, columns)
    one = not grouped and (slots > 0 or m == 1)
    pieces = slots if combine else config.split
    constants, codes = _constants(w, x.x.dtype, x.x.is_cuda)
    none = x.x
    grid = (w.rows // config.rows * (1 if combine else config.split), blocks)
    gemv_kernel[grid](
        x.x, x.x.stride(0), x.sums, x.sums.stride(0), codes,
        none if w.scale is None else w.scale, none if w.zero is None else w.zero,
        none if w.table is None else w.table, none if w.scale2 is None else w.scale2,
        none if bias is None else bias, none if x.ssq is None else x.ssq, 1 if x.ssq is None else x.ssq.shape[0], eps,
        none if residual is None else residual, out, out.stride(0),
        none if emit is None else emit.norm, none if emit is None else emit.x, 0 if emit is None else emit.x.stride(0),
        emit.sums if emit is not None else none if out_sums is None else out_sums,
        emit.sums.stride(0) if emit is not None else 0 if out_sums is None else out_sums.stride(0),
        none if emit is None else emit.ssq, scratch.partial, scratch.counter,
        none if routed is None else routed.chosen, none if not combine else routed.gates,
        none if not grouped else routed.order, m, w.n, w.rows, w.width // constants["TILE"],
        1 if w.scale is None else w.scale.shape[-1 if w.kind == "fp8" else -2], x.width, 1 if combine else config.split,
        **constants, EPILOGUE=epilogue, NORMED=x.ssq is not None, SLOTS=slots,
        SHARE=routed is not None and routed.shared_rows, COMBINE=combine, GROUPED=grouped, ONE=one,
        BIASED=bias is not None, SCALED2=w.scale2 is not None, EMIT=emit is not None, PIECES=pieces > 1,
        ROWS=config.rows, COLS=columns, PARTS=1 if x.ssq is None else triton.next_power_of_2(x.ssq.shape[0]),
        STAGES=config.stages, CHUNK=w.pairs, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def _constants(w: Packed, half: torch.dtype, asm: bool) -> tuple[dict[str, Any], Tensor]:
    """What of a launch the weight's kind decides, and its codes as that reads them."""
    scale = "none" if w.scale is None else "e8m0" if w.kind == "codebook" and w.plane == 32 else "e4m3"
    if w.scale is not None and w.scale.dtype != torch.uint8:
        scale = "float"
    tile = w.tile if w.kind in BITS or not w.group else math.gcd(w.group, 128)
    tile = 64 if w.kind == "plain" else tile
    ptx, codes = "", w.codes
    if asm and w.kind == "codebook":
        ptx = codebook_ptx(w.values, half)
    elif asm and w.kind == "fp8" and half == torch.bfloat16:
        ptx, codes = E4M3_BF16, codes.view(torch.int32)
    return {
        "KIND": w.kind, "GROUP": w.group, "SCALE": scale, "ZERO": w.zero is not None, "PLANE": w.plane, "TILE": tile,
        "PTX": ptx, "ASM": asm,
    }, codes  # fmt: skip


# kind, scale's type, group, zeros, plane, most instructions a weight on sm_90
_KINDS = {
    "int4 g64": ("int4", "*bf16", 64, True, 32, 2.8),
    "int4 g128": ("int4", "*bf16", 128, False, 32, 2.8),
    "int4 g32": ("int4", "*bf16", 32, True, 32, None),
    "int4 channel": ("int4", "*fp32", 0, False, 32, 2.8),
    "int8 channel": ("int8", "*fp32", 0, False, 32, 3.5),
    "int8 g64": ("int8", "*bf16", 64, True, 32, None),
    "int2 g32": ("int2", "*bf16", 32, True, 32, None),
    "nf4": ("codebook", "*bf16", 64, False, 32, 4.2),
    "mxfp4": ("codebook", "*u8", 32, False, 32, None),
    "nvfp4": ("codebook", "*u8", 16, False, 16, None),
    "fp8": ("fp8", "*fp32", 128, False, 32, None),
    "bf16": ("plain", "*fp32", 0, False, 32, None),
}

_POINTERS = {
    "sums": "*fp32", "zero": "*u8", "table": "*fp32", "scale2": "*fp32", "bias": "*fp32", "ssq": "*fp32",
    "residual": "*fp32", "out": "*fp32", "norm": "*fp32", "emit_sums": "*fp32", "emit_ssq": "*fp32",
    "partial": "*fp32", "counter": "*i32", "chosen": "*i32", "gates": "*fp32", "order": "*i32", "eps": "fp32",
}  # fmt: skip
_INTEGERS = (
    "x_stride", "sums_stride", "parts", "out_stride", "emit_stride", "emit_sums_stride", "M", "N", "NP", "TILES",
    "GROUPS", "WIDTH", "SPLIT",
)  # fmt: skip


def variants() -> list[Variant]:
    """Every kind for one token; every epilogue, routing and width for 4 bits in groups of 64."""
    made = [_variant(name, name, limit=kind[-1]) for name, kind in _KINDS.items()]
    made.append(_variant("int4 g64 fp16", "int4 g64", half="fp16", limit=2.5, STAGES=2))
    for name in ("int4 g64", "fp8"):
        made.append(_variant(f"{name} silu", name, EPILOGUE="silu"))
    made += [
        _variant("int4 g64 residual", "int4 g64", EPILOGUE="residual", NORMED=False, EMIT=True),
        _variant("int4 g64 experts silu", "int4 g64", EPILOGUE="silu", SLOTS=8, SHARE=True, PIECES=False),
        _variant(
            "int4 g64 experts down", "int4 g64", EPILOGUE="residual", NORMED=False, EMIT=True, SLOTS=8, COMBINE=True
        ),
    ]
    made.append(_variant("int4 g64 few tokens", "int4 g64", ONE=False))
    made.append(_variant("fp8 silu 64 columns", "fp8", EPILOGUE="silu", COLS=64, ONE=False))
    for columns in (16, 32, 64):
        for name in ("int4 g64", "int8 channel", "int2 g32", "fp8", "nf4", "mxfp4", "nvfp4", "bf16"):
            if name == "int2 g32" and columns != 32:
                continue
            made.append(_variant(f"{name} {columns} columns", name, COLS=columns, ONE=False))
    made.append(
        _variant(
            "int4 g64 experts sorted", "int4 g64", EPILOGUE="silu", SLOTS=8, SHARE=True, GROUPED=True, COLS=64,
            ONE=False, PIECES=False, NORMED=False,
        )
    )  # fmt: skip
    return made


def _variant(name: str, kind: str, *, half: str = "bf16", limit: float | None = None, **changes: Any) -> Variant:
    form, scale, group, zero, plane, _ = _KINDS[kind]
    values = tuple(math.tanh((i - 7.3) / 8) for i in range(16))
    dtype = torch.bfloat16 if half == "bf16" else torch.float16
    silu = changes.get("EPILOGUE") == "silu"
    w = Packed(
        kind=form, n=256, k=128, codes=torch.empty(256, 128, dtype=torch.int8), group=group, plane=plane,
        scale=torch.empty(1, dtype=torch.uint8 if scale == "*u8" else torch.float32),
        zero=torch.empty(1) if zero else None, values=values, pairs=(128 if form == "fp8" else 64) if silu else 0,
    )  # fmt: skip
    known, _ = _constants(w, dtype, True)
    config = default_config(w, changes.get("COLS", 8), 1)
    codes = {"plain": f"*{half}", "int8": "*i8"}.get(form, "*i32")
    sixteen = f"*{half}"
    return Variant(
        name=f"gemv {name}",
        kernel=gemv_kernel,
        types=_POINTERS
        | {"x": sixteen, "emit": sixteen, "w": codes, "scale": scale}
        | ({"out": sixteen} if silu else {})
        | dict.fromkeys(_INTEGERS, "i32"),
        constants={
            **known, "EPILOGUE": "store", "NORMED": True, "SLOTS": 0, "SHARE": False, "COMBINE": False,
            "GROUPED": False, "ONE": True, "BIASED": False, "SCALED2": plane == 16, "EMIT": False, "PIECES": True,
            "ROWS": config.rows, "COLS": 8, "PARTS": 64, "STAGES": config.stages,
            "CHUNK": w.pairs, **changes,
        },
        warps=config.warps,
        stages=config.stages,
        multiples=("x_stride", "sums_stride", "NP", "out_stride", "emit_stride"),
        weights=config.rows * known["TILE"],
        limit=limit,
    )  # fmt: skip
