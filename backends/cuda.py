"""NVIDIA GPUs: each block of a model is a few launches of Triton kernels that read the quantized weights and cache in
place, the whole step one CUDA graph. It binds kernels to weights; what a launch does is theirs."""

from collections.abc import Callable

import torch
from torch import Tensor

from qrun.backends.arrival import Arrival
from qrun.backends.base import (
    Attend,
    AttentionSpec,
    AttentionWeights,
    Backend,
    Feed,
    FfnWeights,
    Linear,
    MoESpec,
    MoEWeights,
)
from qrun.backends.cuda_blocks import AttentionBlock, FfnBlock, Head
from qrun.backends.cuda_device import Card
from qrun.backends.cuda_matrix import gather_rows, pack, pack_stack, packs
from qrun.backends.cuda_moe import MoEBlock, with_shared
from qrun.backends.cuda_product import Link, Product, Rows
from qrun.backends.cuda_space import Space
from qrun.backends.cuda_tuning import Tuner
from qrun.backends.graphs import GraphStep
from qrun.cache import KVCache
from qrun.formats import Fp8Format, QTensor
from qrun.kernels.gpu_gemv import MOST
from qrun.kernels.gpu_packed import Packed
from qrun.kernels.gpu_sample import DeviceChoice, handles


def runs(weight: QTensor, activations: str, *, paired: bool = False) -> bool:
    """Whether the kernels multiply the weight, by activations of this type: not in 32 bits."""
    return activations != "32" and packs(weight, paired=paired)


