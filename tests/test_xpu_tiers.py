"""The choice of a kernel: by tier, by trial, remembered for the next start."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from xpu_doubles import card

from qrun.backends.xpu_device import XPUCard
from qrun.backends.xpu_matrix import Placed, place
from qrun.backends.xpu_plain import LINEARS as PLAIN
from qrun.backends.xpu_product import choose
from qrun.backends.xpu_tiers import LinearKernel, Multiply, Tier, Tiers
from qrun.formats import format_of
from qrun.recipe import Recipe


@dataclass(frozen=True)
class Way:
    tier: Tier
    name: str
    error: float = 0.0


NATIVE, IPEX, TRITON, TORCH = (Way(tier, f"{tier} kernel") for tier in ("native", "ipex", "triton", "torch"))
ALL = [TORCH, TRITON, IPEX, NATIVE]


def tried(way: Way) -> tuple[float, float]:
    return way.error, 1e-3


def test_the_first_tier_that_is_right_is_taken() -> None:
    tiers = Tiers(card())
    assert tiers.choose("op", ALL, tried) is NATIVE
    wrong = replace(NATIVE, error=0.5)
    assert tiers.choose("other", [TORCH, TRITON, IPEX, wrong], tried) is IPEX
    assert [trial.reason for trial in tiers.trials if not trial.passed] == [
        "wrong: its error is 0.5, at most 0.001 is right"
    ]


def test_nan_is_wrong() -> None:
    assert Tiers(card()).choose("op", [TORCH, replace(NATIVE, error=float("nan"))], tried) is TORCH


@pytest.mark.parametrize("error", [NotImplementedError("no such operator\nand a long story"), OSError(), KeyError("x")])
def test_what_raises_is_passed_over(error: Exception) -> None:
    def trial(way: Way) -> tuple[float, float]:
        if way is NATIVE:
            raise error
        return tried(way)

    tiers = Tiers(card())
    assert tiers.choose("op", ALL, trial) is IPEX
    assert tiers.trials[0].error is None
    assert tiers.trials[0].reason and "\n" not in tiers.trials[0].reason


@pytest.mark.parametrize("first", ["native", "ipex", "triton", "torch"])
def test_a_tier_may_go_first(first: Tier) -> None:
    assert Tiers(card(), first=first).choose("op", ALL, tried).tier == first


def test_trials_are_kept_for_the_device_and_its_driver(tmp_path: Path) -> None:
    made: list[str] = []

    def trial(way: Way) -> tuple[float, float]:
        made.append(way.name)
        return way.error, 1e-3

    real = replace(card(), real=True)
    ways = [TORCH, replace(NATIVE, error=0.5), IPEX]
    for _ in range(2):
        tiers = Tiers(real, folder=tmp_path)
        assert tiers.choose("op", ways, trial) is IPEX
        assert len(tiers.trials) == 2
    assert made == ["native kernel", "ipex kernel"]
    Tiers(replace(real, driver="1"), folder=tmp_path).choose("op", ways, trial)
    assert len(made) == 4
    for file in tmp_path.iterdir():
        file.write_text("{ not json")
    assert Tiers(real, folder=tmp_path).choose("op", ways, trial) is IPEX
    assert len(made) == 6


def test_the_last_one_is_taken_untried() -> None:
    def never(way: Way) -> tuple[float, float]:
        raise AssertionError(way)

    assert Tiers(card()).choose("op", [TORCH], never) is TORCH


def test_memory_that_ran_out_says_nothing_of_a_kernel(tmp_path: Path) -> None:
    def trial(way: Way) -> tuple[float, float]:
        raise torch.OutOfMemoryError("XPU out of memory")

    tiers = Tiers(replace(card(), real=True), folder=tmp_path)
    with pytest.raises(torch.OutOfMemoryError):
        tiers.choose("op", ALL, trial)
    assert not tiers.trials and not list(tmp_path.iterdir())


@pytest.mark.parametrize("tokens", [1, 8, 40])
def test_a_product_that_is_nan_for_some_tokens_is_wrong(tokens: int) -> None:
    def bind(placed: Placed, card: XPUCard, activations: str) -> Multiply:
        right = PLAIN[0].bind(placed, card, activations)
        return lambda x: right(x) * (float("nan") if x.shape[0] == tokens else 1.0)

    weight = place(format_of(Recipe.parse("bf16").dense).quantize(torch.randn(32, 64)), torch.bfloat16)
    broken = LinearKernel(tier="native", name="broken", most=None, takes=lambda *about: True, bind=bind)
    kernels = choose(weight, [broken, *PLAIN], card(), Tiers(card()), "16")
    assert broken not in (kernels if tokens == 8 else kernels[:1] if tokens == 1 else kernels[1:])
