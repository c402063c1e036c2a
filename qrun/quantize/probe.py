"""A model in BF16 and what it makes of a text, to see how far its predictions move when some of it is rounded.

Plain torch on one device, a layer at a time: what lies before the rounded part is not run again. It knows no budgets
and writes no files.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qrun.assign import halves
from qrun.backends.base import Backend, Linear, Step
from qrun.cache import KVStore, LayerCache
from qrun.checkpoint import Checkpoint
from qrun.formats import KVFormat, PlainFormat, QTensor, kv_format
from qrun.kernels import reference
from qrun.loader import Loader, check, is_tied
from qrun.models.config import ModelConfig
from qrun.models.decoder import Layer, inverse_frequencies
from qrun.models.plan import Weight, after, before, plan
from qrun.models.plan import layer as weights_of_layer
from qrun.quantize.gptq import Hessian
from qrun.quantize.layer import LayerPass, Streams
from qrun.quantize.plan import Plan
from qrun.quantize.rounding import Rounded, Rounder, written_format
from qrun.quantize.units import Unit, modules
from qrun.recipe import BF16, ActivationType, CacheType, Recipe, WeightScheme

Progress = Callable[[str, int, int], None]
_ROWS = 128  # positions whose distributions are compared at a time


class Probe:
    """A checkpoint, held in BF16, and windows of token ids [W, S] that run through it.

    Divergences are in nats a token, from the model as it is to the rounded one. With ``fitted``, windows as long,
    layers and a head of its own are rounded by GPTQ, as what comes to them in those windows suggests; else each weight
    by itself. Raises what loading raises.
    """

    def __init__(
        self, checkpoint: Checkpoint, config: ModelConfig, windows: Tensor, *, fitted: Tensor | None = None,
        device: str = "cpu", progress: Progress | None = None,
    ) -> None:  # fmt: skip
        self.config = config
        self.tied = is_tied(config, checkpoint)
        weights = list(plan(config, tied=self.tied))
        check(config, checkpoint, weights, tied=self.tied)
        self._checkpoint = checkpoint
        self._backend = Backend(device, torch.float32 if device == "cpu" else torch.bfloat16)
        self._count = len(windows)
        self._windows = (windows if fitted is None else torch.cat([windows, fitted])).to(self._backend.device)
        loader = self._loader("16")
        self._kept: dict[str, Tensor] = {}
        self._held: dict[str, QTensor] = {}
        for done, weight in enumerate(weights):
            if progress is not None:
                progress("loading", done, len(weights))
            if weight.role == "kept":
                self._kept[weight.name] = loader.kept(weight)
            else:
                self._held[weight.name] = loader.packed(weight)
        self._step = self._positions(windows.shape[1])
        self._layers = [self._layer(i, {}) for i in range(config.layers)]
        self._head = self._head_of(self._held["embed" if self.tied else "lm_head"])
        self._before = (0, self._embedded(self._held["embed"]))  # a layer, and what comes to it of all windows
        self._final = self._from(0, self._before[1][: self._count])
        self._calibrated: tuple[object, dict[str, QTensor]] = (None, {})

    def unit(self, unit: Unit, scheme: WeightScheme) -> float:
        """The divergence when one unit is in ``scheme``; cheapest when asked layer by layer, scheme by scheme."""
        if unit.layer is not None:
            names = {weight.name for weight in unit.weights}
            whole = self._rounded_layer(unit.layer, lambda weight: scheme)
            layer = self._layer(unit.layer, {name: weight for name, weight in whole.items() if name in names})
            x = self._reach(unit.layer)[: self._count]
            return self._divergence(self._from(unit.layer + 1, self._through(layer, x)))
        if unit.kind == "lm_head" and not self.tied:
            return self._divergence(self._final, self._head_of(self._rounded_head(unit.weights[0], scheme)))
        table = self._rounded(unit.weights[0], scheme)
        head = self._head_of(table) if self.tied else None
        return self._divergence(self._from(0, self._embedded(table)[: self._count]), head)

    def plan(self, plan: Plan) -> float:
        """The divergence of everything in a plan together, its activations and its cache included."""
        (table,) = before(self.config, tied=self.tied)
        embed = self._rounded(table, plan.scheme(table))
        x = self._embedded(embed)[: self._count]
        for i in range(self.config.layers):
            layer = self._layer(i, self._rounded_layer(i, plan.scheme), plan.activations)
            x = self._through(layer, x, plan.k, plan.v)
        weight = next((weight for weight in after(self.config, tied=self.tied) if weight.role == "lm_head"), table)
        scheme = plan.scheme(weight)
        head = embed if self.tied else self._rounded_head(weight, scheme)
        return self._divergence(x, self._head_of(head, "16" if scheme == BF16 else plan.activations))

    def recipe(self, recipe: Recipe) -> float:
        """The divergence of a recipe."""
        return self.plan(Plan.uniform(self.config, recipe, tied=self.tied))

    def _loader(self, activations: ActivationType) -> Loader:
        recipe = replace(Recipe.parse(), activations=activations)
        return Loader(self._checkpoint, self.config, recipe, self._backend)

    def _positions(self, count: int) -> Step:
        device = self._backend.device
        positions = torch.arange(count, device=device)
        freq = inverse_frequencies(self.config.rope, self.config.head_dim).to(device)
        angles = positions[:, None].float() * freq
        return Step(0, positions, angles.cos(), angles.sin(), positions[-1:] + 1, count)

    def _rounded(self, weight: Weight, scheme: WeightScheme) -> QTensor:
        held, dtype = self._held[weight.name], self._backend.dtype
        if scheme == BF16:
            return held
        rounded = written_format(scheme, held.shape[-1]).quantize(held.dequantize(torch.bfloat16))
        return PlainFormat(dtype).quantize(rounded.dequantize(dtype))

    def _rounded_layer(self, i: int, schemes: Callable[[Weight], WeightScheme]) -> dict[str, QTensor]:
        """All weights of a layer that can be rounded."""
        weights = {w.name: w for w in weights_of_layer(self.config, i) if w.role != "kept"}
        if self._count == len(self._windows):
            return {name: self._rounded(weight, schemes(weight)) for name, weight in weights.items()}
        key = (i, [schemes(weight) for weight in weights.values()])
        if self._calibrated[0] != key:
            values = self._calibrated_layer(i, list(weights.values()), schemes)
            made = {name: self._assembled(weight, values) for name, weight in weights.items()}
            self._calibrated = (key, made)
        return self._calibrated[1]

    def _calibrated_layer(
        self, i: int, weights: Sequence[Weight], schemes: Callable[[Weight], WeightScheme]
    ) -> dict[str, Tensor]:
        """Module -> its values, rounded as what comes to the layer in the fitted windows suggests."""
        seen = self._reach(i)[self._count :].float().cpu()
        found: dict[str, Tensor] = {}

        def keep(module: str, rounded: Rounded) -> None:
            found[module] = rounded.values

        LayerPass(
            self._checkpoint, self.config, i, rounder=self._rounder(weights, schemes), activations="16",
            write=lambda name, tensor: None, keep=keep, folds=False,
        ).run(Streams(seen, seen.clone(), len(seen)))  # fmt: skip
        return found

    def _rounder(self, weights: Sequence[Weight], schemes: Callable[[Weight], WeightScheme]) -> Rounder:
        formats = {
            module: written_format(schemes(weight), weight.shape[-1])
            for weight in weights
            for module in modules(weight)
        }
        kind = self._checkpoint.dtype("model.embed_tokens.weight")
        return Rounder(formats, "gptq", kind if kind == torch.bfloat16 else torch.float32)

    def _assembled(self, weight: Weight, values: Mapping[str, Tensor]) -> QTensor:
        """A weight from its modules' values, rotary rows in halves."""
        parts = [
            torch.cat([halves(values[source.name.removesuffix(".weight")], source.pairs) for source in part])
            for part in weight.parts
        ]
        whole = parts[0] if len(weight.shape) == 2 else torch.stack(parts)
        return PlainFormat(self._backend.dtype).quantize(whole.to(self._backend.device))

    def _rounded_head(self, weight: Weight, scheme: WeightScheme) -> QTensor:
        if self._count == len(self._windows) or scheme == BF16:
            return self._rounded(weight, scheme)
        seen = self._reach(self.config.layers)[self._count :].float().cpu().flatten(0, 1)
        hessian = Hessian.zeros(self.config.hidden)
        hessian.add(reference.rms_norm(seen, self._kept["norm"].cpu(), self.config.eps))
        w = self._held[weight.name].dequantize().cpu()
        rounded = self._rounder([weight], lambda weight: scheme).round({"lm_head": w}, hessian)["lm_head"]
        return PlainFormat(self._backend.dtype).quantize(rounded.values.to(self._backend.device))

    def _layer(self, i: int, rounded: Mapping[str, QTensor], activations: ActivationType = "16") -> Layer:
        here = f"layers.{i}."
        kept = {name: tensor for name, tensor in self._kept.items() if name.startswith(here)}
        held = {name: tensor for name, tensor in self._held.items() if name.startswith(here)}
        return self._loader(activations).bind(i, kept, {**held, **rounded})

    def _head_of(self, weight: QTensor, activations: ActivationType = "16") -> Linear:
        bias, norm = self._kept.get("lm_head.bias"), self._kept["norm"]
        return self._backend.head(norm, self.config.eps, weight, bias, activations=activations)

    def _embedded(self, table: QTensor) -> Tensor:
        """[W, S, H] of all windows."""
        return self._backend.embedding(table)(self._windows)

    def _through(self, layer: Layer, x: Tensor, k: CacheType = "bf16", v: CacheType = "bf16") -> Tensor:
        kinds = kv_format(k), kv_format(v)
        attended = torch.stack([layer.attend(window, self._cache(*kinds), self._step) for window in x])
        return layer.feed(attended.flatten(0, 1)).view_as(x)

    def _cache(self, k: KVFormat, v: KVFormat) -> LayerCache:
        heads, dim, count = self.config.kv_heads, self.config.head_dim, self._windows.shape[1]
        return LayerCache(*(KVStore(kind, heads, dim, count, self._backend.device) for kind in (k, v)))

    def _from(self, layer: int, x: Tensor) -> Tensor:
        """Behind the last layer, what comes to ``layer`` being x."""
        for each in self._layers[layer:]:
            x = self._through(each, x)
        return x

    def _reach(self, layer: int) -> Tensor:
        """What comes to a layer."""
        at, x = self._before
        if at > layer:
            at, x = 0, self._embedded(self._held["embed"])
        for each in self._layers[at:layer]:
            x = self._through(each, x)
        self._before = (layer, x)
        return x

    def _divergence(self, x: Tensor, head: Linear | None = None) -> float:
        """From what the model predicts behind its last layer to what ``head`` does from x."""
        total, count = 0.0, x.shape[0] * x.shape[1]
        ours, theirs = self._final.flatten(0, 1), x.flatten(0, 1)
        for a in range(0, count, _ROWS):
            p = torch.log_softmax(self._head(ours[a : a + _ROWS]), -1)
            q = torch.log_softmax((head or self._head)(theirs[a : a + _ROWS]), -1)
            total += float((p.exp() * (p - q)).sum(-1).clamp_min(0).sum())
        return total / count
