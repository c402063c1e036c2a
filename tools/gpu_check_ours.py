"""qrun's own kernels at work, as `gpu_check_kernels` times them: each on weights or caches of its own, in turns.

They are launched through what the backend launches them with, so their buffers and program shapes are the real ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from qrun.backends.cuda_blocks import side
from qrun.backends.cuda_matrix import pack, pack_stack
from qrun.backends.cuda_product import Configure, Product, Rows
from qrun.backends.cuda_space import Space
from qrun.cache import KVStore
from qrun.formats import Format, QTensor, format_of, kv_format
from qrun.kernels.gpu_attention import decode_attention, partial_shape, split_count
from qrun.kernels.gpu_gemm_fp8 import matmul_fp8
from qrun.kernels.gpu_gemm_int8 import Tile, matmul_int8
from qrun.kernels.gpu_gemv import Config, Operand, Routed, default_config
from qrun.kernels.gpu_kv import padded
from qrun.kernels.gpu_packed import Packed
from qrun.recipe import CacheType, WeightScheme
from tools.gpu_check_random import noise_store
from tools.gpu_check_timing import Call, Work, copies_of, rotate

SCHEMES = {
    "int4 g64": WeightScheme("int", 4, 64, False),
    "int4 g128": WeightScheme("int", 4, 128, False),
    "int8": WeightScheme("int", 8, 0),
    "bf16": WeightScheme("bf16", 16),
    "fp8": WeightScheme("fp8", 8),
    "nf4": WeightScheme("nf4", 4),
    "mxfp4": WeightScheme("mxfp4", 4),
    "nvfp4": WeightScheme("nvfp4", 4),
    "int2 g64": WeightScheme("int", 2, 64, False),
}


@dataclass(frozen=True)
class Bench:
    """Where the kernels run: a device and its 16-bit type. ``configure``: program shapes, by default without tuning;
    ``register`` is told of every weight that could be tuned."""

    device: torch.device
    half: torch.dtype
    processors: int
    configure: Configure | None = None
    register: Callable[[Packed], None] | None = None

    @cached_property
    def space(self) -> Space:
        return Space(self.device, self.half)

    def shape_of(self, w: Packed, columns: int, slots: int) -> Config:
        if self.configure is not None:
            return self.configure(w, columns, slots)
        return default_config(w, columns, self.processors, slots)

    def weight(self, name: str, *shape: int) -> QTensor:
        """A quantized matrix of noise."""
        form: Format = format_of(SCHEMES[name])
        return form.quantize(torch.randn(shape, device=self.device).mul_(shape[-1] ** -0.5))

    def product(self, packed: Packed, activations: str = "16") -> Product:
        if self.register is not None:
            self.register(packed)
        return Product(packed, None, activations, self.space, self.shape_of, native=True)

    def operand(self, tokens: int, packed: Packed) -> Operand:
        x = self._noise(tokens, packed.width)
        x[:, packed.k :] = 0
        return Operand(x=x, sums=x.float().view(tokens, -1, 32).sum(-1), width=packed.k)

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.half)

    def few(self, tokens: int, name: str, n: int, k: int) -> Work:
        """Some tokens by a quantized weight [n, k], in one launch."""
        first = pack(self.weight(name, n, k), self.half)
        x, out = self.operand(tokens, first), torch.empty(tokens, n, device=self.device)

        def one() -> Call:
            product = self.product(_copy(first))
            return lambda: product.few(x, out)

        return rotate(one, first.nbytes, 2 * tokens * n * k)

    def experts(self, name: str, hidden: int, width: int, *, experts: int, slots: int, down: bool) -> Work:
        """One token by ``slots`` of the experts' gates and ups, with SiLU, or by their downs, added up.

        Every call meets other experts, as layers do.
        """
        one = self.weight(name, *((hidden, width) if down else (2 * width, hidden)))
        stack = pack_stack([one] * experts, self.half, paired=not down)
        each = slots * stack.nbytes // experts
        calls: list[Call] = []
        x = self.operand(slots if down else 1, stack)
        gates = torch.full((slots,), 1 / slots, device=self.device)
        out: Tensor = torch.zeros(1, hidden, device=self.device)
        inner = self.space.operand("inner", slots, width)
        product = self.product(stack)
        for start in range(0, min(experts, slots * copies_of(each)) - slots + 1, slots):
            chosen = torch.arange(start, start + slots, dtype=torch.int32, device=self.device)
            routed = Routed(slots=slots, chosen=chosen, shared_rows=not down, gates=gates if down else None)
            calls.append(_expert_call(product, x, inner, out, routed))
        return Work(calls, each, 2 * slots * one.shape[0] * one.shape[1])

    def many(self, tokens: int, name: str, n: int, k: int, activations: str = "16") -> Work:
        """Many tokens as a model's prefill multiplies them, quantizing or expanding included."""
        first = pack(self.weight(name, n, k), self.half)
        x = torch.randn(tokens, k, device=self.device)

        def one() -> Call:
            product = self.product(_copy(first), activations)
            return lambda: product.many(Rows(x))

        return rotate(one, first.nbytes, 2 * tokens * n * k)

    def gemm_int8(self, tokens: int, n: int, k: int, tile: Tile | None) -> Work:
        """The W8A8 kernel by itself."""
        x = torch.randint(-127, 128, (tokens, k), dtype=torch.int8, device=self.device)
        x_scale, w_scale = (torch.full((size,), 1e-3, device=self.device) for size in (tokens, n))
        out = torch.empty(tokens, n, dtype=self.half, device=self.device)

        def one() -> Call:
            w = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=self.device)
            return lambda: matmul_int8(x, w, x_scale=x_scale, w_scale=w_scale, out=out, tile=tile)

        return rotate(one, n * k, 2 * tokens * n * k)

    def gemm_fp8(self, tokens: int, n: int, k: int, tile: Tile | None, *, native: bool = True) -> Work:
        """The block-wise FP8 kernel by itself; without ``native`` it decodes the codes."""
        kind = torch.float8_e4m3fn if native else torch.uint8
        x = torch.randint(0, 120, (tokens, k), dtype=torch.uint8, device=self.device).view(kind)
        x_scale, w_scale = (torch.full((size, k // 128), 1e-3, device=self.device) for size in (tokens, -(-n // 128)))
        out = torch.empty(tokens, n, dtype=self.half, device=self.device)

        def one() -> Call:
            w = torch.randint(0, 120, (n, k), dtype=torch.uint8, device=self.device).view(kind)
            return lambda: matmul_fp8(x, w, x_scale=x_scale, w_scale=w_scale, out=out, tile=tile)

        return rotate(one, n * k, 2 * tokens * n * k)

    def attention(self, kv: CacheType, heads: int, kv_heads: int, dim: int, length: int) -> Work:
        """One query per head over ``length`` cached positions."""
        q = self._noise(heads, padded(dim))
        there = torch.full((1,), length, dtype=torch.int64, device=self.device)
        splits = split_count(self.processors, kv_heads, length)
        partial = torch.empty(partial_shape(heads, kv_heads, dim, splits), device=self.device)
        counter = torch.zeros(kv_heads, dtype=torch.int32, device=self.device)
        out = self.space.operand("attended", 1, heads * dim)
        nbytes = 2 * length * kv_heads * sum(
            size[0] * dtype.itemsize for size, dtype in kv_format(kv).layout(dim).values()
        )  # fmt: skip

        def one() -> Call:
            stores = [KVStore(kv_format(kv), kv_heads, dim, length, self.device) for _ in range(2)]
            for store in stores:
                noise_store(store, length)
            k, v = map(side, stores)
            return lambda: decode_attention(
                q, k=k, v=v, dim=dim, length=there, window=0, splits=splits, partial=partial, counter=counter,
                out=out.x, sums=out.sums if dim % 32 == 0 else None,
            )  # fmt: skip

        return rotate(one, nbytes)


def _expert_call(product: Product, x: Operand, inner: Operand, out: Tensor, routed: Routed) -> Call:
    if routed.gates is not None:
        return lambda: product.few(x, out, epilogue="residual", residual=out, routed=routed, tokens=1)
    return lambda: product.few(x, inner.x, epilogue="silu", out_sums=inner.sums, routed=routed)


def _copy(packed: Packed) -> Packed:
    """The same weight in memory of its own."""
    return packed.holding({name: tensor.clone() for name, tensor in packed.tensors().items()})


def card() -> Bench:
    """The GPU in this machine, with program shapes as they are without tuning."""
    cuda: Any = torch.cuda
    properties: Any = cuda.get_device_properties(0)
    return Bench(torch.device("cuda"), torch.bfloat16, properties.multi_processor_count)


def tuned() -> tuple[Bench, Callable[[], None]]:
    """The same with the backend's own program shapes, and what finds them for the weights met so far."""
    from qrun.backends import pick

    backend: Any = pick("cuda")
    tuner = backend.tuner
    return Bench(backend.device, torch.bfloat16, backend.card.processors, tuner.config, tuner.register), backend.prepare
