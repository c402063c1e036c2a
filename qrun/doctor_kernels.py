"""Every kernel of a backend against plain torch: its error and its time. Through the backend's border, so the same for
every device; it knows no kernel by name."""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from qrun.backends.base import (
    BOUNDS,
    AttentionSpec,
    AttentionWeights,
    Backend,
    Binding,
    Feed,
    FfnWeights,
    MoESpec,
    MoEWeights,
    Step,
)
from qrun.cache import KVCache
from qrun.doctor_check import Check, Progress, Run, first_line
from qrun.formats import QTensor, format_of, kv_format
from qrun.recipe import CacheType, Recipe

PRODUCTS: Final = (
    "W32A32", "W16", "W8", "W8A8", "W4", "W4A8", "W4Afp8", "W4g32", "W4g128sym", "W4@channel", "W2", "W2A8", "W3", "W5",
    "W6", "W7", "Wfp8", "Wfp8Afp8", "WNF4", "WFP4", "WMXFP4", "WNVFP4",
)  # fmt: skip
"""Weights and activations of the products that are tried, as recipes."""
CACHES: Final = ("fp32", "bf16", "int8", "fp8", "int4", "k8v4")
BLOCKS: Final = ("W16", "W8", "W4", "Wfp8", "WNVFP4")
TOKENS: Final = (1, 8, 96)
"""A step, a short prompt, and what is long to every kernel."""
SHAPE: Final = (1024, 2048)
"""Rows and columns of the product that is timed."""
ODD: Final = (200, 576)
"""The same for one that fills no block and no tile."""
STEPS: Final[dict[CacheType, float]] = {"fp32": 0.0, "bf16": 2**-8, "int8": 0.02, "fp8": 0.06, "int4": 0.3}
"""How far apart two neighbouring numbers of a cache are, in standard deviations."""
NOISE: Final = 2e-3
"""What two ways to compute a key or value may differ by."""
REPEATS: Final = 5
PATIENCE: Final = 0.05
"""Seconds after which a call is not repeated for the clock."""

BROKEN: Final = "use another device, and send the report: qrun doctor --report FILE"


def kernels(backend: Backend, progress: Progress) -> Iterator[Check]:
    """Each product, cache and block of a backend, one check after another."""
    plain = Backend()
    for i, code in enumerate(PRODUCTS):
        progress(f"trying {code}", i, len(PRODUCTS))
        yield _attempt("kernels", code, lambda code=code: product(backend, code))
    for i, kv in enumerate(CACHES):
        progress(f"trying attention with a cache in {kv}", i, len(CACHES))
        yield _attempt("attention", kv, lambda kv=kv: attention(backend, plain, kv))
    for i, code in enumerate(BLOCKS):
        progress(f"trying blocks in {code}", i, len(BLOCKS))
        yield _attempt("blocks", f"ffn {code}", lambda code=code: ffn(backend, plain, code))
        yield _attempt("blocks", f"experts {code}", lambda code=code: experts(backend, plain, code))


