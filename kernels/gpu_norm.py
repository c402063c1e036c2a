"""Turns rows of activations into a matmul's operand, one program a row: RMSNorm or SwiGLU, then 16 bits, int8 or e4m3.

Knows nothing of the matmul: columns from H up to the padded width Kp are written as zeros, so that it need not mask.
"""
# pyright: basic, reportCallIssue=false

import triton
import triton.language as tl
from torch import Tensor

from qrun.kernels.gpu_aot import Variant
from qrun.kernels.gpu_bits import e4m3_encode, narrow, rint


@triton.jit
def swiglu(gate, up):
    """silu(gate) · up, float32."""
    small = tl.exp(-tl.abs(gate))  # so that nothing overflows
    return gate * tl.where(gate > 0, 1.0, small) / (1.0 + small) * up


@triton.jit
def _values(x_ptr, start, H: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr):
    """Columns start … of a row, or, of PAIRS columns and the next in turn, silu of the one times the other."""
    k = start + tl.arange(0, BLOCK)
    if PAIRS > 0:
        at = k // PAIRS * (2 * PAIRS) + k % PAIRS
        gate = tl.load(x_ptr + at, mask=k < H, other=0.0).to(tl.float32)
        up = tl.load(x_ptr + at + PAIRS, mask=k < H, other=0.0).to(tl.float32)
        x = swiglu(gate, up)
    else:
        x = tl.load(x_ptr + k, mask=k < H, other=0.0).to(tl.float32)
    return x


@triton.jit
def _operand(x_ptr, weight_ptr, factor, start, H: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr):
    """The same columns, times the row's factor and the norm's weight if there is one."""
    x = _values(x_ptr, start, H, BLOCK, PAIRS) * factor
    if weight_ptr is not None:
        k = start + tl.arange(0, BLOCK)
        x *= tl.load(weight_ptr + k, mask=k < H, other=0.0)
    return x


