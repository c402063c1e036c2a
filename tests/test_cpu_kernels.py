"""The CPU's kernels against the same blocks in plain torch: odd shapes, every cache format, poisoned outputs."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from qrun.backends.base import (
    AttentionSpec,
    AttentionWeights,
    Backend,
    FfnWeights,
    MoESpec,
    MoEWeights,
    Step,
)
from qrun.backends.cpu import CPUBackend
from qrun.cache import KVCache
from qrun.formats import AffineFormat, PermutedFormat, QTensor, format_of, from_tensors, kv_format
from qrun.kernels.cpu_pool import Program
from qrun.recipe import Recipe, WeightScheme

SCHEMES = {
    "bf16": WeightScheme("bf16", 16),
    "fp32": WeightScheme("fp32", 32),
    "int8": WeightScheme("int", 8, 0),
    "int8 g64": WeightScheme("int", 8, 64),
    "int4 g64": WeightScheme("int", 4, 64, False),
    "int4 g32 sym": WeightScheme("int", 4, 32, True),
    "int4 g96": WeightScheme("int", 4, 96, False),
    "int4 channel": WeightScheme("int", 4, 0, True),
    "int2 g64": WeightScheme("int", 2, 64, False),
    "trellis": WeightScheme("trellis", 2),
    "int3 g64": WeightScheme("int", 3, 64, False),
    "int3 channel": WeightScheme("int", 3, 0, True),
    "int5 g32 sym": WeightScheme("int", 5, 32, True),
    "int6 channel": WeightScheme("int", 6, 0, True),
    "int7 g32": WeightScheme("int", 7, 32, False),
    "fp4": WeightScheme("fp4", 4),
    "mxfp4": WeightScheme("mxfp4", 4),
    "nvfp4": WeightScheme("nvfp4", 4),
}
FALLBACKS = {
    "fp8": WeightScheme("fp8", 8),
    "nf4": WeightScheme("nf4", 4),
}


@pytest.fixture(scope="module")
def cpu() -> CPUBackend:
    return CPUBackend(threads=2)


@pytest.fixture
def plain() -> Backend:
    return Backend()


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is not written must not look right by accident."""
    empty = torch.empty
    torch.manual_seed(0)

    def poisoned(*size: Any, **options: Any) -> Tensor:
        made = empty(*size, **options)
        return made.fill_(torch.nan) if made.dtype == torch.float32 else made

    monkeypatch.setattr(torch, "empty", poisoned)


def weight(scheme: WeightScheme, *shape: int) -> QTensor:
    return format_of(scheme).quantize(torch.randn(*shape) * 0.05)


