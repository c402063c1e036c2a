"""The CUDA backend's blocks against plain torch, the launches they take, and whole models through it."""

from typing import Any

import pytest
import torch
from gpu_doubles import DEVICE, SLACK, card, difference
from torch import Tensor

pytest.importorskip("triton")

from qrun.backends.base import AttentionSpec, AttentionWeights, Backend, FfnWeights, MoESpec, MoEWeights, Step
from qrun.backends.cuda import CUDABackend
from qrun.cache import KVCache
from qrun.formats import QTensor, format_of, kv_format
from qrun.recipe import Recipe, WeightScheme

SCHEMES = {
    "bf16": WeightScheme("bf16", 16),
    "int8": WeightScheme("int", 8, 0),
    "int4 g64": WeightScheme("int", 4, 64, False),
    "int2 g32": WeightScheme("int", 2, 32, False),
    "fp8": WeightScheme("fp8", 8),
    "nf4": WeightScheme("nf4", 4),
    "mxfp4": WeightScheme("mxfp4", 4),
    "nvfp4": WeightScheme("nvfp4", 4),
}


@pytest.fixture
def cuda() -> CUDABackend:
    torch.manual_seed(0)
    return CUDABackend(card())


@pytest.fixture
def plain() -> Backend:
    return Backend(DEVICE)


def weight(name: str, *shape: int) -> QTensor:
    return format_of(SCHEMES[name]).quantize(torch.randn(*shape) * 0.05).to(DEVICE)


def vector(size: int, scale: float = 0.1) -> Tensor:
    return torch.randn(size, device=DEVICE) * scale


def angles(start: int, stop: int, dim: int) -> Step:
    positions = torch.arange(start, stop, device=DEVICE)
    angle = positions[:, None] * torch.logspace(0, -3, dim // 2, device=DEVICE)
    return Step(start, positions, angle.cos(), angle.sin(), positions[-1:] + 1, stop)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("activations", ["16", "int8", "fp8"])
def test_linear(cuda: CUDABackend, plain: Backend, name: str, activations: str) -> None:
    """A8 and fp8 activations are rounded where many tokens are multiplied, never for a few."""
    if activations != "16" and name not in ("int8", "fp8"):
        pytest.skip("16-bit activations are what other weights have")
    w = weight(name, 140, 320)
    bias = vector(140)
    for tokens in (1, 9, 40, 70):
        x = torch.randn(tokens, 320, device=DEVICE)
        kind = activations if tokens > 64 and activations == {"int8": "int8"}.get(name) else "16"
        found, wanted = cuda.linear(w, bias, activations=activations)(x), plain.linear(w, bias, activations=kind)(x)
        assert difference(found, wanted) < 4e-3 * SLACK


@pytest.mark.parametrize(("k", "v"), [("bf16", "bf16"), ("int8", "int4"), ("int4", "int8"), ("fp8", "fp8")])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "window"), [(4, 2, 64, None), (5, 1, 128, 40), (2, 2, 24, None)])
def test_attention_block(
    cuda: CUDABackend, plain: Backend, k: str, v: str, heads: int, kv_heads: int, dim: int, window: int | None
) -> None:
    """Prefill of 90, a few more, then single tokens; the caches must hold the same."""
    hidden = 96
    weights = AttentionWeights(
        norm=vector(hidden).abs() + 0.5,
        qkv=weight("int8", (heads + 2 * kv_heads) * dim, hidden),
        o=weight("int8", hidden, heads * dim),
        qkv_bias=vector((heads + 2 * kv_heads) * dim),
        q_norm=vector(dim).abs() + 0.5 if dim == 24 else None,
        k_norm=vector(dim).abs() + 0.5 if dim == 24 else None,
    )
    spec = AttentionSpec(heads=heads, kv_heads=kv_heads, head_dim=dim, eps=1e-5, window=window)
    recipe = Recipe.parse("bf16", f"k{k}v{v}")
    caches = [
        KVCache(
            layers=1, kv_heads=kv_heads, head_dim=dim, capacity=128, k=kv_format(recipe.k), v=kv_format(recipe.v),
            device=torch.device(DEVICE),
        )
        for _ in range(2)
    ]  # fmt: skip
    blocks = [backend.attention_block(spec, weights) for backend in (cuda, plain)]
    for start, stop in ((0, 90), (90, 97), (97, 98), (98, 99)):
        x = torch.randn(stop - start, hidden, device=DEVICE)
        found, wanted = (
            block(x, cache.layers[0], angles(start, stop, dim)) - x for block, cache in zip(blocks, caches, strict=True)
        )
        assert difference(found, wanted) < (3e-2 if "int4" in (k, v) or "fp8" in (k, v) else 6e-3) * SLACK
    stores = [(cache.layers[0].k.read(0, 99), cache.layers[0].v.read(0, 99)) for cache in caches]
    for found, wanted in zip(*stores, strict=True):
        assert difference(found, wanted) < 2e-2 * SLACK


