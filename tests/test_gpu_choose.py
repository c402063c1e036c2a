"""Choosing on the GPU, experts and tokens: the kernels against their twins, and the twins against the sampler."""

from typing import Any

import pytest
import torch
from gpu_doubles import DEVICE, difference

from qrun.kernels import gpu_router, gpu_sample, reference, reference_choose
from qrun.sampler import Sampler, Sampling


def route_buffers(tokens: int, experts: int, out: int) -> dict[str, torch.Tensor]:
    return {
        "logits": torch.full((tokens, experts), torch.nan, device=DEVICE),
        "counter": torch.zeros(tokens, dtype=torch.int32, device=DEVICE),
        "gates": torch.full((tokens, out), torch.nan, device=DEVICE),
        "chosen": torch.full((tokens, out), -9, dtype=torch.int32, device=DEVICE),
    }


@pytest.mark.parametrize(
    ("tokens", "experts", "width", "top_k", "shared", "normalise", "corrected"),
    [
        (1, 5, 37, 2, 0, True, False),
        (3, 10, 300, 3, 2, True, True),
        (1, 64, 512, 6, 1, False, True),
        (3, 70, 129, 8, 0, True, True),  # experts compared in pieces
        (10, 5, 33, 5, 1, False, False),  # several experts a program, and all of them chosen
        (1, 3, 4500, 2, 0, True, True),  # more blocks than are on their way at once
    ],
)
def test_route_is_its_twin(
    tokens: int, experts: int, width: int, top_k: int, shared: int, normalise: bool, corrected: bool
) -> None:
    torch.manual_seed(experts)
    norm = (torch.rand(width) + 0.5).to(DEVICE)
    router = (torch.randn(experts, width) / width**0.5).to(DEVICE)
    correction = (torch.randn(experts) * 0.1).to(DEVICE) if corrected else None
    settings: dict[str, Any] = {"top_k": top_k, "shared": shared, "normalise": normalise, "norm_min": 1e-6}
    buffers = route_buffers(tokens, experts, top_k + shared)
    for _ in range(2):  # the counters must be zero again after the first
        x = torch.randn(tokens, width, device=DEVICE) * 3
        gates, chosen = gpu_router.route(x, norm, 1e-5, router, correction, **settings, **buffers)
        twin = route_buffers(tokens, experts, top_k + shared)
        wanted, places = reference_choose.route(x, norm, 1e-5, router, correction, **settings, **twin)
        assert chosen.tolist() == places.tolist()
        assert difference(gates, wanted) < 1e-5
        assert difference(buffers["logits"], twin["logits"]) < 1e-5
        assert not buffers["counter"].any()


def test_routes_twin_is_the_norm_and_the_reference() -> None:
    torch.manual_seed(0)
    x, norm, router, correction = torch.randn(3, 20), torch.rand(20), torch.randn(6, 20), torch.randn(6)
    buffers = {name: made.cpu() for name, made in route_buffers(3, 6, 4).items()}
    gates, chosen = reference_choose.route(
        x, norm, 1e-5, router, correction, top_k=2, shared=2, normalise=True, norm_min=0.8, **buffers
    )
    hidden = reference.rms_norm(x, norm, 1e-5)
    wanted, places = reference.route(hidden, router, correction, 2, normalise=True, norm_min=0.8)
    assert torch.equal(gates, torch.cat((wanted, torch.ones(3, 2)), 1))
    assert chosen.tolist() == [[*row, 6, 7] for row in places.tolist()]


@pytest.mark.parametrize("fill", [0.0, torch.nan])
def test_equal_experts_and_nan_choose_experts_that_exist(fill: float) -> None:
    x, norm, router = torch.full((1, 16), fill), torch.ones(16), torch.ones(5, 16)
    buffers = route_buffers(1, 5, 3)
    gates, chosen = gpu_router.route(
        x.to(DEVICE), norm.to(DEVICE), 1e-5, router.to(DEVICE), None,
        top_k=3, shared=0, normalise=True, norm_min=1e-6, **buffers,
    )  # fmt: skip
    assert chosen.tolist() == [[0, 1, 2]]
    assert bool(gates.isnan().all()) == (fill != 0)


