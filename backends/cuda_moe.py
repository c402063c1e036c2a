"""Mixture-of-experts blocks on a GPU: one token by its experts' indices in three launches, more sorted by expert.

Shared experts are experts that every token uses: they stand behind the others in the stacks, with gates of one.
"""

from dataclasses import replace

import torch
from torch import Tensor

from qrun.backends.base import Feed, MoESpec, MoEWeights
from qrun.backends.cuda_product import Link, Product
from qrun.backends.cuda_space import Space
from qrun.backends.sorted_slots import sorted_slots
from qrun.formats import AffineFormat, CodebookFormat, Fp8Format, QTensor
from qrun.kernels import gpu_norm, reference
from qrun.kernels.gpu_gemv import Operand, Routed, columns_for
from qrun.kernels.gpu_router import route


class MoEBlock:
    """x [M, H] -> x + the chosen experts' weighted sum + the shared experts, all of norm(x)."""

    def __init__(
        self, eps: float, spec: MoESpec, weights: MoEWeights, products: tuple[Product, Product], space: Space, *,
        folded: int, beside: Feed | None, before: Link, after: Link,
    ) -> None:  # fmt: skip
        """``folded`` shared experts are in the stacks; ``beside``, or none, is x -> x + what others make of norm(x)."""
        self._eps, self._spec = eps, spec
        self._norm = weights.norm.float().contiguous()
        self._router = weights.router.float().contiguous()
        self._correction = None if weights.correction is None else weights.correction.float().contiguous()
        self._gate_up, self._down = products
        self._space, self._folded, self._beside = space, folded, beside
        self._before, self._after = before, after
        self._slots = spec.top_k + folded
        before.norm = self._norm

    def __call__(self, x: Tensor) -> Tensor:
        return self._one(x) if x.shape[0] == 1 else self._many(x)

    def _one(self, x: Tensor) -> Tensor:
        space, spec = self._space, self._spec
        experts, slots = self._router.shape[0], self._slots
        gates, chosen = space.floats("gates", 1, slots), space.integers("chosen", slots)
        route(
            x, self._norm, self._eps, self._router, self._correction, top_k=spec.top_k, shared=self._folded,
            normalise=spec.normalise, norm_min=spec.norm_min, logits=space.floats("router", 1, experts),
            counter=space.integers("router", 1), gates=gates, chosen=chosen[None],
        )  # fmt: skip
        inner = space.operand("inner slots", slots, self._down.weight.k)
        normed = self._before.operand(x, self._norm)
        routed = Routed(slots=slots, chosen=chosen, shared_rows=True)
        self._gate_up.few(normed, inner.x, epilogue="silu", eps=self._eps, out_sums=inner.sums, routed=routed)
        out = space.floats("after ffn", 1, x.shape[1])
        x = x if self._beside is None else self._beside(x)
        routed = replace(routed, shared_rows=False, gates=gates[0])
        return self._down.few(inner, out, epilogue="residual", residual=x, link=self._after, routed=routed, tokens=1)

    def _many(self, x: Tensor) -> Tensor:
        spec, tokens, slots = self._spec, x.shape[0], self._slots
        h = torch.empty(tokens, self._gate_up.weight.width, dtype=self._space.half, device=x.device)
        sums = torch.empty(tokens, h.shape[1] // 32, device=x.device)
        exact = reference.rms_norm(x, self._norm, self._eps)
        gpu_norm.prepare(exact, None, xw=h, sums=sums)
        gates, chosen = reference.route(
            exact, self._router, self._correction, spec.top_k, normalise=spec.normalise, norm_min=spec.norm_min
        )
        if self._folded:
            shared = torch.arange(self._folded, device=x.device) + self._router.shape[0]
            chosen = torch.cat((chosen, shared.expand(tokens, -1)), 1)
            gates = torch.cat((gates, gates.new_ones(tokens, self._folded)), 1)
        per_expert = -(-tokens * slots // self._gate_up.weight.experts)
        columns = columns_for(self._gate_up.weight, per_expert)
        order, owners = sorted_slots(chosen, self._gate_up.weight.experts, columns)
        routed = Routed(slots=slots, chosen=owners, shared_rows=True, order=order)
        wide = self._down.weight.width
        inner = Operand(
            x=torch.zeros(tokens * slots, wide, dtype=self._space.half, device=x.device),
            sums=torch.zeros(tokens * slots, wide // 32, device=x.device),
            width=self._down.weight.k,
        )
        self._gate_up.few(
            Operand(x=h, sums=sums, width=x.shape[1]), inner.x, epilogue="silu", out_sums=inner.sums, routed=routed
        )
        each = torch.empty(tokens * slots, x.shape[1], device=x.device)
        self._down.few(inner, each, routed=replace(routed, shared_rows=False))
        out = x if self._beside is None else self._beside(x)
        return out + (each.view(tokens, slots, -1) * gates[..., None]).sum(1)


def with_shared(weights: MoEWeights) -> tuple[list[QTensor], list[QTensor]] | None:
    """The experts' gate_up and down, the shared ones behind them; none where the shared MLP is not a sum of experts.

    It is one if it has their formats, no bias, and a width of so many experts: each is some of its gate and up rows
    and down's columns, to the very codes where groups and blocks end with them.
    """
    first = [weights.gate_up[e] for e in range(weights.gate_up.shape[0])]
    second = [weights.down[e] for e in range(weights.down.shape[0])]
    up, down = weights.shared_gate_up, weights.shared_down
    if up is None or down is None:
        return first, second
    width, whole = second[0].shape[-1], down.shape[-1]
    alike = up.format == first[0].format and down.format == second[0].format
    if not alike or weights.shared_gate_up_bias is not None or weights.shared_down_bias is not None or whole % width:
        return None
    if isinstance(down.format, Fp8Format) and width % 128:
        return None
    if isinstance(down.format, AffineFormat | CodebookFormat) and down.format.padded(width) != width:
        return None
    for e in range(whole // width):
        first.append(_rows(up, e * width, whole + e * width, width))
        second.append(_columns(down, e, whole // width))
    return first, second


def _rows(weight: QTensor, a: int, b: int, count: int) -> QTensor:
    """Rows a … a+count-1 and b … b+count-1 of a weight [N, K]."""
    parts: dict[str, Tensor] = {}
    for name, tensor in weight.tensors().items():
        per = -(-weight.shape[0] // tensor.shape[0])  # rows of the weight that one of this tensor serves
        cut = [tensor[start // per : (start + count) // per] for start in (a, b)]
        parts[name] = tensor if tensor.shape[0] == 1 else torch.cat(cut)
    return replace(weight, shape=(2 * count, weight.shape[1]), **parts)


def _columns(weight: QTensor, piece: int, pieces: int) -> QTensor:
    """One of the equal pieces of the columns of a weight [N, K]."""
    parts = {
        name: tensor if tensor.shape[1] == 1 else tensor.chunk(pieces, 1)[piece].contiguous()
        for name, tensor in weight.tensors().items()
    }
    return replace(weight, shape=(weight.shape[0], weight.shape[1] // pieces), **parts)
