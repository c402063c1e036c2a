"""Attention for Intel GPUs, a CPU standing in, against plain float32: every cache format, in pieces and whole."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gpu_doubles import difference
from torch import Tensor
from xpu_doubles import card

import qrun.backends.xpu_attention as attention
import qrun.backends.xpu_pieces as pieces
import qrun.backends.xpu_sdpa as sdpa
from qrun.backends.base import AttentionSpec, AttentionWeights, PlainAttention, Step
from qrun.backends.xpu_attention import Attention
from qrun.backends.xpu_buckets import bucket, key_length
from qrun.backends.xpu_tiers import Tier, Tiers
from qrun.cache import KVStore, LayerCache
from qrun.formats import PlainFormat, QTensor
from qrun.formats.kv import kv_format

FORMATS: list[tuple[Any, Any]] = [
    ("fp32", "fp32"), ("bf16", "bf16"), ("int8", "int8"), ("int4", "int4"), ("fp8", "fp8"), ("int8", "int4"),
]  # fmt: skip
GEOMETRIES = [((4, 4, 64), torch.bfloat16), ((8, 2, 80), torch.float16), ((8, 1, 128), torch.bfloat16)]


def bound(half: torch.dtype) -> float:
    """Relative error of rounding q, K, the softmax, V and the result once each, eps/√12 apiece, thrice over."""
    return 3 * math.sqrt(5 / 12) * torch.finfo(half).eps


class Case:
    """Attention on the stand-in card beside the plain block in float32, each with a cache of its own."""

    def __init__(
        self,
        geometry: tuple[int, int, int] = (8, 2, 64),
        formats: tuple[Any, Any] = ("bf16", "bf16"),
        half: torch.dtype = torch.float16,
        *,
        window: int | None = None,
        norms: bool = False,
        first: Tier | None = None,
        capacity: int = 700,
    ) -> None:
        heads, kv_heads, dim = geometry
        random = torch.Generator().manual_seed(1)
        self.spec = AttentionSpec(heads=heads, kv_heads=kv_heads, head_dim=dim, eps=1e-5, window=window)
        self.formats, self.capacity, self.random = formats, capacity, random
        q_norm, k_norm = (torch.rand(dim, generator=random) + 0.5 for _ in range(2))
        unused = QTensor.empty(PlainFormat(torch.float32), (1, 1))
        weights = AttentionWeights(
            norm=torch.ones(1), qkv=unused, o=unused, q_norm=q_norm if norms else None,
            k_norm=k_norm if norms else None,
        )  # fmt: skip
        self.tiers = Tiers(card(half), first=first)
        self.notes: dict[str, str] = {}

        def note(op: str, scheme: object, kernel: str, *, fallback: bool = False) -> None:
            self.notes[op] = kernel

        self.half = half
        self.ours = Attention(self.spec, weights, card(half), self.tiers, note)
        self._given = torch.empty(0)
        self._plain = PlainAttention(self.spec, weights, lambda x: self._given, lambda x: x)

    @property
    def width(self) -> int:
        return (self.spec.heads + 2 * self.spec.kv_heads) * self.spec.head_dim

    def cache(self) -> LayerCache:
        """Room that was never written: NaN wherever the type has it."""
        stores = [
            KVStore(kv_format(name), self.spec.kv_heads, self.spec.head_dim, self.capacity, torch.device("cpu"))
            for name in self.formats
        ]
        for part in (part for store in stores for part in store.parts().values()):
            part.view(torch.uint8).fill_(255)
        return LayerCache(*stores)

    def mixed(self, tokens: int) -> Tensor:
        return torch.randn(tokens, self.width, generator=self.random).to(self.half)

    def plain(self, mixed: Tensor, cache: LayerCache, at: Step) -> Tensor:
        """Attention in float32; the block around it is given its products."""
        self._given = mixed
        return self._plain(torch.zeros(mixed.shape[0], self.spec.heads * self.spec.head_dim), cache, at)

    def compare(self, *runs: int) -> None:
        """Runs of tokens one behind the other, each held against the plain block's."""
        ours, plain = self.cache(), self.cache()
        start = 0
        for tokens in runs:
            x, at = self.mixed(tokens), step(start, tokens, self.spec.head_dim)
            found = self.ours(x, ours, at)
            assert found.dtype == self.half
            assert difference(found, self.plain(x.float(), plain, at)) < bound(self.half), (start, tokens)
            start += tokens
        for mine, wanted in zip(ours.read(0, start), plain.read(0, start), strict=True):
            torch.testing.assert_close(mine, wanted)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels, slow where they are interpreted, have tests of their own."""
    monkeypatch.setattr(attention, "usable", lambda card: False)


def step(start: int, tokens: int, dim: int) -> Step:
    positions = torch.arange(start, start + tokens)
    angles = positions[:, None] / 1e4 ** torch.linspace(0, 1, dim // 2)
    stop = start + tokens
    return Step(start, positions, angles.cos(), angles.sin(), torch.tensor([stop]), stop)


@pytest.fixture
def few_positions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pieces of 256 positions; gives the positions of each that is taken out of its codes."""
    for module, name in ((attention, "ONE_PIECE"), (attention, "MANY_PIECE"), (sdpa, "MANY_PIECE")):
        monkeypatch.setattr(module, name, 256)
    taken: list[int] = []
    expand = pieces.expand

    def spy(store: KVStore, start: int, stop: int, half: torch.dtype) -> Tensor:
        taken.append(stop - start)
        return expand(store, start, stop, half)

    monkeypatch.setattr(pieces, "expand", spy)
    monkeypatch.setattr(sdpa, "expand", spy)
    return taken


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize(("geometry", "half"), GEOMETRIES)
@pytest.mark.parametrize("first", ["native", "torch"])
def test_every_format(geometry: tuple[int, int, int], formats: tuple[Any, Any], half: torch.dtype, first: Tier) -> None:
    """A prompt, one behind it, and a token behind both."""
    case = Case(geometry, formats, half, first=first)
    case.compare(9, 12, 1, 1)
    assert case.notes["attention"].endswith("aten sdpa" if first == "native" else "torch, piecewise")


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("first", ["native", "torch"])
def test_pieces_are_crossed(formats: tuple[Any, Any], first: Tier, few_positions: list[int]) -> None:
    case = Case((4, 1, 64), formats, first=first)
    case.compare(255, 1, 1, 300, 1)
    assert case.notes["attention"].endswith("aten sdpa" if first == "native" else "torch, piecewise")
    assert few_positions and max(few_positions) <= 256
    assert first == "native" or sum(few_positions) > 4 * 557