@contextmanager
def single() -> Generator[None]:
    """Plain torch on one thread: on a busy machine the threads of its many short operations wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _attempt(section: str, name: str, work: Callable[[], Check]) -> Check:
    """What a kernel that raises comes to: a failure, whatever it raised."""
    try:
        with torch.no_grad():
            return work()
    except Exception as error:
        return Check(section=section, name=name, status="failure", detail=first_line(error), fix=BROKEN)


def product(backend: Backend, code: str) -> Check:
    """x [S, K] times a weight [N, K]: against x in float32 times the weight as its format expands it."""
    recipe, random = Recipe.parse(code), torch.Generator().manual_seed(0)
    bound = BOUNDS[recipe.activations]
    worst: list[Run] = []
    for rows, columns in (SHAPE, ODD):
        weight = _weight(code, random, rows, columns)
        bias = torch.randn(rows, generator=random) * 0.1 if (rows, columns) == ODD else None
        with single():
            right = weight.dequantize().t()
        placed = weight.to(backend.device)
        call = backend.linear(
            placed, None if bias is None else bias.to(backend.device), activations=recipe.activations, op=code
        )
        for tokens in TOKENS:
            x = torch.randn(tokens, columns, generator=random)
            with single():
                wanted = x @ right if bias is None else x @ right + bias
            run = _run(backend, call, x.to(backend.device), wanted, bound, weight.nbytes if bias is None else 0)
            worst.append(run)
    timed, odd = worst[: len(TOKENS)], worst[len(TOKENS) :]
    runs = [replace(run, error=_larger(run.error, other.error)) for run, other in zip(timed, odd, strict=True)]
    return _check("kernels", code, runs, [binding for binding in backend.bindings if binding.op == code])


def attention(backend: Backend, plain: Backend, kv: str) -> Check:
    """A block with its cache in ``kv``: a prompt, more of it, and a token behind it, as in plain torch."""
    recipe, random = Recipe.parse("bf16", kv), torch.Generator().manual_seed(0)
    spec = AttentionSpec(heads=6, kv_heads=2, head_dim=64, eps=1e-5)
    hidden = 320
    weights = AttentionWeights(
        norm=torch.rand(hidden, generator=random) + 0.5,
        qkv=_weight("W8", random, (spec.heads + 2 * spec.kv_heads) * spec.head_dim, hidden),
        o=_weight("W8", random, hidden, spec.heads * spec.head_dim),
        qkv_bias=torch.randn((spec.heads + 2 * spec.kv_heads) * spec.head_dim, generator=random) * 0.5,
    )
    placed = replace(
        weights, norm=weights.norm.to(backend.device), qkv=weights.qkv.to(backend.device),
        o=weights.o.to(backend.device), qkv_bias=_vector(weights.qkv_bias, backend),
    )  # fmt: skip
    ours, theirs = backend.attention_block(spec, placed), plain.attention_block(spec, weights)
    caches = [
        KVCache(
            layers=1, kv_heads=spec.kv_heads, head_dim=spec.head_dim, capacity=400, k=kv_format(recipe.k),
            v=kv_format(recipe.v), device=place.device,
        )
        for place in (backend, plain)
    ]  # fmt: skip
    bound = BOUNDS["16"] + 2 * (NOISE * max(STEPS[recipe.k], STEPS[recipe.v])) ** 0.5
    runs: list[Run] = []
    start = 0
    for tokens in (300, 40, 1):
        x = torch.randn(tokens, hidden, generator=random)
        step, other = (_step(start, tokens, spec.head_dim, place.device) for place in (backend, plain))
        with single():
            wanted = theirs(x, caches[1].layers[0], other) - x
        there = x.to(backend.device)

        def block(x: Tensor, step: Step = step) -> Tensor:
            return ours(x, caches[0].layers[0], step) - x

        runs.append(_run(backend, block, there, wanted, bound, 0))
        start += tokens
    return _check("attention", kv, runs, [binding for binding in backend.bindings if binding.op == "attention"][-1:])


def ffn(backend: Backend, plain: Backend, code: str) -> Check:
    """A dense feed-forward block."""
    random = torch.Generator().manual_seed(0)
    hidden, inner = 256, 384
    weights = FfnWeights(
        norm=torch.rand(hidden, generator=random) + 0.5,
        gate_up=_weight(code, random, 2 * inner, hidden),
        down=_weight(code, random, hidden, inner),
    )
    placed = replace(
        weights, norm=weights.norm.to(backend.device), gate_up=weights.gate_up.to(backend.device),
        down=weights.down.to(backend.device),
    )  # fmt: skip
    known = len(backend.bindings)
    ours, theirs = backend.ffn_block(1e-5, placed), plain.ffn_block(1e-5, weights)
    return _block(backend, f"ffn {code}", hidden, ours, theirs, known)


def experts(backend: Backend, plain: Backend, code: str) -> Check:
    """A mixture of experts, two shared ones beside it."""
    random = torch.Generator().manual_seed(0)
    count, hidden, inner = 8, 256, 128
    weights = MoEWeights(
        norm=torch.rand(hidden, generator=random) + 0.5,
        router=torch.randn(count, hidden, generator=random),
        correction=torch.randn(count, generator=random) * 0.01,
        gate_up=_weight(code, random, count, 2 * inner, hidden),
        down=_weight(code, random, count, hidden, inner),
        shared_gate_up=_weight(code, random, 4 * inner, hidden),
        shared_down=_weight(code, random, hidden, 2 * inner),
    )
    assert weights.shared_gate_up is not None and weights.shared_down is not None
    placed = MoEWeights(
        norm=weights.norm.to(backend.device), router=weights.router.to(backend.device),
        correction=_vector(weights.correction, backend), gate_up=weights.gate_up.to(backend.device),
        down=weights.down.to(backend.device), shared_gate_up=weights.shared_gate_up.to(backend.device),
        shared_down=weights.shared_down.to(backend.device),
    )  # fmt: skip
    spec = MoESpec(top_k=3, normalise=True, norm_min=1e-12)
    known = len(backend.bindings)
    ours, theirs = backend.moe_block(1e-5, spec, placed), plain.moe_block(1e-5, spec, weights)
    return _block(backend, f"experts {code}", hidden, ours, theirs, known)


def _block(backend: Backend, name: str, hidden: int, ours: Feed, theirs: Feed, known: int) -> Check:
    """Two products after one another, whose errors add. ``known``: bindings there were before."""
    random = torch.Generator().manual_seed(1)
    runs: list[Run] = []
    for tokens in TOKENS:
        x = torch.randn(tokens, hidden, generator=random)
        with single():
            wanted = theirs(x) - x
        runs.append(_run(backend, lambda x: ours(x) - x, x.to(backend.device), wanted, 2 * BOUNDS["16"], 0))
    return _check("blocks", name, runs, backend.bindings[known:])


def _weight(code: str, random: torch.Generator, *shape: int) -> QTensor:
    """Numbers whose product with others is about as large as these."""
    scheme = Recipe.parse(code).dense
    return format_of(scheme).quantize(torch.randn(*shape, generator=random) * shape[-1] ** -0.5)


def _vector(values: Tensor | None, backend: Backend) -> Tensor | None:
    return None if values is None else values.to(backend.device)


def _step(start: int, tokens: int, head_dim: int, device: torch.device) -> Step:
    positions = torch.arange(start, start + tokens)
    angles = positions[:, None] * torch.logspace(0, -3, head_dim // 2)
    positions, cos, sin = positions.to(device), angles.cos().to(device), angles.sin().to(device)
    return Step(start, positions, cos, sin, positions[-1:] + 1, start + tokens)


def _run(backend: Backend, call: Callable[[Tensor], Tensor], x: Tensor, wanted: Tensor, bound: float, read: int) -> Run:
    """Call once for the numbers and some times more for the clock; ``read`` is what each call reads, in bytes."""
    found = call(x).float().cpu()
    if found.shape != wanted.shape:
        raise ValueError(f"{tuple(found.shape)} came out for {x.shape[0]} tokens instead of {tuple(wanted.shape)}")
    error = float(((found - wanted).square().sum() / wanted.square().sum()).sqrt())
    seconds = _seconds(backend, call, x)
    return Run(x.shape[0], error, bound, 1e3 * seconds, read / seconds if seconds else 0.0)


def _seconds(backend: Backend, call: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """The quickest of some calls, or of those there is time for."""
    taken: list[float] = []
    while len(taken) < REPEATS and sum(taken) < PATIENCE:
        begun = time.perf_counter()
        call(x)
        if backend.device.type != "cpu":
            torch.get_device_module(backend.device.type).synchronize()
        taken.append(time.perf_counter() - begun)
    return min(taken)


def _larger(a: float, b: float) -> float:
    """The larger error; NaN, which is the worst, where either is."""
    return a if a > b or a != a else b


def _check(section: str, name: str, runs: list[Run], bindings: list[Binding]) -> Check:
    """The runs of one thing in words: failed if any is out of bounds, which NaN is too."""
    kernel = " and ".join(dict.fromkeys(binding.kernel for binding in bindings))
    fallback = any(binding.fallback for binding in bindings)
    wrong = [run for run in runs if not run.error <= run.bound]
    parts = [f"{kernel}{' (fallback)' if fallback else ''}"] if kernel else []
    if wrong:
        bad = ", ".join(f"{run.error:.2g} for {_tokens(run.tokens)}" for run in wrong)
        parts.append(f"wrong: its error is {bad}, at most {runs[0].bound:.2g} is right")
        return Check(
            section=section, name=name, status="failure", detail="; ".join(parts), fix=BROKEN, kernel=kernel,
            fallback=fallback, runs=tuple(runs),
        )  # fmt: skip
    parts.append(f"error {max(run.error for run in runs):.1e} of {runs[0].bound:.0e}")
    times = ", ".join(f"{run.milliseconds:.2f}" for run in runs)
    parts.append(f"{times} ms for {', '.join(str(run.tokens) for run in runs)} tokens")
    if runs[0].bytes_per_second and not fallback:
        parts.append(f"{runs[0].bytes_per_second / 1e9:.1f} GB/s")
    return Check(
        section=section, name=name, status="ok", detail="; ".join(parts), kernel=kernel, fallback=fallback,
        runs=tuple(runs),
    )  # fmt: skip


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"
