"""Weights in every format that an Intel GPU's kernels are given, other tools' checkpoints among them."""

import math

import torch

from qrun.formats import (
    E2M1,
    NF4,
    AffineFormat,
    CodebookFormat,
    Format,
    Fp8Format,
    MxFp4Format,
    NvFp4Format,
    PlainFormat,
    QTensor,
)
from qrun.formats.superblock import SuperBlockFormat

F16, F32 = torch.float16, torch.float32
FORMATS: tuple[Format, ...] = (
    PlainFormat(torch.bfloat16),
    *(AffineFormat(bits, 0, True) for bits in (4, 8)),
    *(AffineFormat(bits, group, True) for bits in range(2, 9) for group in (16, 64)),
    *(AffineFormat(bits, group, False) for bits in range(2, 9) for group in (32, 128)),
    Fp8Format(),
    Fp8Format(1, 0),
    Fp8Format(16, 32),
    CodebookFormat("nf4", NF4, 64),
    CodebookFormat("fp4", E2M1, 64),
    CodebookFormat("nf4", NF4, 64, F32),
    MxFp4Format(),
    NvFp4Format(),
)
"""What weights are quantized to."""
READ: tuple[Format, ...] = (
    AffineFormat(4, 128, True, scale_dtype=F16),
    AffineFormat(4, 64, scale_dtype=F16),  # AWQ, GPTQ
    AffineFormat(8, 64, scale_dtype=F16),
    AffineFormat(3, 64, scale_dtype=F16, zero_dtype=F16),  # HQQ
    AffineFormat(4, 64, scale_dtype=F32, zero_dtype=F32),
    AffineFormat(8, 64, scale_dtype=torch.bfloat16, zero_dtype=torch.bfloat16),
    AffineFormat(5, 32, scale_dtype=F16, zero_dtype=F16, minimum=True),  # GGUF Q5_1
    AffineFormat(4, 32, scale_dtype=F16, zero_dtype=F16, minimum=True),
    AffineFormat(8, 4096, scale_dtype=F32),  # Quark: a group for the whole row
    SuperBlockFormat(2, 16, 4, True),  # Q2_K … Q6_K
    SuperBlockFormat(3, 16, 6, False),
    SuperBlockFormat(4, 32, 6, True),
    SuperBlockFormat(5, 32, 6, True),
    SuperBlockFormat(6, 16, 8, False),
    NvFp4Format(divides=True),
)
"""What weights are read in, never quantized to."""


def name(form: Format, more: str = "") -> str:
    """For a test's id."""
    if isinstance(form, AffineFormat) and form in READ:
        dtypes = "-".join(str(dtype).removeprefix("torch.") for dtype in (form.scale_dtype, form.zero_dtype))
        more = f" {dtypes}{' minimum' if form.minimum else ''}"
    return f"{form}{more}"


def weight(form: Format, n: int, k: int) -> QTensor:
    """Weights of about the size that a model's have."""
    if form not in READ:
        return form.quantize(torch.randn(n, k) * 0.05)
    made = QTensor.empty(form, (n, k))
    made.codes.view(torch.uint8).random_(0, 256)
    assert made.scale is not None
    if isinstance(form, SuperBlockFormat):
        assert made.scale2 is not None
        made.scale.random_(0, 256)
        if made.zero is not None:
            made.zero.random_(0, 256)
        made.scale2.uniform_(2e-4, 4e-4)
    elif isinstance(form, NvFp4Format):
        assert made.scale2 is not None
        made.scale.copy_(torch.rand(made.scale.shape) * 400 + 40)
        made.scale2.fill_(2688 / 0.2)
    else:
        assert isinstance(form, AffineFormat)
        made.scale.copy_((torch.rand(made.scale.shape) + 0.5) * 0.2 / 2**form.bits)
        if made.zero is not None:
            middle = (torch.rand(made.zero.shape) * 0.5 + 0.25) * 2**form.bits
            made.zero.copy_(middle * made.scale.float() if form.minimum else middle)
    assert math.isfinite(float(made.dequantize().sum()))
    return made
