"""One weight bound to the GPU's kernels: up to `MOST` tokens multiply its codes, more of them a tile expanded from it,
or its codes themselves where the activations are 8 bits wide too. It knows a weight, not the block around it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qrun.backends.cuda_matrix import pad_bias
from qrun.backends.cuda_space import Space
from qrun.kernels import gpu_norm
from qrun.kernels.gpu_expand import expand
from qrun.kernels.gpu_gemm_fp8 import matmul_fp8
from qrun.kernels.gpu_gemm_int8 import matmul_int8
from qrun.kernels.gpu_gemv import Config, Emit, Epilogue, Operand, Routed, columns_for, gemv, scratch_size
from qrun.kernels.gpu_packed import Packed

Configure = Callable[[Packed, int, int], Config]
"""A weight, columns and how many blocks of them -> the shape of its programs."""


@dataclass(frozen=True, eq=False)
class Rows:
    """What many tokens' product begins from: x [M, K], to be normed by ``norm`` [K] if there is one; or, with
    ``pairs``, the gates and ups that x holds in turn."""

    x: Tensor
    norm: Tensor | None = None
    eps: float = 0.0
    pairs: int = 0

    def half(self, width: int, dtype: torch.dtype) -> Tensor:
        """16-bit [M, width]."""
        out = torch.empty(self.x.shape[0], width, dtype=dtype, device=self.x.device)
        if self.pairs:
            gpu_norm.silu_mul(self.x, self.pairs, out=out)
        elif self.norm is not None:
            gpu_norm.rms_norm(self.x, self.norm, self.eps, out=out)
        else:
            gpu_norm.prepare(self.x, None, xw=out)
        return out

    def int8(self, width: int) -> tuple[Tensor, Tensor]:
        """Codes int8 [M, width] and a scale [M] per token."""
        tokens = self.x.shape[0]
        codes = torch.empty(tokens, width, dtype=torch.int8, device=self.x.device)
        scale = torch.empty(tokens, dtype=torch.float32, device=self.x.device)
        if self.pairs:
            gpu_norm.silu_mul_int8(self.x, self.pairs, codes=codes, scale=scale)
        else:
            gpu_norm.quantize_int8(self.x, self.norm, self.eps, codes=codes, scale=scale)
        return codes, scale

    def fp8(self, width: int) -> tuple[Tensor, Tensor]:
        """e4m3 codes uint8 [M, width] and scales [M, width/128]."""
        tokens = self.x.shape[0]
        codes = torch.empty(tokens, width, dtype=torch.uint8, device=self.x.device)
        scale = torch.empty(tokens, width // 128, dtype=torch.float32, device=self.x.device)
        if self.pairs:
            gpu_norm.silu_mul_fp8(self.x, self.pairs, codes=codes, scale=scale)
        else:
            gpu_norm.quantize_fp8(self.x, self.norm, self.eps, codes=codes, scale=scale)
        return codes, scale


class Product:
    """x -> x Wᵀ + bias of a weight, or of a stack's experts."""

    def __init__(
        self, weight: Packed, bias: Tensor | None, activations: str, space: Space, configure: Configure, *, native: bool
    ) -> None:
        """``native``: the device multiplies e4m3 itself."""
        self.weight = weight
        self.space = space
        self._configure = configure
        self._bias = None if bias is None else pad_bias(bias, weight).to(space.device)
        plain = weight.kind == "int8" and weight.group == 0 and weight.zero is None
        self._wide = "half"
        if activations == "int8" and plain:
            self._wide = "int8"
        elif activations == "fp8" and weight.kind == "fp8" and native:
            self._wide = "fp8"

    @property
    def kernel(self) -> str:
        """What runs it, for the run card."""
        if self.weight.experts:
            return f"triton {self.weight.kind}×16 by index, many tokens sorted"
        many = {"half": "cuBLAS" if self.weight.kind == "plain" else "expand + cuBLAS"}.get(self._wide)
        return f"triton {self.weight.kind}×16, many tokens {many or f'{self._wide}×{self._wide}'}"

    def few(
        self,
        x: Operand,
        out: Tensor,
        *,
        epilogue: Epilogue = "store",
        eps: float = 0.0,
        residual: Tensor | None = None,
        out_sums: Tensor | None = None,
        link: "Link | None" = None,
        routed: Routed | None = None,
        tokens: int | None = None,
    ) -> Tensor:
        """As `gpu_gemv.gemv`, with the scratch and the program shape seen to; returns out."""
        w = self.weight
        rows = x.x.shape[0] if tokens is None else tokens
        if routed is None:
            columns = columns_for(w, rows)
            blocks = -(-rows // columns)
        else:
            columns = 8 if routed.order is None else routed.order.shape[1]
            blocks = routed.chosen.shape[0]
        config = self._configure(w, columns, blocks)
        combine = routed is not None and routed.gates is not None
        pieces = routed.slots if routed is not None and combine else config.split
        lanes = (rows if combine else blocks) * (w.rows // config.rows)
        emit = None if link is None else link.emit(rows, w, config.rows, out)
        gemv(
            w,
            x,
            out,
            scratch=self.space.scratch(scratch_size(w, columns, rows if combine else blocks, pieces), lanes),
            config=config,
            epilogue=epilogue,
            bias=self._bias,
            eps=eps,
            residual=residual,
            out_sums=out_sums,
            emit=emit,
            routed=routed,
            tokens=tokens,
        )
        return out

    def operand(self, x: Tensor) -> Operand:
        """x [M, K], at most `MOST` tokens, for `few`."""
        made = self.space.operand("plain", x.shape[0], x.shape[1])
        gpu_norm.prepare(x, None, xw=made.x, sums=made.sums)
        return made

    def many(self, rows: Rows, residual: Tensor | None = None) -> Tensor:
        """[M, N] (padded rows of ``pairs`` included), float32 with a residual, else float32 or 16 bits."""
        w = self.weight
        count = w.rows if w.pairs else w.n
        if self._wide == "half":
            return self._expanded(rows.half(w.width, self.space.half), count, residual)
        dtype = self.space.half if residual is None else torch.float32
        out = torch.empty(rows.x.shape[0], count, dtype=dtype, device=rows.x.device)
        if self._wide == "int8":
            codes, scale = rows.int8(w.width)
            matmul_int8(
                codes, w.codes, x_scale=scale, w_scale=_tensor(w.scale)[0], out=out, bias=self._bias, residual=residual
            )
        else:
            codes, scale = rows.fp8(w.width)
            matmul_fp8(
                codes.view(torch.float8_e4m3fn), w.codes.view(torch.float8_e4m3fn), x_scale=scale,
                w_scale=_tensor(w.scale), out=out, bias=self._bias, residual=residual,
            )  # fmt: skip
        return out

    def _expanded(self, x: Tensor, count: int, residual: Tensor | None) -> Tensor:
        w = self.weight
        bias = None if self._bias is None else self._bias[:count].to(x.dtype)
        if w.kind == "plain":
            y = F.linear(x, w.codes[:count], bias)
        else:
            y = torch.empty(x.shape[0], count, dtype=x.dtype, device=x.device)
            scratch = self.space.expanded(w.rows, w.width)
            for a in range(0, count, scratch.shape[0]):
                part = scratch[: min(scratch.shape[0], count - a)]
                expand(w, part, start=a)
                torch.mm(x, part.t(), out=y[:, a : a + part.shape[0]])
            if bias is not None:
                y += bias
        return y if residual is None else residual + y


class Link:
    """Between a block and the next: what the one leaves of its last x for the other, whose norm this is."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self._source: Tensor | None = None
        self._operand: Operand | None = None
        self.norm: Tensor | None = None

    def emit(self, tokens: int, weight: Packed, rows: int, out: Tensor) -> Emit | None:
        """The buffers that a product with ``rows`` rows a program fills beside out; none after the last block."""
        self._source = self._operand = None
        if self.norm is None or self.norm.shape[0] != weight.n:
            return None
        squares = self._space.squares(weight.rows // rows, tokens)
        self._source, self._operand = out, self._space.operand("normed", tokens, weight.n, squares)
        return Emit(norm=self.norm, x=self._operand.x, sums=self._operand.sums, ssq=squares)

    def operand(self, x: Tensor, norm: Tensor) -> Operand:
        """x [M, H] times ``norm``, ready to be multiplied: as it was left, or made now."""
        if x is self._source and norm is self.norm and self._operand is not None:
            return self._operand
        tokens, width = x.shape
        made = self._space.operand("fresh", tokens, width, self._space.squares(1, tokens))
        gpu_norm.prepare(x, norm, xw=made.x, sums=made.sums, ssq=made.ssq)
        return made


def _tensor(x: Tensor | None) -> Tensor:
    assert x is not None, "8-bit weights have scales"
    return x
