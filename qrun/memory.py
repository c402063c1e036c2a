"""What a model needs at a recipe and a context, and what a device has: arithmetic on layouts, before anything is read.

Used by the loader, the hub and the error messages, so that all three agree. Knows no checkpoint and no network.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Final

import torch

from qrun import backends
from qrun.assign import Formats, by_recipe
from qrun.errors import DoesNotFitError
from qrun.formats import AffineFormat, Format, PlainFormat
from qrun.formats.kv import kv_format
from qrun.formats.widened import read_as, stored_bits
from qrun.free import available, device_memory
from qrun.kernels.gpu_packed import ROW_ALIGN
from qrun.models.config import ModelConfig
from qrun.models.plan import Weight, after, before, layer
from qrun.recipe import Recipe

OVERHEAD: Final = 600_000_000
"""Bytes beside weights and cache: Python, torch and compiled kernels (about 350 MB) and the activations of a chunk."""
GPU_OVERHEAD: Final = 400_000_000
"""The same on a GPU, without the activations: kernels' code, cuBLAS' workspace, graphs, the buffer that kernels are
timed with (268 MB, at load), and what the allocator's blocks waste. Python and torch are in the host's memory."""
GPU_CHUNK: Final = 2048
"""Prompt tokens a forward there."""
GPU_EXPANDED: Final = 256 << 20
"""Bytes of weights that are expanded at a time for many tokens there."""
XPU_CHUNK: Final = 512
"""Prompt tokens a forward on an Intel GPU."""
XPU_WORK: Final = 512 << 20
"""Bytes that attention, or a mixture of experts, takes there at a time, whatever the length of the context."""
KEPT_ITEMSIZE: Final = 4
"""Norms, biases and the router stay in float32."""
SMALLER: Final = ("wint8", "wint4")
"""What to suggest instead of a recipe that does not fit, best first."""
SMALLER_MODEL: Final = "choose a smaller model, or talk to the embedded one: qrun chat spark"
OTHERS: Final = 2_000_000_000
"""Bytes of a GPU in others' hands that are worth a word."""
DEFAULT_CONTEXT: Final = 4096
KERNELS: Final = 13_000_000
"""Resident bytes of a model's kernels on a CPU, compiled before."""
WORK: Final = 25_000_000
"""Bytes that each thread works in while it quantizes, what the allocator keeps for it included."""
WORK_NUMBERS: Final = 1 << 19
"""Numbers that a thread quantizes at a time."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Bytes a loaded model takes; ``parameters`` counts numbers, ``active`` those that one token uses."""

    roles: dict[str, int]
    parameters: int
    active: int
    kv_per_token: int
    context: int
    largest: int
    """The largest weight as it is read and assembled, before it is quantized."""
    block: int
    """The largest weight at any time: as it is read, as it is stored or as it is placed."""
    loading: int
    """Beside the weights while they are loaded."""
    running: int
    """Beside weights and cache while tokens are run."""
    expanded_per_token: int = 0
    """What reading a prompt expands of the cache, a layer at a time, for each position."""
    moments: tuple[tuple[int, int], ...] = ()
    """The fullest moments of a load on a CPU: how many threads may be at work then, and what is held beside theirs."""

    @property
    def weights(self) -> int:
        return sum(self.roles.values())

    @property
    def kv(self) -> int:
        """The whole cache, every position filled."""
        return self.kv_per_token * self.context

    @property
    def peak_load(self) -> int:
        """Bytes that loading never exceeds: resident ones, or those of the GPU."""
        return self.weights + self.loading

    def expected_load(self, resident: int, threads: int, *, kept: bool = False) -> int:
        """The resident bytes that loading on a CPU takes at its peak, kernels being compiled already.

        ``resident`` is what the process has before, all imported; ``kept``: weights come quantized from the store.
        """
        fullest = self.weights
        if not kept:
            fullest = max(fullest, *(held + WORK * min(threads, workers) for workers, held in self.moments))
        return resident + KERNELS + fullest

    def room(self, memory: int, positions: int) -> int:
        """The most positions, in steps of 256 and up to ``positions``, that fit in ``memory`` bytes; 0 if none."""
        beside = self.total - (self.kv_per_token + self.expanded_per_token) * self.context
        if max(self.peak_load, beside) > memory:
            return 0
        return min(positions, (memory - beside) // (self.kv_per_token + self.expanded_per_token) // 256 * 256)

    @property
    def total(self) -> int:
        """Bytes when the context is full."""
        return self.weights + self.kv + self.expanded_per_token * self.context + self.running

    @property
    def needed(self) -> int:
        """What must be free before loading starts."""
        return max(self.peak_load, self.total)


def forecast(
    config: ModelConfig,
    recipe: Recipe,
    context: int = DEFAULT_CONTEXT,
    *,
    tied: bool | None = None,
    source_itemsize: int = 2,
    formats: Formats | None = None,
    device: str = "cpu",
) -> Forecast:
    """What ``config`` takes at ``recipe`` on a device, exact to the byte for weights and cache.

    ``tied`` overrides what the config says of the head; unknown counts as untied, the larger. ``source_itemsize`` is
    bytes per number in the checkpoint's files; ``formats`` are the recipe's by default.
    """
    tied = bool(config.tied) if tied is None else tied
    alike = formats is None
    formats = formats or by_recipe(recipe)
    sized = partial(_sized, config=config, formats=formats, itemsize=source_itemsize, device=device)
    roles: dict[str, int] = {}
    moments: dict[int, int] = {}
    parameters = active = largest = block = fullest = held = 0
    for weights in _places(config, tied, sized, alike=alike):
        for weight in weights:
            parameters += weight.numbers
            active += weight.active
            roles[weight.role] = roles.get(weight.role, 0) + weight.placed
            largest = max(largest, weight.read)
            block = max(block, weight.read, weight.stored, weight.placed)
            held += weight.stored
            moments[weight.pieces] = max(moments.get(weight.pieces, 0), held + weight.beside)
        fullest = max(fullest, sum(weight.stored for weight in weights))
    per_head = sum(
        math.prod(shape) * dtype.itemsize
        for name in (recipe.k, recipe.v)
        for shape, dtype in kv_format(name).layout(config.head_dim).values()
    )
    # A tensor as it was read, and in work.
    loading, running, expanded = 2 * largest + OVERHEAD, OVERHEAD, 0
    if device == "cuda":
        # A tensor as it was read, quantized, and in work; or a layer's weights (experts are a stack) beside their
        # packed copies, which are made when all of them are there. Of the host this takes one tensor at a time.
        loading = max(3 * largest, fullest + largest) + GPU_OVERHEAD
        running = GPU_OVERHEAD + min(largest, GPU_EXPANDED) + _activations(config, GPU_CHUNK)
        padded_head = 1 << (config.head_dim - 1).bit_length()
        if config.window is None:
            expanded = 2 * 2 * config.kv_heads * padded_head  # keys and values, 16 bits
        else:
            running += 2 * 2 * config.kv_heads * padded_head * (config.window + GPU_CHUNK)
    elif device == "xpu":
        # Loaded as above. The cache is attended in pieces, never expanded as a whole.
        loading = max(3 * largest, fullest + largest) + GPU_OVERHEAD
        running = GPU_OVERHEAD + XPU_WORK + _activations(config, XPU_CHUNK)
    return Forecast(
        roles=roles,
        parameters=parameters,
        active=active,
        kv_per_token=per_head * config.kv_heads * config.layers,
        context=context,
        largest=largest,
        block=block,
        loading=loading,
        running=running,
        expanded_per_token=expanded,
        moments=tuple(moments.items()),
    )


@dataclass(frozen=True, kw_only=True)
class _Sized:
    """A weight in bytes: as its format stores it, as the device places it, as its largest part is read, and what is
    beside it when its last part is quantized, in ``pieces`` that threads share."""

    role: str
    numbers: int
    active: int
    stored: int
    placed: int
    read: int
    beside: int
    pieces: int


def _sized(weight: Weight, *, config: ModelConfig, formats: Formats, itemsize: int, device: str) -> _Sized:
    numbers = math.prod(weight.shape)
    form = formats(weight)
    stored = numbers * KEPT_ITEMSIZE if form is None else _layout_bytes(form, weight.shape)
    parts = [[itemsize * math.prod(source.shape) for source in part] for part in weight.parts]
    read = max(map(sum, parts))
    placed = stored if form is None else _placed(form, weight.shape, device)
    if device == "xpu" and weight.name == "embed":
        # Rows are taken from the table as it is stored; of one that is the head too, the head may have another copy.
        placed = stored + (placed if weight.role == "lm_head" else 0)
    last = stored // len(parts)
    # A part of several tensors is assembled from them, then quantized; one of a stack is copied into its place.
    joining = max(parts[-1]) - last if len(parts[-1]) > 1 else 0
    works = form is not None and not isinstance(form, PlainFormat)
    return _Sized(
        role=weight.role,
        numbers=numbers,
        active=_active(config, weight, numbers),
        stored=stored,
        placed=placed,
        read=read,
        beside=read + max(joining, last if len(parts) > 1 else 0),
        pieces=-(-numbers // len(parts) // WORK_NUMBERS) if works else 0,
    )


def _places(
    config: ModelConfig, tied: bool, sized: Callable[[Weight], _Sized], *, alike: bool
) -> Iterator[list[_Sized]]:
    """The embedding, each layer, and what follows; layers of a kind are sized once where they are alike."""
    yield list(map(sized, before(config, tied=tied)))
    kinds: dict[bool, list[_Sized]] = {}
    for i in range(config.layers):
        sparse = config.is_sparse(i)
        if sparse not in kinds or not alike:
            kinds[sparse] = list(map(sized, layer(config, i)))
        yield kinds[sparse]
    yield list(map(sized, after(config, tied=tied)))


def packed_bytes(form: Format, shape: tuple[int, ...]) -> int:
    """Bytes of a weight as a GPU's kernels read it: padded, in one of the widths they know; 32-bit floats have none."""
    tile = ROW_ALIGN
    if isinstance(form, AffineFormat):
        form = replace(form, bits=stored_bits(form))
        tile = 256 if form.bits == 2 else tile
    elif form == PlainFormat(torch.float32):
        return _layout_bytes(form, shape)
    *lead, n, k = shape
    return _layout_bytes(form, (*lead, n + -n % ROW_ALIGN, k + -k % tile))


def _placed(form: Format, shape: tuple[int, ...], device: str) -> int:
    if device == "xpu":
        return backends.placed_bytes(form, shape)
    return packed_bytes(form, shape) if device == "cuda" else _layout_bytes(read_as(form), shape)


def _layout_bytes(form: Format, shape: tuple[int, ...]) -> int:
    return sum(math.prod(size) * dtype.itemsize for size, dtype in form.layout(shape).values())


def _activations(config: ModelConfig, tokens: int) -> int:
    """Bytes of a chunk's activations on a GPU: copies of x, and the widest that a block makes of it.

    Per token: mixed heads in 16 and in 32 bits, and the attended ones; gates, ups and their product in 16; for each of
    a token's experts its product in 16 bits and its output twice in 32.
    """
    widest = max(8 * (config.heads + 2 * config.kv_heads) * config.head_dim, 8 * config.intermediate)
    if config.moe is not None:
        slots = config.moe.top_k + -(-config.moe.shared_width // config.moe.width)
        widest = max(widest, slots * (8 * config.hidden + 3 * config.moe.width))
    return tokens * (24 * config.hidden + widest)


def check_fits(
    config: ModelConfig,
    recipe: Recipe,
    *,
    context: int,
    memory: int,
    name: str,
    tied: bool | None = None,
    source_itemsize: int = 2,
    formats: Formats | None = None,
    files: int | None = None,
    device: str = "cpu",
) -> Forecast:
    """The forecast, if ``memory`` bytes, those that are free of a device, are enough for it.

    ``files``: the weights stay as these bytes of files store them. Raises `DoesNotFitError` saying how much is needed,
    how much is there, and what would fit; also where a single weight is more than the device allocates at once.
    """
    would = partial(forecast, config, tied=tied, source_itemsize=source_itemsize, device=device)
    need = forecast(config, recipe, context, tied=tied, source_itemsize=source_itemsize, formats=formats, device=device)
    if files is not None:
        need = replace(need, roles={"files": files})
    most = backends.allocation_limit(device)
    if most is not None and need.block > most:
        small = (option for option, other in _alternatives(recipe) if would(other, context).block <= most)
        raise DoesNotFitError(
            f"{name} at {recipe.name} has a weight of {human(need.block)}, and this GPU allocates {human(most)} at "
            f"most: use {', or '.join((*islice(small, 1), '--device cpu'))}"
        )
    if need.needed <= memory:
        return need
    what = f"{name} at {recipe.name} with a context of {context} needs {human(need.needed)}"
    advice = _advice(would, recipe, context, memory, config.positions)
    if device == "cpu":
        raise DoesNotFitError(f"{what}, {human(memory)} are free: {advice or SMALLER_MODEL}")
    if forecast(config, recipe, context, tied=tied).needed <= available():
        advice = f"{advice}, or --device cpu" if advice else "use --device cpu"
    raise DoesNotFitError(f"{what} on the {_free_of(device, memory)}: {advice or SMALLER_MODEL}")


def _free_of(device: str, memory: int) -> str:
    """The device, what is free of it, and who has the rest."""
    module = torch.get_device_module(device)
    free, total = device_memory(device)
    text = f"{module.get_device_name()}, {human(memory)} are free of {human(total)}"
    others = total - free - module.memory_reserved()
    # What this process itself has on the card beside torch's blocks, its context, is no other program.
    return text if others < OTHERS else f"{text}; other programs hold {human(others)}"


def _advice(would: Callable[[Recipe, int], Forecast], recipe: Recipe, context: int, memory: int, positions: int) -> str:
    """Options that make it fit; nothing where none does."""
    need = would(recipe, context)
    shorter = need.room(memory, positions)
    if shorter:
        for kv in ("int8", "int4"):
            other = would(recipe.with_kv(kv), context)
            if other.needed <= memory and other.kv < need.kv:
                return f"use --ctx-size {shorter}, or --kv {kv} ({human(other.needed)})"
        return f"use --ctx-size {shorter}"
    for option, smaller in _alternatives(recipe):
        other = would(smaller, context)
        if other.needed <= memory and other.weights < need.weights:
            return f"use {option} ({human(other.needed)})"
    for option, smaller in _alternatives(recipe):
        shorter = would(smaller, context).room(memory, positions)
        if shorter:
            return f"use {option} --ctx-size {shorter}"
    return ""


def _alternatives(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """Smaller recipes as options to type, with the cache as it is, then with a smaller one."""
    for kv in (None, "int4"):
        for quant in SMALLER:
            option = f"--quant {quant}"
            yield (
                option if kv is None else f"{option} --kv {kv}",
                Recipe.parse(quant, kv or (recipe.k if recipe.k == recipe.v else f"k{recipe.k}v{recipe.v}")),
            )


def human(count: int) -> str:
    """Bytes as people write them: ``640 MB``, ``12.9 GB``, ``141 GB``."""
    if count >= 99_950_000_000:
        return f"{count / 1e9:.0f} GB"
    return f"{count / 1e9:.1f} GB" if count >= 999_500_000 else f"{count / 1e6:.0f} MB"


def _active(config: ModelConfig, weight: Weight, count: int) -> int:
    if weight.role == "experts" and config.moe is not None:
        return count * config.moe.top_k // config.moe.experts
    return count