@triton.jit
def operand_rows(
    x_ptr,
    weight_ptr,
    out_ptr,
    scale_ptr,
    sums_ptr,
    ssq_ptr,
    stride,
    eps,
    H: tl.constexpr,
    KP: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    NORM: tl.constexpr,
    FORM: tl.constexpr,
):
    """One row of x [M, H] (PAIRS: [M, 2H]) to out [M, KP] of FORM "16", "int8" or "fp8". Absent pointers are None.

    The widths are constants: a row of one block is then read once, whatever the number of passes over it.
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride
    out_ptr += row * KP
    lane = tl.arange(0, BLOCK)

    factor = 1.0
    if NORM:
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, KP, BLOCK):
            x = _values(x_ptr, start, H, BLOCK, PAIRS)
            squares += x * x
        factor = tl.rsqrt(tl.sum(squares) / H + eps)

    if FORM == "16":
        if ssq_ptr is not None:
            total = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, KP, BLOCK):
                x = _values(x_ptr, start, H, BLOCK, PAIRS)
                total += x * x
            tl.store(ssq_ptr + row, tl.sum(total))
        for start in range(0, KP, BLOCK):
            x = narrow(_operand(x_ptr, weight_ptr, factor, start, H, BLOCK, PAIRS), out_ptr.dtype.element_ty)
            tl.store(out_ptr + start + lane, x, mask=start + lane < KP)
            if sums_ptr is not None:
                plane = start // 32 + tl.arange(0, BLOCK // 32)
                sums = tl.sum(x.to(tl.float32).reshape(BLOCK // 32, 32), 1)
                tl.store(sums_ptr + row * (KP // 32) + plane, sums, mask=plane < KP // 32)

    if FORM == "int8":
        peaks = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, KP, BLOCK):
            peaks = tl.maximum(peaks, tl.abs(_operand(x_ptr, weight_ptr, factor, start, H, BLOCK, PAIRS)))
        scale = tl.div_rn(tl.maximum(tl.max(peaks), 1e-10), 127.0)
        tl.store(scale_ptr + row, scale)
        for start in range(0, KP, BLOCK):
            x = tl.div_rn(_operand(x_ptr, weight_ptr, factor, start, H, BLOCK, PAIRS), scale)
            code = tl.minimum(tl.maximum(rint(x), -127.0), 127.0).to(tl.int8)
            tl.store(out_ptr + start + lane, code, mask=start + lane < KP)

    if FORM == "fp8":
        for start in range(0, KP, BLOCK):
            x = _operand(x_ptr, weight_ptr, factor, start, H, BLOCK, PAIRS).reshape(BLOCK // 128, 128)
            scale = tl.div_rn(tl.maximum(tl.max(tl.abs(x), 1), 1e-10), 448.0)
            group = start // 128 + tl.arange(0, BLOCK // 128)
            tl.store(scale_ptr + row * (KP // 128) + group, scale, mask=group < KP // 128)
            code = e4m3_encode(tl.div_rn(x, scale[:, None])).reshape(BLOCK)
            tl.store(out_ptr + start + lane, code, mask=start + lane < KP)


def _block(padded: int) -> tuple[int, int]:
    """Columns that a program takes at a time, and its warps: sixteen columns a thread where there are enough."""
    block = min(4096, 1 << (padded - 1).bit_length())
    return block, max(2, min(8, block // 512))


def _launch(
    x: Tensor,
    out: Tensor,
    form: str,
    *,
    weight: Tensor | None = None,
    scale: Tensor | None = None,
    sums: Tensor | None = None,
    ssq: Tensor | None = None,
    eps: float | None = None,
    pairs: int = 0,
) -> None:
    rows, padded = out.shape
    width = x.shape[1] // 2 if pairs else x.shape[1]
    assert x.shape[0] == rows and x.stride(1) == 1, (x.shape, x.stride(), out.shape)
    assert padded % 128 == 0 and width <= padded and out.is_contiguous(), (x.shape, out.shape)
    assert weight is None or (weight.numel() == width and weight.is_contiguous()), (weight.shape, x.shape)
    block, warps = _block(padded)
    operand_rows[(rows,)](
        x,
        weight,
        out,
        scale,
        sums,
        ssq,
        x.stride(0),
        0.0 if eps is None else eps,
        H=width,
        KP=padded,
        BLOCK=block,
        PAIRS=pairs,
        NORM=eps is not None,
        FORM=form,
        num_warps=warps,
        num_stages=1,
    )


def prepare(
    x: Tensor, weight: Tensor | None, *, xw: Tensor, sums: Tensor | None = None, ssq: Tensor | None = None
) -> None:
    """What a delayed RMSNorm hands on: xw [M, Kp] = x [M, H] · weight [H] rounded, but not divided by the rms.

    sums: float32 [M, Kp/32], of the rounded values per 32 columns. ssq: float32 [1, M], the sum of x².
    """
    _launch(x, xw, "16", weight=weight, sums=sums, ssq=ssq)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, out: Tensor) -> None:
    """RMSNorm of x [M, H] by weight float32 [H], rounded to the dtype of out [M, Kp]."""
    _launch(x, out, "16", weight=weight, eps=eps)


def quantize_int8(x: Tensor, weight: Tensor | None = None, eps: float = 0.0, *, codes: Tensor, scale: Tensor) -> None:
    """x [M, H], after RMSNorm if there is a weight, to codes int8 [M, Kp] with a float32 scale [M]: absmax/127."""
    _launch(x, codes, "int8", weight=weight, eps=None if weight is None else eps, scale=scale)


def quantize_fp8(x: Tensor, weight: Tensor | None = None, eps: float = 0.0, *, codes: Tensor, scale: Tensor) -> None:
    """x [M, H], after RMSNorm if there is a weight, to e4m3 codes uint8 [M, Kp] with scales float32 [M, Kp/128]."""
    _launch(x, codes, "fp8", weight=weight, eps=None if weight is None else eps, scale=scale)


def silu_mul(gate_up: Tensor, pairs: int, *, out: Tensor, sums: Tensor | None = None) -> None:
    """silu(gate) · up of gate_up [M, 2I], ``pairs`` of the one and then of the other, rounded to out's dtype [M, Kp].

    sums: float32 [M, Kp/32], of the rounded values per 32 columns.
    """
    _launch(gate_up, out, "16", sums=sums, pairs=pairs)


def silu_mul_int8(gate_up: Tensor, pairs: int, *, codes: Tensor, scale: Tensor) -> None:
    """The same straight to what :func:`quantize_int8` makes."""
    _launch(gate_up, codes, "int8", scale=scale, pairs=pairs)


def silu_mul_fp8(gate_up: Tensor, pairs: int, *, codes: Tensor, scale: Tensor) -> None:
    """The same straight to what :func:`quantize_fp8` makes."""
    _launch(gate_up, codes, "fp8", scale=scale, pairs=pairs)


def variants() -> list[Variant]:
    """Every output form after RMSNorm and after SwiGLU, of a row of one block and of one that is longer."""
    outs = {"16": "*bf16", "int8": "*i8", "fp8": "*u8"}
    made: list[Variant] = []
    for form, out in outs.items():
        for pairs in (0, 64):
            for width in (4096, 14336):
                block, warps = _block(width)
                pointers = {"x_ptr": "*fp32", "out_ptr": out}
                if not pairs:
                    pointers["weight_ptr"] = "*fp32"
                if form != "16":
                    pointers["scale_ptr"] = "*fp32"
                absent = {"weight_ptr", "scale_ptr", "sums_ptr", "ssq_ptr"} - pointers.keys()
                made.append(
                    Variant(
                        name=f"{'silu' if pairs else 'norm'} {form} {width}",
                        kernel=operand_rows,
                        types={**pointers, "stride": "i32", "eps": "fp32"},
                        constants={
                            **dict.fromkeys(sorted(absent)),
                            "H": width,
                            "KP": width,
                            "BLOCK": block,
                            "PAIRS": pairs,
                            "NORM": not pairs,
                            "FORM": form,
                        },
                        warps=warps,
                        multiples=("stride",),
                    )
                )
    prepared = made[0]
    made.append(
        Variant(
            name="prepare 4096",
            kernel=operand_rows,
            types={**prepared.types, "sums_ptr": "*fp32", "ssq_ptr": "*fp32"},
            constants={
                "scale_ptr": None,
                **{k: v for k, v in prepared.constants.items() if k[-3:] != "ptr"},
                "NORM": False,
            },
            warps=prepared.warps,
            multiples=("stride",),
        )
    )
    return made
