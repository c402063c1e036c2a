"""The operations a decoder is built from, in plain torch; each device overrides only what it makes faster.

Everything is bound once, at load: a method takes weights and returns the callable that a step runs. A backend knows
formats and kernels; it does not know models, tokens or files. One instance serves one loaded model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from qrun.cache import KVCache, LayerCache
from qrun.formats import PermutedFormat, PlainFormat, QTensor
from qrun.kernels import reference

TILE = 1 << 22  # weights expanded at a time where no kernel reads the codes themselves

BOUNDS = {"32": 2e-5, "16": 4e-3, "int8": 2e-2, "fp8": 5e-2}
"""Relative errors of a product that are right, by its activations, as follows from the arithmetic.

Devices multiply in BF16: rounding x, the expanded weight and the result gives each a relative error of
2^-9/sqrt(3) = 1.1e-3, together 2e-3; twice that is allowed. Eight-bit activations are compared with unrounded ones:
int8 with one scale per token (largest of 3.5 deviations, 127 steps) errs by 8e-3, e4m3 with its three bits of mantissa
by 2.6e-2.
"""


@dataclass(frozen=True)
class Binding:
    """Which kernel an operation on a scheme runs on; a fallback is one that expands the weights first."""

    op: str
    scheme: str
    kernel: str
    fallback: bool


@dataclass(frozen=True)
class Trial:
    """What trying a kernel on this device came to: its relative error, and in a line why it is not used, if so."""

    op: str
    tier: str
    kernel: str
    error: float | None
    reason: str = ""

    @property
    def passed(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class Step:
    """Where the tokens of one forward stand: positions start … start+S-1, and their rotation angles [S, D/2].

    positions [S] and length [1], start + S, are on the device. A step that is recorded and replayed at other positions
    reads them alone: then ``start`` is of the recording, and ``limit`` is what no replay's length exceeds.
    """

    start: int
    positions: Tensor
    cos: Tensor
    sin: Tensor
    length: Tensor
    limit: int


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    window: int | None = None
    activations: str = "16"


@dataclass(frozen=True, kw_only=True)
class AttentionWeights:
    """norm [H]; qkv [(heads + 2·kv_heads)·D, H], rows q, k, v; o [H, heads·D]; q_norm and k_norm [D] or none."""

    norm: Tensor
    qkv: QTensor
    o: QTensor
    qkv_bias: Tensor | None = None
    o_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class FfnWeights:
    """norm [H]; gate_up [2I, H], gate rows first; down [H, I]."""

    norm: Tensor
    gate_up: QTensor
    down: QTensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class MoESpec:
    top_k: int
    normalise: bool
    norm_min: float


@dataclass(frozen=True, kw_only=True)
class MoEWeights:
    """norm [H]; router [E, H], correction [E] in float32; gate_up [E, 2I, H]; down [E, H, I]; shared ones or none."""

    norm: Tensor
    router: Tensor
    gate_up: QTensor
    down: QTensor
    correction: Tensor | None = None
    shared_gate_up: QTensor | None = None
    shared_down: QTensor | None = None
    shared_gate_up_bias: Tensor | None = None
    shared_down_bias: Tensor | None = None


class Linear(Protocol):
    """x [S, K] -> [S, N]."""

    def __call__(self, x: Tensor, /) -> Tensor: ...


class Attend(Protocol):
    """An attention block: x -> x + o(attention(rope(qkv(norm(x))))), writing a layer's cache on the way."""

    def __call__(self, x: Tensor, cache: LayerCache, step: Step, /) -> Tensor:
        """x [S, H], consecutive tokens of one conversation."""
        ...

    def abreast(self, x: Tensor, caches: Sequence[LayerCache], steps: Sequence[Step], /) -> Tensor:
        """x [B, H], the next token of each of B conversations, whose caches and steps (of one position) these are."""
        ...


Feed = Callable[[Tensor], Tensor]
Binder = Callable[[QTensor, Tensor | None, str], tuple[Linear, str]]


