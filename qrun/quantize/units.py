"""The units of a model whose schemes are chosen one by one: what of a layer belongs together, and what it takes.

It knows a model by its config alone. Weights count in the formats that `qrun.quantize` writes.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from qrun.memory import packed_bytes
from qrun.models.config import ModelConfig
from qrun.models.plan import Weight, plan
from qrun.quantize.rounding import written_format
from qrun.recipe import WeightScheme

KINDS: Final = ("embedding", "attention", "mlp", "experts", "shared_experts", "lm_head")
"""The kinds of units, in the order of use."""
LAYER: Final = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Unit:
    """What gets one scheme at a time when schemes are chosen: a block's weights, or the head, or the embedding."""

    kind: str
    layer: int | None
    weights: tuple[Weight, ...]

    @property
    def name(self) -> str:
        """``layers.3.attention``, ``lm_head``."""
        return self.kind if self.layer is None else f"layers.{self.layer}.{self.kind}"

    @property
    def numbers(self) -> int:
        """How many weights it has."""
        return sum(math.prod(weight.shape) for weight in self.weights)

    def modules(self) -> Iterator[str]:
        """The names of all its modules on disk."""
        return (module for weight in self.weights for module in modules(weight))

    def nbytes(self, scheme: WeightScheme, *, running: bool = False) -> int:
        """What it takes in ``scheme`` on disk, scales and padding included; ``running``, in the widths of kernels."""
        return sum(weight_bytes(weight, scheme, running=running) for weight in self.weights)


def weight_bytes(weight: Weight, scheme: WeightScheme, *, running: bool = False) -> int:
    """The same of one weight."""
    form = written_format(scheme, weight.shape[-1])
    if running:
        return packed_bytes(form, weight.shape)
    return sum(math.prod(size) * dtype.itemsize for size, dtype in form.layout(weight.shape).values())


def modules(weight: Weight) -> Iterator[str]:
    """The modules on disk that a weight is made of: ``model.layers.0.self_attn.q_proj`` …"""
    return (source.name.removesuffix(".weight") for part in weight.parts for source in part)


def units(config: ModelConfig, *, tied: bool) -> list[Unit]:
    """Everything of a model that can be quantized, in the order of use. A tied table is the head's."""
    found: dict[tuple[str, int | None], list[Weight]] = {}
    for weight in plan(config, tied=tied):
        if weight.role != "kept":
            found.setdefault((_kind(weight), _layer(next(modules(weight)))), []).append(weight)
    return [Unit(kind, layer, tuple(weights)) for (kind, layer), weights in found.items()]


def _kind(weight: Weight) -> str:
    if weight.role != "dense":
        return weight.role
    block = weight.name.split(".")[2]
    return "attention" if block in ("qkv", "o") else "shared_experts" if block == "shared" else "mlp"


def _layer(module: str) -> int | None:
    match = LAYER.match(module)
    return int(match[1]) if match else None
