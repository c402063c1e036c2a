"""Intel GPUs: each operation of a model on the first kernel that is right on this card, be it aten's, IPEX's, a Triton
kernel of ours or plain torch. It binds kernels to weights; what a kernel does is its own."""

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from qrun.backends import xpu_ipex
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
    Step,
    Trial,
)
from qrun.backends.graphs import GraphStep
from qrun.backends.xpu_attention import Attention
from qrun.backends.xpu_device import XPUCard
from qrun.backends.xpu_matrix import place, places
from qrun.backends.xpu_moe import MoEBlock, stacks
from qrun.backends.xpu_native import LINEARS as NATIVE
from qrun.backends.xpu_plain import LINEARS as PLAIN
from qrun.backends.xpu_pointwise import Norm, Pointwise, norm, silu
from qrun.backends.xpu_product import Product, choose
from qrun.backends.xpu_tiers import LinearKernel, Multiply, Tier, Tiers
from qrun.backends.xpu_triton import LINEARS as TRITON
from qrun.cache import KVCache, LayerCache
from qrun.formats import QTensor

LINEARS: tuple[LinearKernel, ...] = (*NATIVE, *xpu_ipex.LINEARS, *TRITON, *PLAIN)


def runs(weight: QTensor, activations: str) -> bool:
    """Whether a weight is multiplied by what XPUBackend binds itself: not in 32 bits, and not in every format."""
    return activations != "32" and places(weight)