class PlainAttention:
    """An `Attend` of single operations, a conversation after the other."""

    def __init__(self, spec: AttentionSpec, weights: AttentionWeights, qkv: Linear, o: Linear) -> None:
        self._spec, self._weights = spec, weights
        self._qkv, self._o = qkv, o

    def __call__(self, x: Tensor, cache: LayerCache, step: Step) -> Tensor:
        return x + self._o(self._attend(self._mixed(x), cache, step))

    def abreast(self, x: Tensor, caches: Sequence[LayerCache], steps: Sequence[Step]) -> Tensor:
        rows = torch.split(self._mixed(x), 1)
        return x + self._o(torch.cat([self._attend(*each) for each in zip(rows, caches, steps, strict=True)]))

    def _mixed(self, x: Tensor) -> Tensor:
        """Rows q, k, v of every head, [S, heads + 2·kv_heads, D]."""
        mixed = self._qkv(reference.rms_norm(x, self._weights.norm, self._spec.eps))
        return mixed.view(x.shape[0], -1, self._spec.head_dim)

    def _attend(self, mixed: Tensor, cache: LayerCache, step: Step) -> Tensor:
        spec, weights = self._spec, self._weights
        q, k, v = torch.split(mixed, [spec.heads, spec.kv_heads, spec.kv_heads], 1)
        if weights.q_norm is not None and weights.k_norm is not None:
            q = reference.rms_norm(q, weights.q_norm, spec.eps)
            k = reference.rms_norm(k, weights.k_norm, spec.eps)
        cache.write(step.positions, reference.rope(k, step.cos, step.sin), v)
        q = reference.rope(q, step.cos, step.sin)
        return reference.attend(q, cache.read, step.start, window=spec.window).flatten(1)


