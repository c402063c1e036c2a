"""Mixture-of-experts blocks of the XPU backend, a CPU standing in for the card, against the plain ones in float32."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gpu_doubles import difference
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from xpu_aten import aten_of_xpu
from xpu_doubles import card

from qrun.backends import xpu_experts, xpu_moe
from qrun.backends.base import Backend, MoESpec, MoEWeights
from qrun.backends.xpu_matrix import expand
from qrun.backends.xpu_moe import MoEBlock, stacks
from qrun.backends.xpu_native import LINEARS as NATIVE
from qrun.backends.xpu_plain import LINEARS as PLAIN
from qrun.backends.xpu_stack import joins, stack
from qrun.backends.xpu_tiers import Tiers
from qrun.formats import QTensor, format_of
from qrun.kernels import reference
from qrun.recipe import WeightScheme

EPS = 1e-5
BOUND = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
SCHEMES = {
    "bf16": WeightScheme("bf16", 16),
    "int8": WeightScheme("int", 8, 0),
    "int4 channel": WeightScheme("int", 4, 0),
    "int4 g32": WeightScheme("int", 4, 32, True),
    "int4 g64": WeightScheme("int", 4, 64, False),
    "fp8": WeightScheme("fp8", 8),
    "nf4": WeightScheme("nf4", 4),
    "nvfp4": WeightScheme("nvfp4", 4),
    "trellis": WeightScheme("trellis", 4),
}
TOKENS = (1, 2, 8, 9, 40)


@pytest.fixture(autouse=True)
def aten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The operators that only Intel GPUs have in torch; experts are gathered where a test does not say otherwise."""
    torch.manual_seed(0)
    monkeypatch.setattr(xpu_experts, "usable", lambda card: False)
    with aten_of_xpu():
        yield


def weight(name: str, *shape: int) -> QTensor:
    """Experts of magnitudes that differ, or one matrix."""
    values = torch.randn(*shape) * 0.05
    if len(shape) == 3:
        values = values * torch.linspace(0.5, 2, shape[0]).view(-1, 1, 1)
    return format_of(SCHEMES[name]).quantize(values)


def weights(experts: int, hidden: int, inner: int, up: str, down: str | None = None, **others: Any) -> MoEWeights:
    return MoEWeights(
        norm=torch.rand(hidden) + 0.5,
        router=torch.randn(experts, hidden) * 0.2,
        gate_up=weight(up, experts, 2 * inner, hidden),
        down=weight(down or up, experts, hidden, inner),
        **others,
    )


class Noted(list[tuple[str, str, bool]]):
    """What a block says of its kernels."""

    def __call__(self, op: str, scheme: object, kernel: str, *, fallback: bool = False) -> None:
        self.append((op, kernel, fallback))


def block(
    spec: MoESpec, of: MoEWeights, half: torch.dtype = torch.bfloat16, noted: Noted | None = None, **options: Any
) -> MoEBlock:
    one = card(half)
    settings: dict[str, Any] = {"kernels": (*NATIVE, *PLAIN), "shared": None} | options
    return MoEBlock(EPS, spec, of, one, Tiers(one), Noted() if noted is None else noted, **settings)


def spec_of(top_k: int, *, normalise: bool = True, norm_min: float = 1e-12) -> MoESpec:
    return MoESpec(top_k=top_k, normalise=normalise, norm_min=norm_min)


@pytest.mark.parametrize("half", BOUND)
@pytest.mark.parametrize(
    ("up", "down"), [(name, name) for name in SCHEMES if name != "trellis"] + [("int8", "int4 g64"), ("nvfp4", "bf16")]
)
def test_experts_are_the_plain_ones(up: str, down: str, half: torch.dtype) -> None:
    """Each number of tokens by what multiplies so many, with a width that fills no group."""
    of = weights(8, 160, 96, up, down)
    ours, theirs = block(spec_of(3), of, half), Backend().moe_block(EPS, spec_of(3), of)
    for tokens in TOKENS:
        x = torch.randn(tokens, 160)
        assert difference(ours(x) - x, theirs(x) - x) < BOUND[half], tokens


