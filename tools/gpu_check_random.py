"""Models of published shapes with random weights, built on the device: no file is written or read.

Every layer has memory of its own, as speed demands, but only one matrix of each shape is really quantized; the others
are copies of it. What comes out of such a model means nothing.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from qrun import memory
from qrun.api import run_card
from qrun.backends.base import Backend
from qrun.bench import Test
from qrun.cache import KVStore
from qrun.checkpoint import Checkpoint
from qrun.engine import Engine
from qrun.errors import CheckpointError
from qrun.formats import Format, QTensor
from qrun.loader import Loader, is_tied
from qrun.models import describe
from qrun.models.plan import Weight, plan
from qrun.recipe import Recipe


@dataclass(frozen=True)
class RandomCheckpoint(Checkpoint):
    """What a `Checkpoint` of this config would hold, made when asked for: one tensor a shape, kept for the next."""

    shapes: Mapping[str, tuple[int, ...]]
    device: torch.device
    made: dict[tuple[int, ...], Tensor] = field(default_factory=dict[tuple[int, ...], Tensor])

    @classmethod
    def of(cls, config: Mapping[str, Any], device: torch.device | str) -> Self:
        """The checkpoint of a Hugging Face config, which must say whether the head is tied."""
        model = describe(config)
        weights = plan(model, tied=bool(model.tied))
        shapes = {source.name: source.shape for weight in weights for part in weight.parts for source in part}
        return cls(Path("random"), config, {}, {}, shapes, torch.device(device))

    def names(self) -> Sequence[str]:
        return sorted(self.shapes)

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def require(self, name: str, shape: Sequence[int]) -> None:
        if self.shapes.get(name) != tuple(shape):
            raise CheckpointError(f"{name} of shape {list(shape)} is not in this random checkpoint")

    def weight(self, name: str, shape: Sequence[int]) -> Tensor:
        """Matrices of noise whose outputs are about as large as their inputs; norms of ones, corrections of zeros."""
        self.require(name, shape)
        size = tuple(shape)
        if name.endswith("correction_bias"):
            return torch.zeros(size, device=self.device)
        if len(size) == 1:
            return torch.ones(size, device=self.device)
        if size not in self.made:
            noise = torch.empty(size, dtype=torch.bfloat16, device=self.device).normal_()
            self.made[size] = noise.mul_(size[-1] ** -0.5)
        return self.made[size]


class RandomLoader(Loader):
    """A loader that quantizes one matrix of each shape and format, and gives every weight a copy."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._done: dict[tuple[tuple[int, ...], Format], QTensor] = {}

    def _quantize(self, weight: Weight, form: Format) -> QTensor:
        shape = weight.shape[-2:]
        if (shape, form) not in self._done:
            self._done[shape, form] = self._encode(weight.parts[0], shape, form)
        one = self._done[shape, form]
        out = QTensor.empty(form, weight.shape, self.backend.device)
        for name, tensor in out.tensors().items():
            tensor.copy_(one.tensors()[name])  # to every expert at once where there are some
        return out


def build(
    checkpoint: RandomCheckpoint, recipe: Recipe, backend: Backend, *, name: str, context: int, prepare: bool = True
) -> Engine:
    """A ready engine, as `qrun.load` makes it from files. Without ``prepare`` the backend tunes nothing."""
    begun = time.perf_counter()
    config = describe(checkpoint.config)
    tied = is_tied(config, checkpoint)
    need = memory.forecast(config, recipe, context, tied=tied, device=backend.device.type)
    loader = RandomLoader(checkpoint, config, recipe, backend)
    decoder = loader.load()
    if prepare:
        backend.prepare()
    card = run_card(name, loader, need, begun=begun)
    return Engine(
        decoder, backend, config=config, recipe=recipe, card=card, source=checkpoint.path,
        generation_defaults={}, context=context,
    )  # fmt: skip


def history(engine: Engine, test: Test) -> list[int]:
    """The tokens that `qrun.bench.measure` reads before a test at a depth."""
    noise: Any = torch.randint(
        engine.config.vocab, (test.depth + test.tokens,), generator=torch.Generator().manual_seed(0)
    )
    ids: list[int] = noise[: test.depth].tolist()
    return ids


def noise_store(store: KVStore, length: int) -> None:
    """Finite numbers at the first ``length`` positions."""
    codes = store.codes[:, :length]
    if codes.dtype in (torch.bfloat16, torch.float32):
        codes.normal_()
    elif codes.dtype.is_floating_point:
        codes.view(torch.uint8).random_(0, 120)  # e4m3 of at most 240
    else:
        codes.random_(0, 120)
    if store.scale is not None:
        store.scale[:, :length] = 0.01


def fill(engine: Engine, test: Test) -> None:
    """Make the engine's cache as long as a test at a depth finds it, with noise: reading that many tokens takes long.

    Measuring the test then goes on from here.
    """
    engine.reset()
    for layer in engine.cache.layers:
        noise_store(layer.k, test.depth)
        noise_store(layer.v, test.depth)
    engine.ids[:] = history(engine, test)
    engine.cache.length = test.depth