@pytest.mark.parametrize("formats", [("bf16", "bf16"), ("int4", "int8")])
@pytest.mark.parametrize("window", [1, 5, 256, 300])
@pytest.mark.parametrize("first", ["native", "torch"])
def test_windows(window: int, formats: tuple[Any, Any], first: Tier, few_positions: list[int]) -> None:
    case = Case((4, 2, 32), formats, torch.bfloat16, window=window, first=first)
    case.compare(3, 290, 1, 260, 1)
    assert case.notes["attention"].endswith("aten sdpa" if first == "native" else "torch, piecewise")


@pytest.mark.parametrize("formats", [("bf16", "bf16"), ("int8", "int4")])
def test_head_norms_and_conversations_abreast(formats: tuple[Any, Any]) -> None:
    case = Case(formats=formats, half=torch.bfloat16, norms=True)
    case.compare(9, 1)
    lengths = (3, 30, 11)
    caches: list[LayerCache] = []
    alone: list[LayerCache] = []
    for length in lengths:
        x, at = case.mixed(length), step(0, length, 64)
        for some in (caches, alone):
            some.append(case.cache())
            case.ours(x, some[-1], at)
    x, steps = case.mixed(3), [step(length, 1, 64) for length in lengths]
    wanted = [case.ours(x[i : i + 1], cache, steps[i]) for i, cache in enumerate(alone)]
    assert torch.equal(case.ours.abreast(x, caches, steps), torch.cat(wanted))