class CUDABackend(Backend):
    """Float32 between blocks, products in BF16 with float32 sums; weights and cache in their formats."""

    name = "cuda"
    chunk = 2048
    runs_ahead = True

    def __init__(self, card: Card, *, progress: Callable[[str], None] | None = None) -> None:
        super().__init__(card.device, torch.float32, progress)
        self.card = card
        self.space = Space(self.device, card.half)
        self.tuner = Tuner(card, self.progress)
        self._link = Link(self.space)
        self._table: tuple[QTensor, Packed] | None = None
        self._recordable = card.captures
        self._arrival = Arrival(self.device) if card.captures else None

    @property
    def description(self) -> str:
        return self.card.description

    def _product(
        self, weight: Packed, scheme: object, op: str, *, bias: Tensor | None = None, activations: str = "16"
    ) -> Product:
        made = Product(weight, bias, activations, self.space, self.tuner.config, native=self.card.has_fp8)
        self.note(op, scheme, made.kernel)
        self.tuner.register(weight)
        return made

    def _bound(
        self, weight: QTensor, bias: Tensor | None, activations: str, op: str, *, paired: bool = False
    ) -> Product:
        """The weight on kernels, which its format has."""
        packed = pack(weight, self.card.half, paired=paired)
        return self._product(packed, weight.format, op, bias=bias, activations=activations)

    def _fall_back(self, op: str) -> None:
        """A block that runs in plain torch: slower, and not the same launches at every position."""
        self.note(op, "any", "torch", fallback=True)
        self._recordable = False

    def _next(self) -> tuple[Link, Link]:
        """What the block before has left, and what this one will leave."""
        before, self._link = self._link, Link(self.space)
        return before, self._link

    def linear(
        self, weight: QTensor, bias: Tensor | None = None, *, activations: str = "16", op: str = "linear"
    ) -> Linear:
        if not runs(weight, activations):
            return super().linear(weight, bias, activations=activations, op=op)
        product = self._bound(weight, bias, activations, op)

        def call(x: Tensor) -> Tensor:
            if x.shape[0] > MOST:
                return product.many(Rows(x)).float()
            return product.few(product.operand(x), torch.empty(x.shape[0], product.weight.n, device=x.device))

        return call

    def embedding(self, table: QTensor) -> Callable[[Tensor], Tensor]:
        if not packs(table) or isinstance(table.format, Fp8Format):
            return super().embedding(table)
        packed = pack(table, self.card.half)
        self._table = (table, packed)  # a tied head is the same weight
        return lambda ids: gather_rows(packed, ids)

    def attention_block(self, spec: AttentionSpec, weights: AttentionWeights) -> Attend:
        act = spec.activations
        if spec.head_dim > 256 or not runs(weights.qkv, act) or not runs(weights.o, act):
            self._fall_back("attention")
            return super().attention_block(spec, weights)
        qkv = self._bound(weights.qkv, weights.qkv_bias, act, "qkv")
        o = self._bound(weights.o, weights.o_bias, act, "o")
        self.note("attention", "any", "triton, quantized cache in place")
        before, after = self._next()
        return AttentionBlock(
            spec, weights, (qkv, o), self.space, before=before, after=after, processors=self.card.processors
        )

    def ffn_block(self, eps: float, weights: FfnWeights, *, activations: str = "16") -> Feed:
        if not runs(weights.gate_up, activations, paired=True) or not runs(weights.down, activations):
            self._fall_back("ffn")
            return super().ffn_block(eps, weights, activations=activations)
        gate_up = self._bound(weights.gate_up, weights.gate_up_bias, activations, "gate_up", paired=True)
        down = self._bound(weights.down, weights.down_bias, activations, "down")
        before, after = self._next()
        return FfnBlock(eps, weights.norm, (gate_up, down), self.space, before=before, after=after)

    def moe_block(self, eps: float, spec: MoESpec, weights: MoEWeights, *, activations: str = "16") -> Feed:
        experts = weights.gate_up.shape[0]
        first, second = with_shared(weights) or (
            [weights.gate_up[e] for e in range(experts)],
            [weights.down[e] for e in range(experts)],
        )
        folded = len(first) - experts
        # A shared MLP that is not in the stacks is a block beside them.
        up, narrow = (None, None) if folded else (weights.shared_gate_up, weights.shared_down)
        needed = [(first[0], True), (second[0], False), (up, True), (narrow, False)]
        if not all(weight is None or runs(weight, activations, paired=paired) for weight, paired in needed):
            self._fall_back("experts")
            return super().moe_block(eps, spec, weights, activations=activations)
        half = self.card.half
        gate_up = self._product(pack_stack(first, half, paired=True), weights.gate_up.format, "experts gate_up")
        down = self._product(pack_stack(second, half), weights.down.format, "experts down")
        before, after = self._next()
        beside: Feed | None = None
        if up is not None and narrow is not None:
            shared = (
                self._bound(up, weights.shared_gate_up_bias, activations, "shared gate_up", paired=True),
                self._bound(narrow, weights.shared_down_bias, activations, "shared down"),
            )
            beside = FfnBlock(eps, weights.norm, shared, self.space, before=before, after=Link(self.space))
        return MoEBlock(
            eps, spec, weights, (gate_up, down), self.space, folded=folded, beside=beside, before=before, after=after
        )

    def head(
        self, norm: Tensor, eps: float, weight: QTensor, bias: Tensor | None, *, activations: str = "16"
    ) -> Linear:
        table, self._table = self._table, None
        if not runs(weight, activations):
            return super().head(norm, eps, weight, bias, activations=activations)
        packed = table[1] if table is not None and table[0] is weight else pack(weight, self.card.half)
        product = self._product(packed, weight.format, "lm_head", bias=bias, activations=activations)
        return Head(eps, norm, product, before=self._next()[0])

    def chooser(
        self, vocab: int, *, temperature: float, top_k: int, top_p: float, min_p: float, seed: int
    ) -> Callable[[Tensor], Tensor] | None:
        if not handles(temperature, top_k):
            return None
        return DeviceChoice(
            vocab, self.device, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed
        )

    def prepare(self) -> None:
        self.tuner.tune()

    def fetch(self, token: Tensor) -> Callable[[], int]:
        return super().fetch(token) if self._arrival is None else self._arrival(token)

    def warm_up(self, rehearse: Callable[[], None]) -> None:
        if self.card.captures:
            self.progress("compiling kernels for this GPU: seconds, or a minute the first time")
            rehearse()

    def capture(
        self, step: Callable[[Tensor, Tensor | None, int], Tensor], cache: KVCache
    ) -> Callable[[Tensor], Tensor]:
        if not self._recordable:
            return super().capture(step, cache)
        return GraphStep(step, cache, self.device)