def difference(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", [*SCHEMES, *FALLBACKS])
@pytest.mark.parametrize(("rows", "columns"), [(1, 96), (7, 352), (130, 64)])
def test_linear(cpu: CPUBackend, plain: Backend, name: str, rows: int, columns: int) -> None:
    w = weight({**SCHEMES, **FALLBACKS}[name], rows, columns)
    bias = torch.randn(rows)
    for tokens in (1, 3, 8, 13, 101):
        x = torch.randn(tokens, columns)
        assert difference(cpu.linear(w, bias)(x), plain.linear(w, bias)(x)) < 2e-4


OTHERS = {
    "gptq": AffineFormat(4, 32, True, scale_dtype=torch.float16),
    "awq": AffineFormat(4, 32, False, scale_dtype=torch.float16),
    "gptq 3 bits": AffineFormat(3, 32, False, scale_dtype=torch.float16),
    "8 bits": AffineFormat(8, 32, True, scale_dtype=torch.float16),
    "float zeros": AffineFormat(4, 32, False, scale_dtype=torch.bfloat16, zero_dtype=torch.float16),
    "minima": AffineFormat(4, 32, False, scale_dtype=torch.float32, zero_dtype=torch.float32, minimum=True),
    "groups of 16": AffineFormat(8, 16, False, scale_dtype=torch.float32, zero_dtype=torch.float32, minimum=True),
    "symmetric groups of 16": AffineFormat(6, 16, True, scale_dtype=torch.float32),
    "2 bits": AffineFormat(2, 96, False, scale_dtype=torch.float32, zero_dtype=torch.float32, minimum=True),
}
"""Formats that are only read from other tools' checkpoints."""


def others(name: str, *shape: int) -> QTensor:
    """A weight with random codes, scales and zeros."""
    form = OTHERS[name]
    made = {}
    for part, (size, dtype) in form.layout(shape).items():
        if part == "codes":
            made[part] = torch.randint(0, 256, size, dtype=torch.uint8).view(dtype)
        elif dtype == torch.uint8:
            made[part] = torch.randint(0, 2**form.bits, size, dtype=torch.uint8)
        else:
            wide = 0.1 if form.minimum or part == "scale" else 2**form.bits
            made[part] = (torch.rand(size) * wide).to(dtype)
    return from_tensors(form, shape, made)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(("rows", "columns"), [(7, 352), (130, 1056), (130, 64)])
def test_weights_of_other_tools(cpu: CPUBackend, plain: Backend, name: str, rows: int, columns: int) -> None:
    w = others(name, rows, columns)
    for tokens in (1, 3, 8, 13, 101):
        x = torch.randn(tokens, columns)
        assert difference(cpu.linear(w, op="others")(x), plain.linear(w)(x)) < 2e-4
    assert not any(binding.fallback for binding in cpu.bindings if binding.op == "others")


@pytest.mark.parametrize("name", ["awq", "minima"])
def test_experts_of_other_tools(cpu: CPUBackend, plain: Backend, name: str) -> None:
    spec = MoESpec(top_k=2, normalise=True, norm_min=1e-12)
    weights = MoEWeights(
        norm=torch.rand(64) + 0.5,
        router=torch.randn(4, 64),
        gate_up=others(name, 4, 2 * 96, 64),
        down=others(name, 4, 64, 96),
    )
    for tokens in (1, 3, 40):
        x = torch.randn(tokens, 64)
        found, wanted = (backend.moe_block(1e-5, spec, weights)(x) - x for backend in (cpu, plain))
        assert difference(found, wanted) < 3e-4


def test_columns_in_another_order(cpu: CPUBackend, plain: Backend) -> None:
    """GPTQ's act-order: activations are put into the order of the codes."""
    inner = weight(SCHEMES["int4 g64"], 70, 128)
    order = torch.randperm(128).int()[None]
    w = from_tensors(PermutedFormat(inner.format), inner.shape, {**inner.tensors(), "order": order})
    full = torch.empty(70, 128)
    full[:, order[0].long()] = inner.dequantize()
    assert torch.equal(w.dequantize(), full)
    for tokens in (1, 13):
        x = torch.randn(tokens, 128)
        assert difference(cpu.linear(w)(x), x @ full.t()) < 2e-4
        assert difference(plain.linear(w)(x), x @ full.t()) < 2e-6


@pytest.mark.parametrize("name", ["int8", "int4 g64"])
def test_linear_int8_activations(cpu: CPUBackend, plain: Backend, name: str) -> None:
    w = weight(SCHEMES[name], 70, 352)
    for tokens in (1, 3, 8, 13):
        x = torch.randn(tokens, 352)
        found, wanted = (backend.linear(w, activations="int8")(x) for backend in (cpu, plain))
        assert difference(found, wanted) < 2e-6


def test_outliers_cost_no_precision_elsewhere(cpu: CPUBackend, plain: Backend) -> None:
    w = weight(SCHEMES["int4 g64"], 64, 512)
    x = torch.randn(1, 512)
    x[0, 3] = 1002.0
    wanted = plain.linear(w)(x)
    error = (cpu.linear(w)(x) - wanted).abs().max()
    rounded = (plain.linear(w)(x.bfloat16().float()) - wanted).abs().max()
    assert error < rounded / 4, "16-bit activations must be finer than bf16's"


def angles(start: int, stop: int, dim: int) -> Step:
    positions = torch.arange(start, stop)
    angle = positions[:, None] * torch.logspace(0, -3, dim // 2)
    return Step(start, positions, angle.cos(), angle.sin(), positions[-1:] + 1, stop)


@pytest.mark.parametrize(("k", "v"), [("fp32", "bf16"), ("int8", "int4"), ("int4", "int8"), ("fp8", "fp8")])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window"), [(3, 1, 64, None), (4, 2, 80, 150), (8, 1, 128, None), (2, 2, 24, 40)]
)
def test_attention_block(
    cpu: CPUBackend, plain: Backend, k: str, v: str, heads: int, kv_heads: int, dim: int, window: int | None
) -> None:
    """Prefill of 200, a few more, then single tokens; the caches must hold the same."""
    hidden = 96
    int8 = SCHEMES["int8"]
    weights = AttentionWeights(
        norm=torch.rand(hidden) + 0.5,
        qkv=weight(int8, (heads + 2 * kv_heads) * dim, hidden),
        o=weight(int8, hidden, heads * dim),
        qkv_bias=torch.randn((heads + 2 * kv_heads) * dim) * 0.1,
        q_norm=torch.rand(dim) + 0.5 if dim != 128 else None,
        k_norm=torch.rand(dim) + 0.5 if dim != 128 else None,
    )
    spec = AttentionSpec(heads=heads, kv_heads=kv_heads, head_dim=dim, eps=1e-5, window=window)
    recipe = Recipe.parse("bf16", f"k{k}v{v}".replace("int", "").replace("bf16", "16").replace("fp32", "32"))
    assert recipe.k == k
    assert recipe.v == v
    caches = [
        KVCache(
            layers=1,
            kv_heads=kv_heads,
            head_dim=dim,
            capacity=300,
            k=kv_format(recipe.k),
            v=kv_format(recipe.v),
            device=torch.device("cpu"),
        )
        for _ in range(2)
    ]
    blocks = [backend.attention_block(spec, weights) for backend in (cpu, plain)]
    for start, stop in ((0, 200), (200, 207), (207, 208), (208, 209)):
        x = torch.randn(stop - start, hidden)
        found, wanted = (
            block(x, cache.layers[0], angles(start, stop, dim)) - x for block, cache in zip(blocks, caches, strict=True)
        )
        # Codes at the edge between two values may fall either way; 4 bits are coarse.
        assert difference(found, wanted) < (2e-2 if "int4" in (k, v) or "fp8" in (k, v) else 4e-3)
    stores = [(cache.layers[0].k.read(0, 209), cache.layers[0].v.read(0, 209)) for cache in caches]
    for found, wanted in zip(*stores, strict=True):
        assert difference(found, wanted) < 5e-3


@pytest.mark.parametrize("name", ["bf16", "int8", "int4 g64"])
def test_ffn_block(cpu: CPUBackend, plain: Backend, name: str) -> None:
    scheme = SCHEMES[name]
    weights = FfnWeights(
        norm=torch.rand(96) + 0.5,
        gate_up=weight(scheme, 200, 96),
        down=weight(scheme, 96, 100),
        gate_up_bias=torch.randn(200) * 0.1,
        down_bias=torch.randn(96) * 0.1,
    )
    for tokens in (1, 2, 97):
        x = torch.randn(tokens, 96)
        found, wanted = (backend.ffn_block(1e-5, weights)(x) - x for backend in (cpu, plain))
        assert difference(found, wanted) < 3e-4


@pytest.mark.parametrize("name", ["bf16", "int4 g64"])
@pytest.mark.parametrize("shared", [True, False])
def test_moe_block(cpu: CPUBackend, plain: Backend, name: str, shared: bool) -> None:
    scheme, experts, hidden, inner = SCHEMES[name], 7, 96, 40
    weights = MoEWeights(
        norm=torch.rand(hidden) + 0.5,
        router=torch.randn(experts, hidden),
        gate_up=weight(scheme, experts, 2 * inner, hidden),
        down=weight(scheme, experts, hidden, inner),
        correction=torch.rand(experts) * 0.1 if shared else None,
        shared_gate_up=weight(scheme, 160, hidden) if shared else None,
        shared_down=weight(scheme, hidden, 80) if shared else None,
    )
    spec = MoESpec(top_k=3, normalise=shared, norm_min=1e-12)
    for tokens in (1, 5, 33):
        x = torch.randn(tokens, hidden)
        found, wanted = (backend.moe_block(1e-5, spec, weights)(x) - x for backend in (cpu, plain))
        assert difference(found, wanted) < 3e-4


def test_head(cpu: CPUBackend, plain: Backend) -> None:
    w, norm = weight(SCHEMES["int8"], 1003, 96), torch.rand(96) + 0.5
    for tokens in (1, 5):
        x = torch.randn(tokens, 96)
        found, wanted = (backend.head(norm, 1e-5, w, None)(x) for backend in (cpu, plain))
        assert difference(found, wanted) < 2e-4


def test_fallbacks_are_named(cpu: CPUBackend) -> None:
    cpu.linear(weight(FALLBACKS["nf4"], 8, 64), op="named")
    cpu.linear(weight(SCHEMES["int4 g64"], 8, 64), op="named")
    assert [b.fallback for b in cpu.bindings if b.op == "named"] == [True, False]


def test_threads_that_sleep_are_woken_and_late_ones_do_no_harm(cpu: CPUBackend) -> None:
    """Two callers, with pauses in which the pool's threads fall asleep."""
    w = weight(SCHEMES["int8"], 300, 96)
    wanted = w.dequantize()
    wrong: list[float] = []

    def work(seed: int) -> None:
        linear = cpu.linear(w)
        generator = torch.Generator().manual_seed(seed)
        for i in range(60):
            x = torch.randn(1, 96, generator=generator)
            if difference(linear(x), x @ wanted.t()) > 1e-3:
                wrong.append(i)
            if i % 20 == 0:
                threading.Event().wait(0.02)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_pool_refuses_a_row_too_many() -> None:
    program = Program(1)
    program.add(0)
    with pytest.raises(ValueError, match="full"):
        program.add(0)