def test_many_tokens_are_attended_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SCORES", 8 * 4 * attention.MANY_PIECE * 16)
    rows: list[int] = []
    aten = F.scaled_dot_product_attention

    def spy(q: Tensor, *args: Any, **options: Any) -> Tensor:
        rows.append(q.shape[2])
        return aten(q, *args, **options)

    case = Case(formats=("int8", "int8"))
    case.compare(3)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    case.compare(50)
    assert rows == [16, 16, 16, 8]


def test_shapes_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the lengths, torch sees buckets of rows and multiples of 256 keys, or all that the cache has."""
    shapes: set[tuple[int, int]] = set()
    aten = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, *args: Any, **options: Any) -> Tensor:
        shapes.add((q.shape[2], k.shape[2]))
        return aten(q, k, *args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    for window in (None, 20):
        Case((2, 1, 32), half=torch.bfloat16, window=window).compare(5, 12, 1, 230, 1, 1, 1, 9, 17, 1)
    assert {keys for _, keys in shapes} <= {64, 256, 512}  # 64 in the trials
    assert {rows for rows, _ in shapes} <= {2, 8, 16, 32, 64, 256}
    case = Case((2, 1, 32), half=torch.bfloat16, capacity=300)
    case.compare(290, 1, 9)
    assert (8, 300) not in shapes and (16, 300) in shapes


def test_sdpa_is_of_the_cache_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(half=torch.bfloat16)
    case.compare(4, 1)
    cache = case.cache()
    places: list[tuple[int, int]] = []
    aten = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        places.append((k.data_ptr(), v.data_ptr()))
        return aten(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    case.ours(case.mixed(5), cache, step(0, 5, 64))
    case.ours(case.mixed(1), cache, step(5, 1, 64))
    assert places == 2 * [(cache.k.codes.data_ptr(), cache.v.codes.data_ptr())]
    assert not cache.k.codes[:, 6:256].any() and cache.k.codes[:, 256:].isnan().all()


def test_sdpa_leaves_what_takes_too_much(monkeypatch: pytest.MonkeyPatch, few_positions: list[int]) -> None:
    monkeypatch.setattr(sdpa, "MOST_BYTES", 4 * 256 * (8 * 64 + 8 * 2 * 64))
    case = Case(half=torch.bfloat16)
    case.compare(60, 1)
    assert not few_positions
    case.compare(65)
    assert few_positions == [65, 65]


def garbage(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return torch.randn(*q.shape[:-1], v.shape[-1]).to(q.dtype)


def first_keys_causal(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Aligned at the last key, as other libraries' causal masks are."""
    if not options.pop("is_causal", False):
        return ATEN(q, k, v, **options)
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return ATEN(q, k, v, **(options | {"attn_mask": mask}))


def missing(*args: Any, **options: Any) -> Tensor:
    raise RuntimeError("could not create a primitive")


ATEN = F.scaled_dot_product_attention


@pytest.mark.parametrize("wrong", [garbage, first_keys_causal, missing])
def test_an_sdpa_that_is_wrong_is_passed_over(wrong: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "scaled_dot_product_attention", wrong)
    case = Case(formats=("bf16", "bf16"), half=torch.bfloat16)
    case.compare(9, 20, 1)
    assert case.notes["attention"].endswith("many tokens torch, piecewise")
    assert any(trial.tier == "native" and not trial.passed for trial in case.tiers.trials)
    assert ("torch" in case.notes["attention"].split(",")[0]) == (wrong is not first_keys_causal)