@pytest.mark.parametrize(("k", "v"), [("bf16", "bf16"), ("int8", "int4")])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "window"), [(4, 2, 64, 8), (2, 2, 24, None)])
def test_conversations_abreast(
    cuda: CUDABackend, plain: Backend, k: str, v: str, heads: int, kv_heads: int, dim: int, window: int | None
) -> None:
    """One token of each of three conversations of different lengths, twice; in FP16 a row is what it is alone."""
    hidden = 96
    weights = AttentionWeights(
        norm=vector(hidden).abs() + 0.5,
        qkv=weight("int8", (heads + 2 * kv_heads) * dim, hidden),
        o=weight("int8", hidden, heads * dim),
        qkv_bias=vector((heads + 2 * kv_heads) * dim),
    )
    spec = AttentionSpec(heads=heads, kv_heads=kv_heads, head_dim=dim, eps=1e-5, window=window)
    recipe = Recipe.parse("bf16", f"k{k}v{v}")
    ours, theirs = cuda.attention_block(spec, weights), plain.attention_block(spec, weights)
    lengths = [20, 1, 7]
    caches = [
        [
            KVCache(
                layers=1, kv_heads=kv_heads, head_dim=dim, capacity=32, k=kv_format(recipe.k), v=kv_format(recipe.v),
                device=torch.device(DEVICE),
            ).layers[0]
            for _ in lengths
        ]
        for _ in range(2)
    ]  # fmt: skip
    for mine, other, length in zip(*caches, lengths, strict=True):
        x = torch.randn(length, hidden, device=DEVICE)
        ours(x, mine, angles(0, length, dim))
        theirs(x, other, angles(0, length, dim))
    for turn in range(2):
        steps = [angles(length + turn, length + turn + 1, dim) for length in lengths]
        x = torch.randn(len(lengths), hidden, device=DEVICE)
        found, wanted = ours.abreast(x, caches[0], steps) - x, theirs.abreast(x, caches[1], steps) - x
        assert difference(found, wanted) < (3e-2 if v == "int4" else 6e-3) * SLACK
        for row in range(len(lengths)):
            assert difference(found[row], wanted[row]) < (6e-2 if v == "int4" else 1e-2) * SLACK


@pytest.mark.parametrize("name", SCHEMES)
def test_ffn_block(cuda: CUDABackend, plain: Backend, name: str) -> None:
    inner = 128 if name == "fp8" else 100
    weights = FfnWeights(
        norm=vector(96).abs() + 0.5,
        gate_up=weight(name, 2 * inner, 96),
        down=weight(name, 96, inner),
        gate_up_bias=vector(2 * inner),
        down_bias=vector(96),
    )
    for tokens in (1, 2, 70):
        x = torch.randn(tokens, 96, device=DEVICE)
        found, wanted = (backend.ffn_block(1e-5, weights)(x) - x for backend in (cuda, plain))
        assert difference(found, wanted) < 5e-3 * SLACK


