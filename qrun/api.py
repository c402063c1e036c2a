"""The front door: a name becomes a ready Engine. It joins hub, checkpoint, memory, loader and backend."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from qrun import hub, memory, resident
from qrun.assign import by_checkpoint, by_recipe
from qrun.backends import pick
from qrun.checkpoint import Checkpoint
from qrun.engine import Engine
from qrun.errors import DoesNotFitError, StrictError, UsageError
from qrun.free import in_use, release
from qrun.gguf_checkpoint import open_checkpoint
from qrun.loader import Loader, Progress, is_tied
from qrun.models import describe
from qrun.recipe import ActivationType, Recipe
from qrun.runcard import RunCard
from qrun.store import WeightStore


def load(
    model: str | Path | None = None,
    quant: str | Recipe = "auto",
    kv: str | None = None,
    *,
    device: str = "auto",
    context: int | None = None,
    strict: bool = False,
    offline: bool = False,
    cache: bool = True,
    threads: int | None = None,
    xpu_tier: str | None = None,
    xpu_graph: bool = False,
    progress: Progress | None = None,
) -> Engine:
    """A model, quantized on the way in, ready to generate.

    Args:
        model: a checkpoint directory, a hub name ``org/name[@revision]``, an alias such as ``ernie:0.3b``, or none for
            the embedded model.
        quant: the recipe, as ``wint4`` or ``W4A16C8``; ``kv`` replaces its cache part. ``auto``: weights that are
            quantized already stay as they are, others in BF16.
        context: positions of the cache; -1 is all the model has; by default 4096 or what the model has, if less.
        strict: refuse any operation that would run on a fallback.
        offline: do not ask the hub.
        cache: keep the quantized weights on disk for the next start.
        xpu_tier: whose kernels come first on an Intel GPU: native, ipex, triton or torch.
        xpu_graph: record an Intel GPU's decode step as a graph, where all of it can be.
        progress: called with what is done, how much of it, and of how much (0: unknown).

    Raises a QrunError: ModelNotFoundError, RecipeError, DoesNotFitError, CheckpointError, BackendError or StrictError.
    """
    recipe = quant if isinstance(quant, Recipe) else Recipe.parse(quant)
    recipe = recipe if kv is None else recipe.with_kv(kv)
    try:
        return _load(
            model, recipe, device=device, context=context, strict=strict, offline=offline, cache=cache, threads=threads,
            xpu_tier=xpu_tier, xpu_graph=xpu_graph,
            report=progress or (lambda what, done, total: None),
        )  # fmt: skip
    except (MemoryError, RuntimeError) as error:
        used_up = resident.ran_out(error)
        if used_up is None:
            raise
        resident.let_go(error)  # nothing half-loaded stays, so that a smaller attempt may follow
    raise DoesNotFitError(
        f"{used_up} ran out while loading {model or hub.EMBEDDED} at {recipe.name}: close other programs that use it, "
        "or use a smaller recipe or --ctx-size"
    )


def _load(
    model: str | Path | None, recipe: Recipe, *, device: str, context: int | None, strict: bool, offline: bool,
    cache: bool, threads: int | None, xpu_tier: str | None, xpu_graph: bool, report: Progress,
) -> Engine:  # fmt: skip
    begun = time.perf_counter()
    said: list[str] = []

    def say(what: str) -> None:
        said.append(what)
        report(what, 0, 0)

    backend = pick(device, threads=threads, xpu_tier=xpu_tier, xpu_graph=xpu_graph, progress=say)
    why = list(said)  # a GPU is not used; progress is soon gone, so the card keeps it
    place = backend.device.type
    if place != "cpu":
        resident.reset_peak(place)
    free = memory.available(place)
    found = hub.fetch(
        model,
        recipe=recipe,
        context=context or memory.DEFAULT_CONTEXT,
        memory=free,
        device=place,
        offline=offline,
        progress=report,
    )
    checkpoint = open_checkpoint(found.path)
    config = describe(checkpoint.config)
    if context is not None and (context < -1 or context == 0 or context > config.positions):
        raise UsageError(f"context is {context}: this model takes 1 to {config.positions}")
    room = config.positions if context == -1 else context or min(memory.DEFAULT_CONTEXT, config.positions)
    tied = is_tied(config, checkpoint)
    recipe, quantized = _settled(recipe, checkpoint)
    formats = by_checkpoint(checkpoint, recipe) if recipe.own else by_recipe(recipe)
    forecast = memory.check_fits(
        config, recipe, context=room, memory=free, name=found.label, tied=tied, source_itemsize=checkpoint.itemsize,
        formats=formats, device=place,
    )  # fmt: skip
    before = in_use()
    notes = [note for note in (found.note, *why, quantized, *recipe.notes) if note]
    quantizes = any(scheme.type not in ("bf16", "fp32") for scheme in recipe.schemes().values())
    store = WeightStore.default() if cache and quantizes else None
    stored = store.open(checkpoint, recipe) if store is not None else None
    keeping = store is not None and stored is None
    with store.writer(checkpoint, recipe, label=found.label) if store and keeping else nullcontext() as writer:
        loader = Loader(
            checkpoint, config, recipe, backend, formats=formats, stored=stored, writer=writer,
            progress=report if stored is not None else _releasing(report),
        )  # fmt: skip
        decoder = loader.load()
        if writer is not None:
            writer.commit()
    slow = [binding for binding in backend.bindings if binding.fallback]
    if strict and slow:
        ops = ", ".join(sorted({b.op if b.scheme == "any" else f"{b.op} in {b.scheme}" for b in slow}))
        raise StrictError(
            f"--strict: no kernel on {backend.name} for {ops}: choose another --quant or leave --strict out"
        )
    backend.prepare()
    notes += store.notes if store is not None else []
    expected = forecast.peak_load
    if place == "cpu":
        expected = forecast.expected_load(before, torch.get_num_threads(), kept=stored is not None)
    card = run_card(
        found.label, loader, forecast, begun=begun, from_store=stored is not None, notes=notes, expected=expected
    )
    engine = Engine(
        decoder, backend, config=config, recipe=recipe, card=card, source=found.path,
        generation_defaults=checkpoint.generation_config, context=room, identity=checkpoint.identity,
    )  # fmt: skip
    card.notes.extend(backend.remarks)
    backend.warm_up(engine.rehearse)
    return engine


def _settled(recipe: Recipe, checkpoint: Checkpoint) -> tuple[Recipe, str]:
    """The recipe for this checkpoint, and what its user should know of weights that are quantized already."""
    reader = checkpoint.reader
    if reader is None:
        return (replace(recipe, name="bf16", own=False) if recipe.own else recipe), ""
    if not recipe.own:
        return recipe, f"quantized again, from {reader.method}'s codes: without --quant they are used as they are"
    if recipe.activations == "16" and reader.activations != "16":
        recipe = replace(recipe, activations=cast(ActivationType, reader.activations))
    asks = f"; it asks for an {reader.cache} cache: --kv {reader.cache}" if reader.cache else ""
    return recipe, f"weights as {reader.method} stored them{asks}"


def _releasing(report: Progress) -> Progress:
    """Progress that also returns what each weight left in the heap, so that it does not add up."""

    def tell(what: str, done: int, total: int) -> None:
        release()
        report(what, done, total)

    return tell


def run_card(
    label: str, loader: Loader, forecast: memory.Forecast, *, begun: float, from_store: bool = False,
    notes: Sequence[str] = (), expected: int | None = None,
) -> RunCard:  # fmt: skip
    """What a finished load has made, as it began at ``begun`` by `time.perf_counter`; its peak was ``expected``, by
    default the bound."""
    config, recipe, backend = loader.config, loader.recipe, loader.backend
    return RunCard(
        model=label,
        family=config.family,
        parameters=forecast.parameters,
        active_parameters=forecast.active,
        recipe=recipe.label,
        roles=loader.loaded.roles,
        activations=recipe.activations,
        kv=recipe.kv,
        kv_bytes_per_token=forecast.kv_per_token,
        context=forecast.context,
        backend=backend.name,
        device=backend.description,
        bindings=backend.bindings,  # some are made when the first cache is
        weight_bytes=loader.loaded.weight_bytes,
        predicted_peak=forecast.peak_load if expected is None else expected,
        measured_peak=resident.peak(backend.device.type),
        load_seconds=time.perf_counter() - begun,
        quantize_seconds=loader.loaded.quantize_seconds,
        from_store=from_store,
        notes=list(notes),
    )