class Backend:
    """Plain torch on any device. ``progress`` is told, in words, of anything that takes over a second at load."""

    name = "torch"
    chunk = 512
    """Prompt tokens a forward."""
    runs_ahead = False
    """Whether a step returns before it is done, so that the next one may begin before its token is looked at."""

    def __init__(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.dtype = dtype
        self.progress: Callable[[str], None] = progress or (lambda what: None)
        self.bindings: list[Binding] = []
        self.remarks: list[str] = []
        """What its user should know of how it runs, once a cache is there."""

    @property
    def description(self) -> str:
        """The device in words, for the run card."""
        return str(self.device)

    @property
    def binders(self) -> Mapping[str, Binder]:
        """Format family -> what binds its linear; a family that is missing here is expanded tile by tile."""
        return {}

    @property
    def trials(self) -> Sequence[Trial]:
        """What was tried before it was bound, on devices whose kernels differ from driver to driver."""
        return ()

    def note(self, op: str, scheme: object, kernel: str, *, fallback: bool = False) -> None:
        """Record a binding, once per kind."""
        binding = Binding(op, str(scheme), kernel, fallback)
        if binding not in self.bindings:
            self.bindings.append(binding)

    def linear(
        self, weight: QTensor, bias: Tensor | None = None, *, activations: str = "16", op: str = "linear"
    ) -> Linear:
        """Bind x [S, K] -> x @ weightᵀ + bias [S, N] for a weight [N, K]."""
        if isinstance(weight.format, PermutedFormat):
            return self._permuted(weight.format, weight, bias, activations=activations, op=op)
        binder = self.binders.get(weight.format.family)
        if binder is None:
            call, kernel = self.expanding(weight, bias, activations)
            self.note(op, weight.format, kernel, fallback=not isinstance(weight.format, PlainFormat))
        else:
            call, kernel = binder(weight, bias, activations)
            self.note(op, weight.format, kernel)
        return call

    def _permuted(
        self, form: PermutedFormat, weight: QTensor, bias: Tensor | None, *, activations: str, op: str
    ) -> Linear:
        """Activations in the order of the columns, then the linear of the inner format."""
        assert weight.order is not None, "a permuted weight has an order"
        order = weight.order.view(-1).long()
        inner = self.linear(form.unordered(weight), bias, activations=activations, op=op)
        return lambda x: inner(x.index_select(-1, order))

    def expanding(self, weight: QTensor, bias: Tensor | None, activations: str) -> tuple[Linear, str]:
        """The linear that is right for every format: dequantize some rows, multiply, next rows."""
        rows, columns = weight.shape
        plain = isinstance(weight.format, PlainFormat) and weight.codes.dtype == self.dtype
        step = rows if plain else max(1, TILE // columns)
        bias = None if bias is None else bias.to(self.dtype)

        def call(x: Tensor) -> Tensor:
            x = reference.round_activations(x, activations)
            if step >= rows:
                return F.linear(x, weight.dequantize(self.dtype), bias)
            out = torch.empty((*x.shape[:-1], rows), dtype=x.dtype, device=x.device)
            for a in range(0, rows, step):
                part = weight.rows(torch.arange(a, min(a + step, rows), device=x.device)).to(self.dtype)
                out[..., a : a + step] = F.linear(x, part, None if bias is None else bias[a : a + step])
            return out

        return call, "torch expand + matmul"

    def embedding(self, table: QTensor) -> Callable[[Tensor], Tensor]:
        """Bind ids [S] -> rows of the table [V, H], only these expanded, in the activations' dtype."""
        return lambda ids: table.rows(ids).to(self.dtype)

    def attention_block(self, spec: AttentionSpec, weights: AttentionWeights) -> Attend:
        """Bind x + o(attention(rope(qkv(norm(x)))))."""
        qkv = self.linear(weights.qkv, weights.qkv_bias, activations=spec.activations, op="qkv")
        o = self.linear(weights.o, weights.o_bias, activations=spec.activations, op="o")
        self.note("attention", "any", "torch, piecewise", fallback=False)
        return PlainAttention(spec, weights, qkv, o)

    def ffn_block(self, eps: float, weights: FfnWeights, *, activations: str = "16") -> Feed:
        """Bind x [S, H] -> x + down(silu(gate) * up) of norm(x)."""
        gate_up = self.linear(weights.gate_up, weights.gate_up_bias, activations=activations, op="gate_up")
        down = self.linear(weights.down, weights.down_bias, activations=activations, op="down")
        return lambda x: x + down(reference.silu_mul(gate_up(reference.rms_norm(x, weights.norm, eps))))

    def moe_block(self, eps: float, spec: MoESpec, weights: MoEWeights, *, activations: str = "16") -> Feed:
        """Bind x [S, H] -> x + the chosen experts' weighted sum + the shared experts, all of norm(x)."""
        count = weights.router.shape[0]
        first = [self.linear(weights.gate_up[e], activations=activations, op="experts gate_up") for e in range(count)]
        second = [self.linear(weights.down[e], activations=activations, op="experts down") for e in range(count)]
        shared: Feed | None = None
        if weights.shared_gate_up is not None and weights.shared_down is not None:
            widen = self.linear(
                weights.shared_gate_up, weights.shared_gate_up_bias, activations=activations, op="shared gate_up"
            )
            narrow = self.linear(
                weights.shared_down, weights.shared_down_bias, activations=activations, op="shared down"
            )

            def both(h: Tensor) -> Tensor:
                return narrow(reference.silu_mul(widen(h)))

            shared = both

        def feed(x: Tensor) -> Tensor:
            h = reference.rms_norm(x, weights.norm, eps)
            gates, chosen = reference.route(
                h, weights.router, weights.correction, spec.top_k, normalise=spec.normalise, norm_min=spec.norm_min
            )
            out = x.clone() if shared is None else x + shared(h)
            for e in sorted({int(c) for c in chosen.flatten()}):
                token, slot = torch.where(chosen == e)
                y = second[e](reference.silu_mul(first[e](h[token])))
                out.index_add_(0, token, y * gates[token, slot, None].to(y.dtype))
            return out

        return feed

    def head(
        self, norm: Tensor, eps: float, weight: QTensor, bias: Tensor | None, *, activations: str = "16"
    ) -> Linear:
        """Bind x [S, H] -> logits [S, V] in float32."""
        project = self.linear(weight, bias, activations=activations, op="lm_head")
        return lambda x: project(reference.rms_norm(x, norm, eps)).float()

    def prepare(self) -> None:
        """Called once after everything is bound: compile or warm up what the first token would otherwise wait for."""

    def fetch(self, token: Tensor) -> Callable[[], int]:
        """What gives a token's value [1] when called, waiting for no more than what makes it."""
        return lambda: int(token)

    def warm_up(self, rehearse: Callable[[], None]) -> None:
        """Called with what runs a model from end to end, for a device that compiles kernels when they first run."""
        del rehearse

    def capture(
        self, step: Callable[[Tensor, Tensor | None, int], Tensor], cache: KVCache
    ) -> Callable[[Tensor], Tensor]:
        """A faster equal of the decode step where the device has one (a graph); here the step itself.

        ``step(token [1], position [1] or none for the cache's length, limit)`` appends a token to the cache and gives
        the next logits [1, V].
        """
        return lambda token: step(token, None, cache.length + 1)

    def chooser(
        self, vocab: int, *, temperature: float, top_k: int, top_p: float, min_p: float, seed: int
    ) -> Callable[[Tensor], Tensor] | None:
        """The device's own sampling, logits [1, V] -> token [1], or none where it has none for these settings."""
        del vocab, temperature, top_k, top_p, min_p, seed
