"""A checkpoint, a recipe and a backend make a Decoder, tensor by tensor.

Each weight is read, brought to its canonical form, quantized on the device and bound before the next one is touched,
so the peak is the finished model and a few tensors. It knows no text, no hub and no terminal.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qrun.assign import Formats, by_recipe, halves, stored
from qrun.backends.base import AttentionSpec, AttentionWeights, Backend, FfnWeights, MoESpec, MoEWeights
from qrun.checkpoint import Checkpoint
from qrun.errors import CheckpointError, UnsupportedModelError
from qrun.formats import Format, PlainFormat, QTensor
from qrun.models.config import ModelConfig
from qrun.models.decoder import Decoder, Layer, inverse_frequencies
from qrun.models.plan import Source, Weight, after, before, layer, plan
from qrun.recipe import Recipe
from qrun.runcard import RoleLine
from qrun.store import StoredWeights, WeightWriter

# Tensors beside the decoder's own that a checkpoint may carry: next-token-prediction heads, and saved rotary tables.
SPARE = ("model.mtp_", "mtp_")
SPARE_ENDS = (".rotary_emb.inv_freq",)

Progress = Callable[[str, int, int], None]  # what, done, of how many


@dataclass
class Loaded:
    """What came of a load, for the run card. Bytes and seconds."""

    roles: list[RoleLine] = field(default_factory=list[RoleLine])
    weight_bytes: int = 0
    quantize_seconds: float = 0.0


def is_tied(config: ModelConfig, checkpoint: Checkpoint) -> bool:
    """Whether the head is the embedding. The config's word counts; where it has none, presence of lm_head decides."""
    present = checkpoint.has("lm_head.weight")
    if config.tied is False and not present:
        raise CheckpointError(
            f"{checkpoint.path} has no lm_head.weight, yet config.json says tie_word_embeddings is false: "
            "fetch the model again"
        )
    return not present if config.tied is None else config.tied


def check(config: ModelConfig, checkpoint: Checkpoint, weights: list[Weight], *, tied: bool) -> None:
    """Every tensor that the model needs is there in its shape, and none is left over that would change its meaning."""
    known = {"lm_head.weight"} if tied else set[str]()
    for weight in weights:
        for part in weight.parts:
            for source in part:
                known.update(checkpoint.sources(source.name))
                checkpoint.require(source.name, source.shape)
    for name in checkpoint.names():
        if name not in known and not _is_spare(name, checkpoint):
            raise UnsupportedModelError(
                f"{checkpoint.path} has a tensor {name} that a {config.family} model of this config does not use: "
                "qrun would run it wrong"
            )


def _is_spare(name: str, checkpoint: Checkpoint) -> bool:
    if name.startswith(SPARE) or name.endswith(SPARE_ENDS):
        return True
    if checkpoint.reader is None:
        return False
    # Some tools write a bias for every layer; where the model has none it must be nothing.
    return checkpoint.reader.spare(name) or (
        name.endswith(".bias")
        and checkpoint.reader.holds(name.removesuffix(".bias"))
        and not bool(checkpoint.read(name).any())
    )


