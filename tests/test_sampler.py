"""Sampling: each cut against a distribution worked out by hand, penalties by their definitions, seeds that repeat."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qrun.errors import UsageError
from qrun.sampler import Sampler, Sampling

OFF: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


def drawn(logits: torch.Tensor, count: int = 4000, **settings: Any) -> torch.Tensor:
    """Observed frequencies [V] of many draws."""
    sampler = Sampler(Sampling(**(OFF | {"seed": 1} | settings)), [], len(logits), "cpu")
    tokens = torch.cat([sampler(logits[None]) for _ in range(count)])
    return torch.bincount(tokens, minlength=len(logits)).float() / count


CHANCES = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, CHANCES),
        ({"temperature": 0.5}, CHANCES**2 / (CHANCES**2).sum()),
        ({"top_k": 2}, torch.tensor([4 / 7, 3 / 7, 0, 0, 0])),
        ({"top_p": 0.6}, torch.tensor([4 / 7, 3 / 7, 0, 0, 0])),
        ({"top_p": 0.71}, torch.tensor([0.4, 0.3, 0.15, 0, 0]) / 0.85),
        ({"min_p": 0.3}, torch.tensor([0.4, 0.3, 0.15, 0, 0]) / 0.85),
        # top-p is taken of what top-k left: 4/8.5 and 3/8.5 reach 0.8 of it, not of everything
        ({"top_k": 3, "top_p": 0.8}, torch.tensor([4 / 7, 3 / 7, 0, 0, 0])),
    ],
)
def test_observed_frequencies(settings: dict[str, Any], expected: torch.Tensor) -> None:
    assert (drawn(CHANCES.log(), **settings) - expected).abs().max() < 0.035


def test_top_p_over_a_flat_distribution_reaches_beyond_the_first_candidates() -> None:
    seen = drawn(torch.zeros(2000), count=6000, top_p=0.9)
    assert 1600 < (seen > 0).sum() <= 1800


def test_zero_temperature_takes_the_likeliest() -> None:
    assert Sampler(Sampling(temperature=0), [], 5, "cpu")(CHANCES.log()[None]).item() == 0


def test_a_seed_repeats_and_no_seed_does_not() -> None:
    def some(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(**OFF, seed=seed), [], 50, "cpu")
        return [int(sampler(torch.zeros(1, 50))) for _ in range(20)]

    assert some(7) == some(7) != some(8)
    assert some(None) != some(None)


def test_penalties_follow_their_definitions() -> None:
    logits = torch.tensor([[2.0, -1.0, 2.0, 0.5]])
    sampler = Sampler(Sampling(temperature=0, repeat_penalty=2.0), [0, 1], 4, "cpu")
    assert sampler._penalised(logits[0]).tolist() == [1.0, -2.0, 2.0, 0.5]
    assert int(sampler(logits)) == 2
    assert sampler._penalised(logits[0]).tolist() == [1.0, -2.0, 1.0, 0.5]

    sampler = Sampler(Sampling(temperature=0, presence_penalty=0.5, frequency_penalty=0.25), [0], 4, "cpu")
    assert int(sampler(logits)) == 0  # the prompt does not count here
    assert sampler._penalised(logits[0]).tolist() == [1.25, -1.0, 2.0, 0.5]


def test_a_device_may_choose_in_its_own_way_by_seeded_settings() -> None:
    asked: list[Sampling] = []
    shown: list[list[list[float]]] = []

    def choose(settings: Sampling) -> Callable[[torch.Tensor], torch.Tensor]:
        def largest(logits: torch.Tensor) -> torch.Tensor:
            shown.append(logits.tolist())
            return logits.argmax(-1)

        asked.append(settings)
        return largest

    sampler = Sampler(Sampling(repeat_penalty=2.0, presence_penalty=0.5), [1], 3, "cpu", choose=choose)
    tokens = [int(sampler(torch.tensor([[3.0, 4.0, 1.0]]))) for _ in range(3)]
    assert asked == [sampler.settings] and sampler.settings.seed is not None
    assert tokens == [0, 1, 1]
    assert shown == [[[3.0, 2.0, 1.0]], [[1.0, 2.0, 1.0]], [[1.0, 1.5, 1.0]]]


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2, "temperature": 2.0}], ids=str)
def test_only_what_is_allowed_is_drawn(settings: dict[str, Any]) -> None:
    """Cuts and chances are of what is allowed alone, and the logits themselves stay as they are."""
    allowed = torch.tensor([False, True, False, True, False])
    sampler, logits = Sampler(Sampling(**(OFF | {"seed": 1} | settings)), [], 5, "cpu"), CHANCES.log()[None]
    tokens = torch.cat([sampler(logits, allowed) for _ in range(2000)])
    alone = drawn(torch.where(allowed, CHANCES.log(), -1e9), count=2000, **settings)
    assert set(tokens.tolist()) <= {1, 3} and torch.equal(logits[0], CHANCES.log())
    assert (torch.bincount(tokens, minlength=5) / 2000 - alone).abs().max() < 0.05


def test_one_allowed_token_is_chosen_whatever_else_is_asked() -> None:
    shown: list[torch.Tensor] = []

    def choose(settings: Sampling) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda logits: (shown.append(logits), logits.argmax(-1))[1]

    only = torch.tensor([False, False, False, False, True])
    for settings in ({"temperature": 0}, {"top_k": 2, "top_p": 0.5, "repeat_penalty": 3.0, "frequency_penalty": 1.0}):
        for hook in ({}, {"choose": choose}):
            sampler = Sampler(Sampling(**(OFF | settings)), [4, 1], 5, "cpu", **hook)
            assert [int(sampler(CHANCES.log()[None], only)) for _ in range(3)] == [4, 4, 4]
    assert len(shown) == 6 and all(logits.isinf().sum() == 4 for logits in shown), (
        "the device's way is given masked ones"
    )


def test_settings_that_a_device_has_no_way_for_are_chosen_by_as_ever() -> None:
    def some(**hook: Any) -> list[int]:
        sampler = Sampler(Sampling(seed=3), [], 50, "cpu", **hook)
        return [int(sampler(torch.zeros(1, 50))) for _ in range(20)]

    assert some(choose=lambda settings: None) == some()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0), ("top_p", 1.1), ("min_p", 1),
        ("repeat_penalty", 0), ("presence_penalty", float("inf")), ("seed", -1),
    ],
)  # fmt: skip
def test_impossible_values_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(UsageError, match=field):
        Sampling(**{field: value})


def test_defaults_from_a_generation_config() -> None:
    found = Sampling.from_generation_config(
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
    )
    assert found == Sampling(temperature=0.6, top_k=0, top_p=0.9, repeat_penalty=1.1)
    assert Sampling.from_generation_config({"do_sample": False, "top_p": 0.5}).temperature == 0
    assert Sampling.from_generation_config({"eos_token_id": 2}) == Sampling()
    with pytest.raises(UsageError, match="temperature"):
        Sampling.from_generation_config({"temperature": "hot"})