def sample_buffers(vocab: int, seed: int, step: int = 0) -> dict[str, torch.Tensor]:
    return {
        "seed": torch.tensor([seed], device=DEVICE),
        "counter": torch.tensor([step], device=DEVICE),
        "values": torch.full((64,), torch.nan, device=DEVICE),
        "ids": torch.full((64,), -9, dtype=torch.int32, device=DEVICE),
        "token": torch.full((1,), -9, dtype=torch.int64, device=DEVICE),
        "keys": torch.full((gpu_sample.scratch(vocab),), -9, dtype=torch.int64, device=DEVICE),
        "arrived": torch.zeros(1, dtype=torch.int32, device=DEVICE),
    }


OFF: dict[str, Any] = {"temperature": 1.0, "top_k": 64, "top_p": 1.0, "min_p": 0.0}
PLACES = torch.tensor([4990, 17, 1300, 18, 4000])
CHANCES = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
HAND: list[tuple[dict[str, Any], torch.Tensor]] = [
    ({}, CHANCES),
    ({"temperature": 0.5}, CHANCES**2 / (CHANCES**2).sum()),
    ({"top_k": 2}, torch.tensor([4 / 7, 3 / 7, 0, 0, 0])),
    ({"top_p": 0.6}, torch.tensor([4 / 7, 3 / 7, 0, 0, 0])),
    ({"top_p": 0.71}, torch.tensor([0.4, 0.3, 0.15, 0, 0]) / 0.85),
    ({"min_p": 0.3}, torch.tensor([0.4, 0.3, 0.15, 0, 0]) / 0.85),
    ({"top_k": 3, "top_p": 0.8}, torch.tensor([4 / 7, 3 / 7, 0, 0, 0])),
    ({"top_k": 1}, torch.tensor([1.0, 0, 0, 0, 0])),
]