@pytest.mark.parametrize("name", ["bf16", "int4 g64", "fp8", "nvfp4"])
@pytest.mark.parametrize("shared", ["none", "folded", "beside"])
def test_moe_block(cuda: CUDABackend, plain: Backend, name: str, shared: str) -> None:
    experts, hidden, inner = 5, 96, 128
    other = "int8" if shared == "beside" else name
    weights = MoEWeights(
        norm=vector(hidden).abs() + 0.5,
        router=torch.randn(experts, hidden, device=DEVICE),
        gate_up=weight(name, experts, 2 * inner, hidden),
        down=weight(name, experts, hidden, inner),
        correction=vector(experts) if shared != "none" else None,
        shared_gate_up=weight(other, 4 * inner, hidden) if shared != "none" else None,
        shared_down=weight(other, hidden, 2 * inner) if shared != "none" else None,
    )
    spec = MoESpec(top_k=3, normalise=shared != "none", norm_min=1e-12)
    block = cuda.moe_block(1e-5, spec, weights)
    for tokens in (1, 2, 70):
        x = torch.randn(tokens, hidden, device=DEVICE)
        found, wanted = block(x) - x, plain.moe_block(1e-5, spec, weights)(x) - x
        assert difference(found, wanted) < 6e-3 * SLACK


def test_blocks_in_a_row_hand_their_operands_on(cuda: CUDABackend, plain: Backend, monkeypatch: Any) -> None:
    """The second block finds x already normed: nothing is prepared for it."""

    def block(backend: Backend) -> Any:
        torch.manual_seed(1)
        return [
            backend.ffn_block(
                1e-5,
                FfnWeights(norm=vector(96).abs() + 0.5, gate_up=weight("int8", 256, 96), down=weight("int8", 96, 128)),
            )
            for _ in range(2)
        ]

    from qrun.backends import cuda_product

    ours, theirs = block(cuda), block(plain)
    x = torch.randn(1, 96, device=DEVICE)
    prepared: list[Tensor] = []
    prepare = cuda_product.gpu_norm.prepare
    monkeypatch.setattr(
        cuda_product.gpu_norm, "prepare", lambda x, *rest, **named: (prepared.append(x), prepare(x, *rest, **named))
    )
    found, wanted = x, x
    for mine, other in zip(ours, theirs, strict=True):
        found, wanted = mine(found), other(wanted)
    assert difference(found, wanted) < 5e-3 * SLACK
    assert len(prepared) == 1
    # Another tensor than the one left is prepared, whatever lies in the buffers.
    assert difference(ours[1](x), theirs[1](x)) < 5e-3 * SLACK and len(prepared) == 2


def test_what_has_no_kernel_falls_back_visibly(cuda: CUDABackend, plain: Backend) -> None:
    """Right, named, and never recorded as a graph."""
    narrow = FfnWeights(norm=vector(96).abs() + 0.5, gate_up=weight("fp8", 200, 96), down=weight("fp8", 96, 100))
    x = torch.randn(2, 96, device=DEVICE)
    assert difference(cuda.ffn_block(1e-5, narrow)(x), plain.ffn_block(1e-5, narrow)(x)) < 5e-3 * SLACK
    assert [b.op for b in cuda.bindings if b.fallback] == ["ffn"]
    assert cuda.linear(weight("int8", 8, 64), activations="32", op="exact")(x[:, :64]).dtype == torch.float32
    assert [b.fallback for b in cuda.bindings if b.op == "exact"] == [True]
    odd = format_of(WeightScheme("int", 4, 8, False)).quantize(torch.randn(40, 64)).to(DEVICE)
    y = torch.randn(3, 64, device=DEVICE)
    assert difference(cuda.linear(odd, op="odd")(y), plain.linear(odd)(y)) < 1e-3 * SLACK
    assert [b.fallback for b in cuda.bindings if b.op == "odd"] == [True]
    assert not cuda._recordable