class XPUBackend(Backend):
    """Float32 between blocks, products in BF16 (FP16 on Arc A-series), weights and cache in their formats.

    ``first``: the tier whose kernels are tried before all others. ``graph``: record the step where all of it can be.
    """

    name = "xpu"

    def __init__(
        self,
        card: XPUCard,
        *,
        first: Tier | None = None,
        graph: bool = False,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__(card.device, torch.float32, progress)
        self.card = card
        self.tiers = Tiers(card, first=first, progress=self.progress)
        self.runs_ahead = card.real
        self._graph = graph
        self._attentions: list[Attention] = []
        self._recordable = True
        self._arrival = Arrival(self.device) if card.real else None

    @property
    def description(self) -> str:
        return self.card.description

    @property
    def trials(self) -> Sequence[Trial]:
        missing = xpu_ipex.why_not(self.card)
        ipex = [Trial("any", "ipex", "IPEX", None, missing)] if missing else []
        return [*ipex, *self.tiers.trials]

    @cached_property
    def _norm(self) -> Pointwise:
        chosen = norm(self.card, self.tiers)
        self.note("norm", "any", chosen.name)
        return chosen

    @cached_property
    def _silu(self) -> Pointwise:
        chosen = silu(self.card, self.tiers)
        self.note("silu", "any", chosen.name)
        return chosen

    def _product(self, weight: QTensor, bias: Tensor | None, activations: str, op: str) -> Product:
        placed = place(weight, self.card.half)
        kernels = choose(placed, LINEARS, self.card, self.tiers, activations)
        product = Product(placed, bias, kernels, self.card, activations)
        self.note(op, weight.format, product.kernel, fallback=product.fallback)
        return product

    def _multiply(self, weight: QTensor, bias: Tensor | None, activations: str, op: str) -> Callable[[Tensor], Tensor]:
        """x half [S, K] -> [S, N], half or float32."""
        if runs(weight, activations):
            return self._product(weight, bias, activations, op)
        call = self.linear(weight, bias, activations=activations, op=op)
        return lambda x: call(x.float())

    def linear(
        self, weight: QTensor, bias: Tensor | None = None, *, activations: str = "16", op: str = "linear"
    ) -> Linear:
        if not runs(weight, activations):
            return super().linear(weight, bias, activations=activations, op=op)
        product, half = self._product(weight, bias, activations, op), self.card.half
        return lambda x: product(x.to(half)).float()

    def attention_block(self, spec: AttentionSpec, weights: AttentionWeights) -> Attend:
        act = spec.activations
        if act == "32":
            self._recordable = False
            return super().attention_block(spec, weights)
        qkv = self._multiply(weights.qkv, weights.qkv_bias, act, "qkv")
        o = self._multiply(weights.o, weights.o_bias, act, "o")
        attention = Attention(spec, weights, self.card, self.tiers, self.note)
        self._attentions.append(attention)
        return AttentionBlock(spec, weights.norm, self._norm.call, qkv=qkv, attention=attention, o=o)

    def ffn_block(self, eps: float, weights: FfnWeights, *, activations: str = "16") -> Feed:
        if activations == "32":
            return super().ffn_block(eps, weights, activations=activations)
        inner = self._inner(weights.gate_up, weights.down, (weights.gate_up_bias, weights.down_bias), activations, "")
        norm, scale = self._norm.call, weights.norm.float().contiguous()
        return lambda x: x + inner(norm(x, scale, eps))

    def _inner(
        self, gate_up: QTensor, down: QTensor, biases: tuple[Tensor | None, Tensor | None], activations: str, of: str
    ) -> Callable[[Tensor], Tensor]:
        """h half [S, H] -> down(silu(gate) * up) [S, H]."""
        widen = self._multiply(gate_up, biases[0], activations, f"{of}gate_up")
        narrow = self._multiply(down, biases[1], activations, f"{of}down")
        silu = self._silu.call
        return lambda h: narrow(silu(widen(h)))

    def moe_block(self, eps: float, spec: MoESpec, weights: MoEWeights, *, activations: str = "16") -> Feed:
        if activations == "32" or not stacks(weights):
            self.note("experts", "any", "torch, an expert after the other", fallback=True)
            self._recordable = False
            return super().moe_block(eps, spec, weights, activations=activations)
        shared: Multiply | None = None
        if weights.shared_gate_up is not None and weights.shared_down is not None:
            biases = (weights.shared_gate_up_bias, weights.shared_down_bias)
            shared = self._inner(weights.shared_gate_up, weights.shared_down, biases, activations, "shared ")
        return MoEBlock(eps, spec, weights, self.card, self.tiers, self.note, kernels=LINEARS, shared=shared)

    def head(
        self, norm: Tensor, eps: float, weight: QTensor, bias: Tensor | None, *, activations: str = "16"
    ) -> Linear:
        if activations == "32":
            return super().head(norm, eps, weight, bias, activations=activations)
        project = self._multiply(weight, bias, activations, "lm_head")
        call, scale = self._norm.call, norm.float().contiguous()
        return lambda x: project(call(x, scale, eps)).float()

    def fetch(self, token: Tensor) -> Callable[[], int]:
        return super().fetch(token) if self._arrival is None else self._arrival(token)

    def warm_up(self, rehearse: Callable[[], None]) -> None:
        if self.card.real:
            self.progress("compiling kernels for this GPU: seconds, or minutes the first time")
            rehearse()

    def capture(
        self, step: Callable[[Tensor, Tensor | None, int], Tensor], cache: KVCache
    ) -> Callable[[Tensor], Tensor]:
        # The first to see the cache's formats: attention chooses its kernels here.
        able = [each.recordable(layer) for each, layer in zip(self._attentions, cache.layers, strict=False)]
        if not self._graph:
            return super().capture(step, cache)
        if "XPUGraph" not in dir(torch.xpu):
            self.remarks = [f"--xpu-graph has no effect: torch {torch.__version__} records no graphs on Intel GPUs"]
        elif self._recordable and all(able):
            return GraphStep(step, cache, self.device)
        else:
            self.remarks = ["--xpu-graph has no effect: a token's attention or experts do not run on Triton's kernels"]
        return super().capture(step, cache)


class AttentionBlock:
    """x float32 [S, H] -> x + o(attention(qkv(norm(x)))), an `Attend`."""

    def __init__(
        self, spec: AttentionSpec, weight: Tensor, norm: Norm, *, qkv: Multiply, attention: Attention, o: Multiply
    ) -> None:
        self._eps, self._weight, self._norm = spec.eps, weight.float().contiguous(), norm
        self._qkv, self._attention, self._o = qkv, attention, o

    def __call__(self, x: Tensor, cache: LayerCache, step: Step) -> Tensor:
        mixed = self._qkv(self._norm(x, self._weight, self._eps))
        return x + self._o(self._attention(mixed, cache, step))

    def abreast(self, x: Tensor, caches: Sequence[LayerCache], steps: Sequence[Step]) -> Tensor:
        mixed = self._qkv(self._norm(x, self._weight, self._eps))
        return x + self._o(self._attention.abreast(mixed, caches, steps))
