"""What PyTorch and cuBLAS do with products and attention of the same shapes: the marks to beat. No kernel of qrun's.

Every function returns calls that take turns, each on weights or caches of its own, and the bytes or the operations one
of them needs.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.gpu_check_timing import Call, Work, rotate

GROUP: Final = 64
plain: Any = torch
aten: Any = torch.ops.aten


def noise(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal numbers; for fp8, of a tenth that size."""
    made = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    return made.mul_(0.1).to(dtype) if dtype.itemsize == 1 else made.to(dtype)


def cublas(m: int, n: int, k: int) -> Work:
    """BF16."""
    x = noise(m, k)

    def one() -> Call:
        w = noise(n, k)
        return lambda: F.linear(x, w)

    return rotate(one, 2 * n * k, 2 * m * n * k)


def tinygemm(m: int, n: int, k: int) -> Work:
    """int4 in groups of 64, BF16 scales and zeros."""
    x = noise(m, k)
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    packed = aten._convert_weight_to_int4pack(codes, 8)
    table = noise(k // GROUP, n, 2)

    def one() -> Call:
        w, s = packed.clone(), table.clone()
        return lambda: aten._weight_int4pack_mm(x, w, GROUP, s)

    return rotate(one, packed.nbytes + table.nbytes, 2 * m * n * k)


def scaled_mm(m: int, n: int, k: int) -> Work:
    """e4m3 with one scale a tensor: the least that cuBLAS can be asked to do."""
    x, one_scale = noise(m, k, dtype=torch.float8_e4m3fn), torch.ones((), device="cuda")

    def one() -> Call:
        w = noise(n, k, dtype=torch.float8_e4m3fn).t()
        return lambda: plain._scaled_mm(
            x, w, scale_a=one_scale, scale_b=one_scale, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return rotate(one, n * k, 2 * m * n * k)


def scaled_mm_rows(m: int, n: int, k: int) -> Work:
    """e4m3 with a scale per row of x and of the weight."""
    x, x_scale = noise(m, k, dtype=torch.float8_e4m3fn), torch.ones(m, 1, device="cuda")
    w_scale = torch.ones(1, n, device="cuda")

    def one() -> Call:
        w = noise(n, k, dtype=torch.float8_e4m3fn).t()
        return lambda: plain._scaled_mm(
            x, w, scale_a=x_scale, scale_b=w_scale, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return rotate(one, n * k, 2 * m * n * k)


def scaled_mm_blocks(m: int, n: int, k: int) -> Work:
    """e4m3 with scales per 128 columns of x and per block of 128×128, as our block-wise FP8."""
    x = noise(m, k, dtype=torch.float8_e4m3fn)
    x_scale = torch.ones(k // 128, m, device="cuda").t()
    w_scale = torch.ones(n // 128, k // 128, device="cuda").t()

    def one() -> Call:
        w = noise(n, k, dtype=torch.float8_e4m3fn).t()
        return lambda: plain._scaled_mm(x, w, scale_a=x_scale, scale_b=w_scale, out_dtype=torch.bfloat16)

    return rotate(one, n * k, 2 * m * n * k)


def int_mm(m: int, n: int, k: int) -> Work:
    """int8 without scales."""
    x = torch.randint(-127, 128, (m, k), dtype=torch.int8, device="cuda")

    def one() -> Call:
        w = torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda").t()
        return lambda: plain._int_mm(x, w)

    return rotate(one, n * k, 2 * m * n * k)


FEW: Final[Mapping[str, Callable[[int, int, int], Work]]] = {
    "cuBLAS bf16": cublas,
    "tinygemm int4 g64": tinygemm,
    "torch._scaled_mm fp8": scaled_mm,
}
MANY: Final[Mapping[str, Callable[[int, int, int], Work]]] = {
    "cuBLAS bf16": cublas,
    "torch._scaled_mm fp8": scaled_mm,
    "torch._scaled_mm fp8 rows": scaled_mm_rows,
    "torch._scaled_mm fp8 blocks": scaled_mm_blocks,
    "torch._int_mm": int_mm,
}


def sdpa(heads: int, kv_heads: int, dim: int, length: int) -> Work:
    """One query over a BF16 cache."""
    q = noise(1, heads, 1, dim)

    def one() -> Call:
        k, v = noise(1, kv_heads, length, dim), noise(1, kv_heads, length, dim)
        return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return rotate(one, 4 * kv_heads * length * dim)


def sdpa_packed(heads: int, kv_heads: int, dim: int, length: int) -> Work:
    """The same with a kv head's queries as the rows of one, so that its keys are read once."""
    q = noise(1, kv_heads, heads // kv_heads, dim)

    def one() -> Call:
        k, v = noise(1, kv_heads, length, dim), noise(1, kv_heads, length, dim)
        return lambda: F.scaled_dot_product_attention(q, k, v)

    return rotate(one, 4 * kv_heads * length * dim)


ATTENTION: Final[Mapping[str, Callable[[int, int, int, int], Work]]] = {"SDPA": sdpa, "SDPA packed": sdpa_packed}