@pytest.mark.parametrize(
    ("experts", "top_k", "hidden", "inner"), [(64, 8, 72, 40), (16, 1, 104, 72), (8, 8, 64, 32), (5, 2, 48, 128)]
)
@pytest.mark.parametrize("name", ["int4 g64", "int8"])
def test_numbers_of_experts_and_odd_widths(name: str, experts: int, top_k: int, hidden: int, inner: int) -> None:
    of = weights(experts, hidden, inner, name)
    ours, theirs = block(spec_of(top_k), of, torch.float16), Backend().moe_block(EPS, spec_of(top_k), of)
    for tokens in (1, 9, 40, 300):
        x = torch.randn(tokens, hidden)
        assert difference(ours(x) - x, theirs(x) - x) < 2e-3, tokens


def exactly(of: MoEWeights, h: torch.Tensor, gates: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    up, down = of.gate_up.dequantize(), of.down.dequantize()
    inner = reference.silu_mul(torch.einsum("skij,sj->ski", up[chosen], h.float()))
    return torch.einsum("skji,ski,sk->sj", down[chosen], inner, gates)


@pytest.mark.parametrize(("name", "end_to_end"), [("int4 g32", True), ("nvfp4", False)])
def test_experts_are_read_in_place(name: str, end_to_end: bool) -> None:
    """Triton's kernel, on stacks of both layouts, in groups and padded."""
    pytest.importorskip("triton")
    of = weights(3, 48, 16, name)
    up, down = stack(of.gate_up, torch.float16, end_to_end=False), stack(of.down, torch.float16, end_to_end=end_to_end)
    h, gates, chosen = torch.randn(2, 48).half(), torch.rand(2, 2), torch.tensor([[2, 1], [0, 2]])
    scaled = gates if down.ratio is None else gates * down.ratio[chosen]
    found = xpu_experts.in_place(up, down)(h, scaled, chosen)
    assert difference(found, exactly(of, h, gates, chosen)) < 1e-3


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("name", ["int4 g32", "bf16"])
def test_experts_in_place_go_first_where_they_are_right(
    name: str, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where its kernel has codes to read; 16-bit experts are gathered."""
    of, noted = weights(4, 80, 48, name), Noted()
    monkeypatch.setattr(xpu_experts, "usable", lambda card: True)
    monkeypatch.setattr(xpu_experts, "in_place", lambda *_: lambda *given: (1 if right else 1.1) * exactly(of, *given))
    ours, theirs = block(spec_of(2), of, torch.float16, noted), Backend().moe_block(EPS, spec_of(2), of)
    assert ("in place" if right and name != "bf16" else "gathered") in noted[0][1]
    x = torch.randn(3, 80)
    assert difference(ours(x) - x, theirs(x) - x) < 2e-3


@pytest.mark.parametrize("norm_min", [1e-12, 0.9])
@pytest.mark.parametrize("normalise", [False, True])
def test_routing_and_shared_experts(normalise: bool, norm_min: float) -> None:
    """The correction chooses and weighs nothing; shared experts are given what the others are; x is counted once."""
    shared = {"shared_gate_up": weight("int8", 128, 96), "shared_down": weight("int8", 96, 64)}
    of = weights(8, 96, 64, "int4 g32", correction=torch.randn(8), **shared)
    spec = spec_of(2, normalise=normalise, norm_min=norm_min)
    widen, narrow = (Backend().linear(shared[f"shared_{name}"]) for name in ("gate_up", "down"))
    ours = block(spec, of, torch.float16, shared=lambda h: narrow(reference.silu_mul(widen(h.float()))))
    theirs = Backend().moe_block(EPS, spec, of)
    for tokens in (1, 40):
        x = torch.randn(tokens, 96)
        before = x.clone()
        assert difference(ours(x) - x, theirs(x) - x) < 2e-3
        assert torch.equal(x, before)


def test_all_tokens_may_choose_the_same_experts() -> None:
    of = weights(16, 64, 32, "bf16", correction=torch.arange(16.0) * 10)
    x = torch.randn(300, 64)
    ours, theirs = block(spec_of(2), of, torch.float16), Backend().moe_block(EPS, spec_of(2), of)
    assert difference(ours(x) - x, theirs(x) - x) < 2e-3


def test_what_is_held_at_once_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens in parts, the last one smaller, are the same as at once."""
    of = weights(8, 96, 64, "int4 g64")
    x = torch.randn(40, 96)
    whole, parts = block(spec_of(2), of)(x), []
    inner = xpu_moe.sorted_slots

    def counted(chosen: torch.Tensor, experts: int, columns: int) -> Any:
        parts.append(len(chosen))
        return inner(chosen, experts, columns)

    monkeypatch.setattr(xpu_moe, "SLOTS", 17 * 2 * 96)
    monkeypatch.setattr(xpu_moe, "sorted_slots", counted)
    assert difference(block(spec_of(2), of)(x), whole) < 1e-6
    assert parts == [32, 32, 8]


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("name", ["int4 g64", "int8", "nvfp4"])
def test_nothing_waits_for_the_device(name: str, tokens: int) -> None:
    """With tensors that have shapes and no values, whatever looks at one raises, as it does in the plain block."""
    of = weights(8, 96, 64, name, correction=torch.randn(8))
    ours, theirs = block(spec_of(2), of), Backend().moe_block(EPS, spec_of(2), of)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(torch.randn(tokens, 96))
        assert ours(x).shape == (tokens, 96)
        with pytest.raises(DataDependentOutputException):
            theirs(x)


def test_kernels_are_noted_and_expanding_is_a_fallback() -> None:
    for name, kernels, fallback in (
        ("int4 g64", (*NATIVE, *PLAIN), False), ("int8", (*NATIVE, *PLAIN), False), ("int4 g64", PLAIN, True),
    ):  # fmt: skip
        noted = Noted()
        block(spec_of(2), weights(4, 96, 128, name), noted=noted, kernels=kernels)
        assert [op for op, _, _ in noted] == ["experts gate_up", "experts down"]
        assert {expanded for _, _, expanded in noted} == {fallback}, noted
        assert all(kernel.startswith("torch" if fallback else "aten") for _, kernel, _ in noted), noted


@pytest.mark.parametrize("name", [name for name in SCHEMES if name != "trellis"])
@pytest.mark.parametrize("end_to_end", [False, True])
def test_chosen_experts_are_one_weight(name: str, end_to_end: bool) -> None:
    q = weight(name, 5, 48, 72)
    if end_to_end and not joins(q[0], torch.bfloat16):
        assert name in ("int8", "int4 channel")
        return
    experts, chosen = stack(q, torch.bfloat16, end_to_end=end_to_end), torch.tensor([3, 0, 3])
    placed = experts.take(chosen)
    assert (placed.n, placed.k) == ((48, 3 * experts.width) if end_to_end else (144, 72))
    values = expand(placed, 0, placed.n, torch.float32)
    values = values.view(48, 3, -1).transpose(0, 1)[..., :72] if end_to_end else values.view(3, 48, 72)
    if experts.ratio is not None:
        values = values * experts.ratio[chosen][:, None, None]
    assert difference(values, q.dequantize()[chosen]) < 1e-6


def test_codes_that_stay_as_they_are_are_not_copied() -> None:
    q = weight("int4 g64", 4, 32, 128)
    assert stack(q, torch.bfloat16, end_to_end=False).whole.codes.data_ptr() == q.codes.data_ptr()


def test_formats_without_a_layout_are_said_to_have_none() -> None:
    of = weights(2, 256, 256, "int4 g64")
    assert stacks(of)
    assert not stacks(weights(2, 256, 256, "int4 g64", "trellis"))