def spread(vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [1, vocab] of CHANCES at some places, all others all but impossible, and the places."""
    places = PLACES if vocab > 5 else torch.arange(5)
    logits = torch.full((1, vocab), -60.0)
    logits[0, places] = CHANCES.log()
    return logits.to(DEVICE), places


@pytest.mark.parametrize(("settings", "expected"), HAND)
def test_the_twins_frequencies(settings: dict[str, Any], expected: torch.Tensor) -> None:
    logits, _ = spread(5)
    buffers = sample_buffers(5, seed=1)
    tokens = [reference_choose.sample(logits, **(OFF | settings), **buffers).clone() for _ in range(2000)]
    found = torch.bincount(torch.cat(tokens).cpu(), minlength=5) / 2000
    assert (found - expected).abs().max() < 0.035
    assert buffers["counter"].item() == 2000


@pytest.mark.parametrize("vocab", [5, 5000])
@pytest.mark.parametrize(("settings", "expected"), HAND)
def test_the_cuts_leave_what_the_sampler_can_choose(
    vocab: int, settings: dict[str, Any], expected: torch.Tensor
) -> None:
    logits, places = spread(vocab)
    buffers = sample_buffers(vocab, seed=2)
    gpu_sample.sample(logits, **(OFF | settings), **buffers)
    kept = buffers["values"] > 1e-6  # without a cut, what is all but impossible stays
    sampler = Sampler(Sampling(**(OFF | settings), seed=1), [], vocab, DEVICE)
    drawn = torch.cat([sampler(logits) for _ in range(300)])
    assert set(buffers["ids"][kept].tolist()) == set(drawn.tolist()) == set(places[expected > 0].tolist())
    left = buffers["values"][kept].cpu()
    assert difference(left / left.sum(), expected[expected > 0]) < 1e-5


def test_observed_frequencies_over_several_blocks() -> None:
    logits, places = spread(5000)
    buffers, twin = sample_buffers(5000, seed=1), sample_buffers(5000, seed=1)
    settings = OFF | {"top_p": 0.9, "top_k": 20}
    draws = 120
    found = torch.cat([gpu_sample.sample(logits, **settings, **buffers).clone() for _ in range(draws)])
    wanted = torch.cat([reference_choose.sample(logits, **settings, **twin).clone() for _ in range(draws)])
    assert found.tolist() == wanted.tolist()
    counts = torch.tensor([int((found == place).sum()) for place in places]) / draws
    assert (counts - torch.tensor([0.4, 0.3, 0.15, 0.1, 0]) / 0.95).abs().max() < 0.12
    assert buffers["counter"].item() == draws


def hard_cases() -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    one_group = torch.randn(1, 5000)
    groups = gpu_sample._groups(5000)
    members = [run * 8 * groups + group * 8 + i for group in (3, 4, 9) for run in range(8) for i in range(8)]
    one_group[0, [i for i in members if i < 5000]] += 20
    return {
        "small": torch.randn(1, 50),
        "odd": torch.randn(1, 4097) * 3,
        "flat": torch.zeros(1, 3000),
        "few groups hold the best": one_group,
        "few are possible": torch.where(torch.rand(1, 3000) < 0.003, torch.randn(1, 3000), -torch.inf),
        "signed zeros": torch.zeros(1, 3000) * torch.randn(1, 3000).sign(),
        "some NaN": torch.where(torch.rand(1, 300) < 0.1, torch.nan, torch.randn(1, 300)),
        "nothing": torch.full((1, 300), torch.nan),
    }


@pytest.mark.parametrize("name", hard_cases())
def test_sample_is_its_twin(name: str) -> None:
    logits = hard_cases()[name].to(DEVICE)
    vocab = logits.shape[1]
    for settings in ({"temperature": 0.7, "top_k": 40, "top_p": 0.94, "min_p": 0.02}, OFF | {"top_k": 7}):
        # A seed of more than 32 bits, and more draws than 32 bits count numbers for.
        buffers, twin = (sample_buffers(vocab, seed=77**9, step=(1 << 26) - 1) for _ in range(2))
        for _ in range(2):
            assert gpu_sample.sample(logits, **settings, **buffers) is buffers["token"]
            reference_choose.sample(logits, **settings, **twin)
            assert buffers["ids"].tolist() == twin["ids"].tolist()
            assert buffers["counter"].item() == twin["counter"].item()
            assert not buffers["arrived"].any()
            assert difference(buffers["values"], twin["values"]) < 1e-5
            assert buffers["token"].item() == twin["token"].item()


@pytest.mark.parametrize("name", hard_cases())
def test_zero_temperature_is_argmax(name: str) -> None:
    logits = hard_cases()[name].to(DEVICE)
    buffers = sample_buffers(logits.shape[1], seed=0)
    for row in (logits, logits.flip(1).contiguous()):
        token = gpu_sample.sample(row, **(OFF | {"temperature": 0}), **buffers)
        assert token.item() == torch.where(row.isnan(), -torch.inf, row).argmax()
    assert not buffers["arrived"].any()


def test_a_reply_repeats_by_its_seed_and_its_calls_differ() -> None:
    def some(choice: gpu_sample.DeviceChoice) -> list[int]:
        return [int(choice(torch.zeros(1, 100, device=DEVICE))) for _ in range(8)]

    first = gpu_sample.DeviceChoice(100, DEVICE, **OFF, seed=7)
    tokens = some(first)
    assert len(set(tokens)) > 3
    assert some(first) != tokens
    first.restart(7)
    assert some(first) == tokens
    assert some(gpu_sample.DeviceChoice(100, DEVICE, **OFF, seed=8)) != tokens


def test_the_sampler_takes_it() -> None:
    def choose(s: Sampling) -> gpu_sample.DeviceChoice | None:
        if not gpu_sample.handles(s.temperature, s.top_k):
            return None
        return gpu_sample.DeviceChoice(
            6, DEVICE, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p, seed=s.seed or 0
        )

    logits = torch.arange(6.0, device=DEVICE)[None]
    sampler = Sampler(Sampling(top_k=1, repeat_penalty=10.0), [], 6, DEVICE, choose=choose)
    assert [int(sampler(logits)) for _ in range(3)] == [5, 4, 3]
    assert gpu_sample.handles(0, 0) and gpu_sample.handles(1, 64)
    assert not gpu_sample.handles(1, 0) and not gpu_sample.handles(1, 65)