class Loader:
    """One load. ``formats`` are the recipe's by default; ``stored`` gives weights quantized by an earlier load,
    ``writer`` keeps this one's."""

    def __init__(
        self, checkpoint: Checkpoint, config: ModelConfig, recipe: Recipe, backend: Backend, *,
        formats: Formats | None = None, stored: StoredWeights | None = None, writer: WeightWriter | None = None,
        progress: Progress | None = None,
    ) -> None:  # fmt: skip
        self.checkpoint = checkpoint
        self.config = config
        self.recipe = recipe
        self.formats = formats or by_recipe(recipe)
        self.backend = backend
        self.stored = stored
        self.writer = writer
        self.progress: Progress = progress or (lambda what, done, total: None)
        self.loaded = Loaded()

    def load(self) -> Decoder:
        """Raises CheckpointError for damaged or contradictory files, UnsupportedModelError for what qrun cannot run."""
        config, backend = self.config, self.backend
        tied = is_tied(config, self.checkpoint)
        weights = list(plan(config, tied=tied))
        check(config, self.checkpoint, weights, tied=tied)
        found: dict[str, Tensor] = {}
        packed: dict[str, QTensor] = {}
        total = len(weights)
        done = 0

        def take(several: Iterator[Weight]) -> None:
            nonlocal done
            for weight in several:
                if weight.role == "kept":
                    found[weight.name] = self.kept(weight)
                else:
                    packed[weight.name] = self.packed(weight)
                done += 1
                self.progress("loading", done, total)

        take(before(config, tied=tied))
        layers: list[Layer] = []
        for i in range(config.layers):
            take(layer(config, i))
            layers.append(self.bind(i, found, packed))
        take(after(config, tied=tied))
        table = packed["embed"]
        head = table if tied else packed["lm_head"]
        # A head left in BF16 beside quantized layers keeps 16-bit activations too.
        left_alone = isinstance(head.format, PlainFormat) and (
            self.recipe.own or self.recipe.lm_head != self.recipe.dense
        )
        decoder = Decoder(
            embed=backend.embedding(table),
            layers=layers,
            head=backend.head(
                found["norm"],
                config.eps,
                head,
                found.get("lm_head.bias"),
                activations="16" if left_alone else self.recipe.activations,
            ),
            inv_freq=inverse_frequencies(config.rope, config.head_dim),
            device=backend.device,
        )
        backend.note("embedding", table.format, "row gather")
        return decoder

    def kept(self, weight: Weight) -> Tensor:
        """A weight that is never quantized, in float32."""
        tensor = (
            self._assemble(weight.parts[0], weight.shape).float().reshape(-1 if weight.shape[0] == 1 else weight.shape)
        )
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{weight.parts[0][0].name} holds NaN or infinity: the checkpoint is damaged")
        self._count(weight, "fp32", tensor.nbytes)
        return tensor.to(self.backend.device)

    def packed(self, weight: Weight) -> QTensor:
        """A weight in its format: from the store, or read, and quantized if it is not so already."""
        form = self.formats(weight)
        assert form is not None, f"{weight.name} is kept"
        held = self.stored.get(weight.name, form, weight.shape) if self.stored is not None else None
        if held is None:
            begun = time.perf_counter()
            held = self._quantize(weight, form)
            self.loaded.quantize_seconds += time.perf_counter() - begun
            if self.writer is not None:
                self.writer.add(weight.name, held)
        held = held.to(self.backend.device)
        self._count(weight, str(form), held.nbytes)
        return held

    def _quantize(self, weight: Weight, form: Format) -> QTensor:
        if len(weight.shape) == 2:
            return self._encode(weight.parts[0], weight.shape, form)
        stack = QTensor.empty(form, weight.shape, self.backend.device)
        for e, part in enumerate(weight.parts):
            stack.copy_(e, self._encode(part, weight.shape[1:], form))
        return stack

    def _encode(self, part: tuple[Source, ...], shape: tuple[int, ...], form: Format) -> QTensor:
        held = stored(self.checkpoint, part, form)
        if held is not None:
            return held.to(self.backend.device)
        try:
            return form.quantize(self._assemble(part, shape).to(self.backend.device))
        except ValueError as error:
            raise CheckpointError(f"{part[0].name}: {error}; the checkpoint is damaged") from error

    def _assemble(self, part: tuple[Source, ...], shape: tuple[int, ...]) -> Tensor:
        """The sources one under another, rotary rows brought from interleaved pairs to halves."""
        if len(part) == 1:
            return halves(self.checkpoint.weight(part[0].name, part[0].shape), part[0].pairs)
        out: Tensor | None = None
        row = 0
        for source in part:
            tensor = self.checkpoint.weight(source.name, source.shape)
            out = torch.empty(shape, dtype=tensor.dtype) if out is None else out
            out[row : row + source.shape[0]] = halves(tensor, source.pairs)
            row += source.shape[0]
        assert out is not None, "a part has at least one source"
        return out

    def _count(self, weight: Weight, scheme: str, size: int) -> None:
        roles = self.loaded.roles
        self.loaded.weight_bytes += size
        for i, line in enumerate(roles):
            if (line.role, line.scheme) == (weight.role, scheme):
                roles[i] = RoleLine(line.role, scheme, line.tensors + 1, line.bytes + size)
                return
        roles.append(RoleLine(weight.role, scheme, 1, size))

    def bind(self, i: int, found: dict[str, Tensor], packed: dict[str, QTensor]) -> Layer:
        """Layer i's blocks, from weights that are taken out of the dictionaries."""
        config, backend = self.config, self.backend
        act = self.recipe.activations
        here = f"layers.{i}."

        def tensor(name: str) -> Tensor | None:
            return found.pop(here + name, None)

        attend = backend.attention_block(
            AttentionSpec(
                heads=config.heads,
                kv_heads=config.kv_heads,
                head_dim=config.head_dim,
                eps=config.eps,
                window=config.window,
                activations=act,
            ),
            AttentionWeights(
                norm=found.pop(here + "attn_norm"),
                qkv=packed.pop(here + "qkv"),
                o=packed.pop(here + "o"),
                qkv_bias=tensor("qkv.bias"),
                o_bias=tensor("o.bias"),
                q_norm=tensor("q_norm"),
                k_norm=tensor("k_norm"),
            ),
        )
        norm = found.pop(here + "ffn_norm")
        if not config.is_sparse(i) or config.moe is None:
            weights = FfnWeights(
                norm=norm,
                gate_up=packed.pop(here + "gate_up"),
                down=packed.pop(here + "down"),
                gate_up_bias=tensor("gate_up.bias"),
                down_bias=tensor("down.bias"),
            )
            return Layer(attend, backend.ffn_block(config.eps, weights, activations=act))
        moe = config.moe
        experts = MoEWeights(
            norm=norm,
            router=found.pop(here + "router"),
            correction=tensor("correction"),
            gate_up=packed.pop(here + "experts.gate_up"),
            down=packed.pop(here + "experts.down"),
            shared_gate_up=packed.pop(here + "shared.gate_up", None),
            shared_down=packed.pop(here + "shared.down", None),
            shared_gate_up_bias=tensor("shared.gate_up.bias"),
            shared_down_bias=tensor("shared.down.bias"),
        )
        spec = MoESpec(top_k=moe.top_k, normalise=moe.normalise, norm_min=moe.norm_min)
        return Layer(attend, backend.moe_block(config.eps, spec, experts, activations=act))
