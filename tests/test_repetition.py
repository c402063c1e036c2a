"""The loop detector: what must stop it, how soon, and what must not."""

import random
import time
from collections.abc import Iterable

import pytest

from qrun.repetition import LoopGuard


def stop_at(tokens: Iterable[int], guard: LoopGuard | None = None) -> int | None:
    """Number of tokens after which the guard fires, or None."""
    guard = guard or LoopGuard()
    for count, token in enumerate(tokens, 1):
        if guard.push(token):
            return count
    return None


def noise(count: int, seed: int = 0, vocabulary: int = 50_000) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(vocabulary) for _ in range(count)]


@pytest.mark.parametrize("cycle", [1, 2, 3, 7, 31, 64, 100, 255, 256])
@pytest.mark.parametrize("lead", [0, 1, 77, 1000])
def test_every_cycle_is_found_within_its_bound(cycle: int, lead: int) -> None:
    tokens = noise(lead, 1) + noise(cycle, 2) * (4000 // cycle)
    fired = stop_at(tokens)
    assert fired is not None
    assert lead + 256 + 4 * cycle <= fired <= lead + 256 + 4 * cycle + 32 + cycle


def test_a_cycle_longer_than_the_table_is_found_as_a_near_loop() -> None:
    fired = stop_at(noise(400, 3) * 30)
    assert fired is not None and 3000 < fired < 400 * 4 + 3000 + 100


def test_sentences_in_changing_order_are_a_near_loop() -> None:
    draw = random.Random(4)
    sentences = [noise(12, seed) for seed in range(10, 16)]
    tokens = [token for _ in range(2000) for token in draw.choice(sentences)]
    fired = stop_at(tokens)
    assert fired is not None and fired < 6000


def test_plain_text_never_fires() -> None:
    draw = random.Random(5)
    words = noise(300, 6)
    weights = [1 / (rank + 1) for rank in range(300)]
    assert stop_at(draw.choices(words, weights, k=20_000)) is None


def test_a_long_answer_copied_twice_does_not_fire() -> None:
    draft = noise(2500, 7)
    assert stop_at(draft * 3) is None


def row(cells: list[int]) -> list[int]:
    return [91, *(value for cell in cells for value in (cell, 44)), 93, 10]


@pytest.mark.parametrize(
    "tokens",
    [
        pytest.param([1] * 250, id="ruler"),
        pytest.param([5, 6] * 100, id="ha ha ha"),
        pytest.param(row([48] * 10) * 10, id="10x10 zeros"),
        pytest.param([t for n in range(500) for t in (1000 + n, 46, 32, 7, 8, 9, 10)], id="numbered list"),
        pytest.param([t for n in range(300) for t in (32, 32, 32, 32, 2000 + n, 61, 48, 10)], id="indented code"),
        pytest.param([t for n in range(16) for t in row([48 + (n == m) for m in range(16)])], id="identity matrix"),
        pytest.param(noise(100, 8) * 4, id="refrain four times"),
    ],
)
def test_honest_repetition_does_not_fire(tokens: list[int]) -> None:
    assert stop_at(noise(50, 9) + tokens + noise(50, 10)) is None


def test_a_cycle_that_ended_is_forgiven() -> None:
    assert stop_at(([3] * 200 + noise(40, 11)) * 3) is None


def test_it_is_cheap() -> None:
    tokens = [1, 2, 3] * 60 + noise(20_000, 12)
    start = time.process_time()
    assert stop_at(tokens) is None
    assert (time.process_time() - start) / len(tokens) < 60e-6