def test_products_of_halves_come_in_float32_where_torch_has_them() -> None:
    """The operator that Intel's and NVIDIA's torch have, given to the CPU's."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("bmm.dtype", lambda a, b, dtype: torch.bmm(a.to(dtype), b.to(dtype)), "CPU")
        case = Case(formats=("int8", "int8"), first="torch")
        case.compare(5, 9, 1)
    assert [trial.passed for trial in case.tiers.trials if trial.op.startswith("wide")] == [True]
    case = Case(formats=("int8", "int8"), first="torch")
    case.compare(5)
    assert [trial.passed for trial in case.tiers.trials if trial.op.startswith("wide")] == [False]


def test_large_scores_do_not_overflow_fp16() -> None:
    case = Case((2, 2, 64))
    cache, x = case.cache(), 60 * case.mixed(9)
    found = case.ours(x, cache, step(0, 9, 64))
    assert (x.float().view(9, 6, 64)[:, 0] ** 2).sum(-1).max() > 65504
    assert found.isfinite().all()


def test_no_host_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[Any] = ["bf16", "int8", "int4", "fp8"]
    cases = [Case(formats=(kind, kind), first=first) for kind in kinds for first in ("native", "torch")]
    for case in cases:
        case.compare(4, 1)

    def never(*args: object) -> None:
        raise AssertionError("a value was asked for")

    for name in ("item", "__int__", "__bool__", "__float__", "tolist", "__index__"):
        monkeypatch.setattr(Tensor, name, never)
    for case in cases:
        cache = case.cache()
        case.ours(case.mixed(9), cache, step(0, 9, 64))
        case.ours(case.mixed(1), cache, step(9, 1, 64))


@pytest.mark.parametrize("name", ["fp32", "bf16", "int8", "int4", "fp8"])
@pytest.mark.parametrize("dim", [64, 80])
def test_a_piece_is_what_the_format_says(name: Any, dim: int) -> None:
    store = KVStore(kv_format(name), 2, dim, 300, torch.device("cpu"))
    store.write(torch.arange(300), torch.randn(300, 2, dim, generator=torch.Generator().manual_seed(0)))
    for start, stop in ((0, 300), (3, 259), (299, 300)):
        found = pieces.expand(store, start, stop, torch.float16)
        assert found.shape[1] == key_length(stop - start) and not found[:, stop - start :].any()
        values = found[:, : stop - start].float()
        if store.format.rotated:
            values = pieces.hadamard32(values)
        torch.testing.assert_close(values[..., :dim], store.read(start, stop), rtol=1e-3, atol=4e-3)


@pytest.mark.parametrize(
    ("formats", "geometry", "window"),
    [
        (("bf16", "bf16"), (2, 1, 32), 5), (("int8", "int4"), (3, 1, 64), None), (("int4", "int4"), (2, 1, 80), None),
        (("fp8", "int8"), (2, 1, 64), None),
    ],
)  # fmt: skip
def test_triton(
    formats: tuple[Any, Any], geometry: tuple[int, int, int], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(attention, "usable", lambda card: True)
    case = Case(geometry, formats, window=window, norms=True, first="triton")
    case.compare(3, 1)
    assert case.notes["append"] == "triton" and case.notes["attention"].startswith("triton, ")
    cache = case.cache()
    assert case.ours.recordable(cache)
    case.ours(case.mixed(2), cache, step(0, 2, geometry[2]))
    x, at = case.mixed(1), step(2, 1, geometry[2])
    wanted = case.ours(x, cache, at)
    # What a replayed step knows of where it stands.
    assert torch.equal(case.ours(x, cache, replace(at, start=0, limit=64)), wanted)
    monkeypatch.setattr(attention, "usable", lambda card: False)
    assert not Case(geometry, formats).ours.recordable(cache)


def test_buckets() -> None:
    assert [bucket(n) for n in (1, 8, 9, 16, 17, 64, 65, 128, 129, 300, 512)] == [
        8, 8, 16, 16, 32, 64, 128, 128, 256, 384, 512
    ]  # fmt: skip
    assert all(bucket(bucket(n)) == bucket(n) >= n for n in range(1, 600))
    assert [key_length(n) for n in (1, 256, 257, 1000)] == [256, 256, 512, 1024]
