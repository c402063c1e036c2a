"""One layer: its calibration inputs run through it, weight after weight rounded on the way, and written as they come.

Two streams of activations pass: the reference through the weights as they were, and the current one through the
rounded weights, so that each weight sees what it will see in use. Never more than one matrix's group (q, k and v; gate
and up of one expert; …) is held beside the streams. Knows neither where the tensors go nor what was done before.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from qrun.checkpoint import Checkpoint
from qrun.errors import CheckpointError
from qrun.formats import Format, PlainFormat
from qrun.kernels import reference
from qrun.models.config import ModelConfig, MoE
from qrun.models.plan import Source
from qrun.models.plan import layer as layer_plan
from qrun.quantize.fold import SAMPLE, best_scale
from qrun.quantize.forward import Chosen, Norms, attend, normed, routes
from qrun.quantize.gptq import Hessian
from qrun.quantize.rounding import ModuleReport, Rounded, Rounder

TOKENS = 2048
"""Tokens that run through a matrix at a time."""
FP8_MAX = 448.0

Emit = Callable[[str, Tensor], None]
"""Takes one finished tensor by its name on disk."""


@dataclass
class Streams:
    """The inputs of the next layer, float32 [windows, S, H] each. Hessians see the first ``train`` windows only."""

    reference: Tensor
    current: Tensor
    train: int

    def error(self) -> float:
        """|current − reference| / |reference| over the windows that no Hessian saw."""
        kept = self.reference[self.train :]
        off = self.current[self.train :] - kept
        return float((off.square().sum() / kept.square().sum()).sqrt())


@dataclass
class LayerReport:
    """What became of a layer's weights, and how far its outputs are from the reference's by then."""

    layer: int
    modules: list[ModuleReport] = field(default_factory=list[ModuleReport])
    stream_error: float | None = None


class LayerPass:
    """Layer ``index`` of a checkpoint. ``write`` is given every finished tensor, ``keep`` every rounded weight."""

    def __init__(
        self, checkpoint: Checkpoint, config: ModelConfig, index: int, *, rounder: Rounder, activations: str,
        write: Emit, keep: Callable[[str, Rounded], None], folds: bool, kv_scales: bool = False,
    ) -> None:  # fmt: skip
        self.config = config
        self.rounder = rounder
        self.activations = activations
        self.report = LayerReport(index)
        self._checkpoint = checkpoint
        self._index = index
        self._write = write
        self._keep = keep
        self._folds = folds
        self._kv_scales = kv_scales
        self._disk = f"model.layers.{index}."
        self._sources: dict[str, Source] = {
            source.name.removeprefix(self._disk): source
            for weight in layer_plan(config, index)
            for part in weight.parts
            for source in part
        }

    def without_data(self) -> LayerReport:
        """Round every weight by itself."""
        for name in self._sources:
            module = name.removesuffix(".weight")
            if not isinstance(self.rounder.formats.get(self._disk + module, PlainFormat()), PlainFormat):
                self._round({module: self._read(name)}, None)
            else:
                self._write(self._disk + name, self._raw(name))
        return self.report

    def run(self, streams: Streams) -> LayerReport:
        """Round every weight by what reaches it, and move both streams behind the layer."""
        self._attention(streams)
        self._feed(streams)
        self.report.stream_error = streams.error()
        return self.report

    def _raw(self, name: str) -> Tensor:
        source = self._sources[name]
        return self._checkpoint.weight(source.name, source.shape)

    def _read(self, name: str) -> Tensor:
        tensor = self._raw(name).float()
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{self._disk}{name} holds NaN or infinity: the checkpoint is damaged")
        return tensor

    def _has(self, name: str) -> bool:
        return name in self._sources

    def _scaled(self, name: str, scale: Tensor | None) -> Tensor | None:
        """A vector, divided by ``scale`` along its first dimension, written and returned; none if there is none."""
        if not self._has(name):
            return None
        tensor = self._raw(name)
        if scale is not None:
            tensor = (tensor.float() / scale.view(-1, *[1] * (tensor.ndim - 1))).to(tensor.dtype)
        self._write(self._disk + name, tensor)
        return tensor.float()

    def _vector(self, name: str) -> Tensor | None:
        return self._scaled(name, None)

    def _round(self, weights: Mapping[str, Tensor], hessian: Hessian | None) -> list[Tensor]:
        """Round weights by their names in this layer; their values in the same order."""
        rounded = self.rounder.round({self._disk + name: w for name, w in weights.items()}, hessian)
        for module, each in rounded.items():
            self._keep(module, each)
            if each.stored is not None:
                self.report.modules.append(each.report)
        return [each.values for each in rounded.values()]

    def _best(
        self, x: Tensor, weights: Mapping[str, Tensor], *, exact: bool, repeat: int = 1, parts: int = 1
    ) -> Tensor | None:
        if not self._folds:
            return None
        pairs = [(w, self._format(name)) for name, w in weights.items()]
        exact = exact or any(isinstance(form, PlainFormat) for _, form in pairs)
        return best_scale(_sample(x), pairs, self.activations, exact=exact, repeat=repeat, parts=parts)

    def _format(self, name: str) -> Format:
        return self.rounder.formats[self._disk + name]

    def _divided(self, name: str, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """A norm divided by ``scale``, written and returned, and the scale that this was in its own precision."""
        whole = self._read(name)
        norm = self._scaled(name, scale)
        assert norm is not None, "every layer has its norms"
        return norm, None if scale is None else torch.where(norm != 0, whole / norm, 1.0)

    def _matmul(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(reference.round_activations(x, self.activations), w, bias)

    # attention

    def _attention(self, streams: Streams) -> None:
        config, attn = self.config, "self_attn."
        names = [f"{attn}{n}_proj" for n in "qkv"]
        weights = {name: self._read(name + ".weight") for name in names}
        o_name = attn + "o_proj"
        o = self._read(o_name + ".weight")
        norm = self._read("input_layernorm.weight")
        qk = (self._vector(attn + "q_norm.weight"), self._vector(attn + "k_norm.weight"))
        biases = [self._read(name + ".bias") if self._has(name + ".bias") else None for name in names]
        whole, bias = torch.cat(list(weights.values())), _joined(biases)
        o_bias = self._vector(o_name + ".bias")

        inner, _ = self._mix(normed(streams.current[0], norm, config.eps), whole, bias, qk)
        samples = [inner]
        for window in streams.current[1 : min(4, streams.train)]:
            samples.append(self._mix(normed(window, norm, config.eps), whole, bias, qk)[0])
        scale = self._best(
            torch.cat(samples), {o_name: o}, repeat=config.heads // config.kv_heads, parts=config.kv_heads,
            exact=biases[2] is not None or isinstance(self._format(names[2]), PlainFormat),
        )  # fmt: skip
        if scale is not None:  # the values of a head are shared by all its queries
            shared = scale.view(config.kv_heads, -1, config.head_dim)[:, 0].reshape(-1)
            weights[names[2]] = weights[names[2]] / shared[:, None]
            biases[2] = None if biases[2] is None else biases[2] / shared
        sample = normed(streams.current[: streams.train], norm, config.eps).flatten(0, 1)
        first = self._best(sample, weights, exact=False)
        del sample
        for window in streams.reference:
            window += F.linear(self._mix(normed(window, norm, config.eps), whole, bias, qk)[0], o, o_bias)
        for name, each in zip(names, biases, strict=True):
            if each is not None:
                self._write(f"{self._disk}{name}.bias", each.to(self._raw(name + ".bias").dtype))
        norm, first = self._divided("input_layernorm.weight", first)
        if first is not None:
            weights = {name: w * first for name, w in weights.items()}
        if scale is not None:
            o = o * scale

        hessian = Hessian.zeros(config.hidden)
        for window in streams.current[: streams.train]:
            hessian.add(normed(window, norm, config.eps))
        values, bias = torch.cat(self._round(weights, hessian)), _joined(biases)
        del weights, whole, hessian
        hessian = Hessian.zeros(o.shape[1])
        mixed: list[Tensor] = []
        peaks = torch.zeros(2)
        for i, window in enumerate(streams.current):
            inner, peak = self._mix(normed(window, norm, config.eps), values, bias, qk, rounds=True)
            mixed.append(inner)
            if i < streams.train:
                hessian.add(inner)
                peaks = torch.maximum(peaks, peak)
        if self._kv_scales:
            for n, peak in zip("kv", peaks, strict=True):
                self._write(f"{self._disk}{attn}{n}_scale", (peak / FP8_MAX).clamp_min(1e-12).view(1))
        (o,) = self._round({o_name: o}, hessian)
        for window, inner in zip(streams.current, mixed, strict=True):
            window += self._matmul(inner, o, o_bias)

    def _mix(
        self, h: Tensor, qkv: Tensor, bias: Tensor | None, norms: Norms, *, rounds: bool = False
    ) -> tuple[Tensor, Tensor]:
        """`attend` of one window h [S, H], by q, k and v in one matrix."""
        mixed = self._matmul(h, qkv, bias) if rounds else F.linear(h, qkv, bias)
        return attend(self.config, mixed, norms)

    # feed forward

    def _feed(self, streams: Streams) -> None:
        config = self.config
        norm_name = "post_attention_layernorm.weight"
        norm = self._read(norm_name)
        inner = normed(streams.reference, norm, config.eps).flatten(0, 1)
        sample = normed(streams.current[: streams.train], norm, config.eps).flatten(0, 1)
        seen = streams.train * streams.current.shape[1]
        moe = config.moe if config.is_sparse(self._index) else None
        # A router stays in its precision.
        scale = self._best(sample, self._readers(sample, moe), exact=moe is not None) if self._folds else None
        del sample
        norm, scale = self._divided(norm_name, scale)
        h = normed(streams.current, norm, config.eps).flatten(0, 1)
        out, before = streams.current.flatten(0, 1), streams.reference.flatten(0, 1)
        everyone = Chosen(torch.arange(len(h)))

        def block(prefix: str, mine: Chosen, theirs: Chosen) -> None:
            self._block(prefix, scale, seen=seen, h=h, mine=mine, out=out, inner=inner, theirs=theirs, before=before)

        if moe is None:
            block("mlp.", everyone, everyone)
            return
        router = self._read("mlp.gate.weight")
        folded = router if scale is None else router * scale
        self._write(self._disk + "mlp.gate.weight", folded.to(self._raw("mlp.gate.weight").dtype))
        correction = self._vector("mlp.moe_statics.e_score_correction_bias")
        correction = None if correction is None else correction.view(-1)
        mine, theirs = routes(h, folded, correction, moe), routes(inner, router, correction, moe)
        for e in range(moe.experts):
            block(f"mlp.experts.{e}.", mine[e], theirs[e])
        if moe.shared_width:
            block("mlp.shared_experts.", everyone, everyone)

    def _readers(self, sample: Tensor, moe: MoE | None) -> dict[str, Tensor]:
        """The weights that the scales of a block's inputs are tried on: of experts, the shared and a few used ones."""
        if moe is None:
            prefixes = ["mlp."]
        else:
            correction = "mlp.moe_statics.e_score_correction_bias"
            bias = self._read(correction).view(-1) if self._has(correction) else None
            taken = routes(_sample(sample), self._read("mlp.gate.weight"), bias, moe)
            most = sorted(range(moe.experts), key=lambda e: -len(taken[e].tokens))[:4]
            prefixes = [f"mlp.experts.{e}." for e in most] + (["mlp.shared_experts."] if moe.shared_width else [])
        return {f"{p}{n}_proj": self._read(f"{p}{n}_proj.weight") for p in prefixes for n in ("gate", "up")}

    def _block(
        self, prefix: str, scale: Tensor | None, *, seen: int, h: Tensor, mine: Chosen, out: Tensor, inner: Tensor,
        theirs: Chosen, before: Tensor,
    ) -> None:  # fmt: skip
        """One gate, up and down: the current tokens h -> out, the reference's inner -> before."""
        gate_name, up_name, down_name = (f"{prefix}{n}_proj" for n in ("gate", "up", "down"))
        gate, up, down = (self._read(f"{n}.weight") for n in (gate_name, up_name, down_name))
        gate_bias = self._vector(gate_name + ".bias")
        up_bias = self._read(up_name + ".bias") if self._has(up_name + ".bias") else None
        down_bias = self._vector(down_name + ".bias")
        wide, bias = torch.cat([gate, up]), _joined([gate_bias, up_bias])
        for piece in _pieces(theirs.tokens):
            y = F.linear(reference.silu_mul(F.linear(inner[theirs.tokens[piece]], wide, bias)), down, down_bias)
            theirs.add(before, piece, y)
        if scale is not None:
            gate, up = gate * scale, up * scale
        trained = mine.tokens[mine.tokens < seen]
        if self._folds and len(trained):
            x = _sample(h[trained])
            middle = F.silu(F.linear(x, gate, gate_bias)) * F.linear(x, up, up_bias)
            exact = up_bias is not None or isinstance(self._format(up_name), PlainFormat)
            narrow = self._best(middle, {down_name: down}, exact=exact)
            if narrow is not None:
                up, down = up / narrow[:, None], down * narrow
                up_bias = None if up_bias is None else up_bias / narrow
        if up_bias is not None:
            self._write(f"{self._disk}{up_name}.bias", up_bias.to(self._raw(up_name + ".bias").dtype))
        hessian = Hessian.zeros(h.shape[1])
        for piece in _pieces(trained):
            hessian.add(h[trained[piece]])
        wide, bias = torch.cat(self._round({gate_name: gate, up_name: up}, hessian)), _joined([gate_bias, up_bias])
        del gate, up
        hessian = Hessian.zeros(down.shape[1])
        for piece in _pieces(trained):
            hessian.add(reference.silu_mul(self._matmul(h[trained[piece]], wide, bias)))
        (down,) = self._round({down_name: down}, hessian)
        for piece in _pieces(mine.tokens):
            middle = reference.silu_mul(self._matmul(h[mine.tokens[piece]], wide, bias))
            mine.add(out, piece, self._matmul(middle, down, down_bias))


def _joined(biases: list[Tensor | None]) -> Tensor | None:
    there = [bias for bias in biases if bias is not None]
    return torch.cat(there) if there else None


def _sample(x: Tensor) -> Tensor:
    """At most SAMPLE of the rows, evenly spread."""
    return x[:: -(-len(x) // SAMPLE)]


def _pieces(tokens: Tensor) -> list[slice]:
    return [slice(a, a + TOKENS) for a in range(0, len(tokens), TOKENS)]
