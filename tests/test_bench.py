"""The benchmark: what it counts and on which tokens it runs. The speeds themselves are the machine's affair."""

import dataclasses
import math
import statistics
from pathlib import Path

import pytest
import torch
from oracle import make

from qrun import resident
from qrun.api import load
from qrun.bandwidth import read_bandwidth
from qrun.bench import Test, bytes_per_token, measure, run
from qrun.cli.bench_cmd import cells
from qrun.engine import Engine
from qrun.errors import ContextOverflowError, RecipeError, UsageError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make("ernie-moe", path, torch.bfloat16)
    return path


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return load(folder, "bf16", context=64, cache=False)


@pytest.mark.parametrize(
    ("text", "test"),
    [
        ("pp512", Test("pp", 512)),
        (" TG128 ", Test("tg", 128)),
        ("pp512@d4096", Test("pp", 512, 4096)),
        ("tg8 @ d16", Test("tg", 8, 16)),
    ],
)
def test_names_of_tests(text: str, test: Test) -> None:
    assert Test.parse(text) == test
    assert Test.parse(str(test)) == test


@pytest.mark.parametrize("text", ["", "pp", "pp0", "xx5", "pp5@", "pp5@d", "pp-5", "5"])
def test_wrong_names_of_tests(text: str) -> None:
    with pytest.raises(UsageError, match="pp512"):
        Test.parse(text)


@pytest.mark.parametrize("test", [Test("pp", 9), Test("tg", 5), Test("pp", 9, 20), Test("tg", 5, 20)], ids=str)
def test_a_run_handles_exactly_the_tokens_it_says(engine: Engine, test: Test) -> None:
    prompts: list[list[int]] = []
    for turn in range(3):
        sample = measure(engine, test, turn=turn)
        assert sample.first_token > 0 and sample.seconds > 0
        held = list(engine.cached_ids)
        assert len(held) == test.depth + test.tokens + (test.kind == "tg")
        prompts.append(held)
    assert len({tuple(held[: test.depth]) for held in prompts}) == 1, "the history is read once and kept"
    assert len({held[test.depth] for held in prompts}) == 3, "a repeated run must not find its own tokens in the cache"


def test_a_test_longer_than_the_context(engine: Engine) -> None:
    with pytest.raises(ContextOverflowError):
        measure(engine, Test("pp", 65))
    with pytest.raises(UsageError, match="context of 66 tokens"):
        measure(engine, Test("tg", 65))


def test_bytes_per_token(engine: Engine) -> None:
    """Everything but the embedding's table, of the experts only the chosen ones, and the cache up to here."""
    config = engine.config
    assert config.moe is not None and config.tied
    sizes = {line.role: line.bytes for line in engine.card.roles}
    expected = sum(sizes.values()) - sizes["experts"] * (1 - config.moe.top_k / config.moe.experts)
    assert bytes_per_token(engine) == pytest.approx(expected)
    assert bytes_per_token(engine, 10) == pytest.approx(expected + 10 * engine.card.kv_bytes_per_token)


def test_rows(folder: Path) -> None:
    said: list[str] = []
    rows = list(
        run(
            folder,
            quants=["bf16", "wint4"],
            kvs=["int8", None],
            tests=[Test("pp", 8), Test("tg", 3)],
            repeats=3,
            progress=lambda what, done, total: said.append(what),
            cache=False,
        )
    )
    assert [(row.recipe, row.kv, row.test) for row in rows] == [
        (recipe, kv, test)
        for recipes in (("W16A16C8", "W16A16C16"), ("W4A16C8", "W4A16C16"))
        for recipe, kv in zip(recipes, ("int8", "bf16"), strict=True)
        for test in ("pp8", "tg3")
    ]
    for row in rows:
        assert len(row.samples) == 3 and all(math.isfinite(speed) and speed > 0 for speed in row.samples)
        assert row.mean == pytest.approx(statistics.fmean(row.samples))
        assert row.median == statistics.median(row.samples)
        assert row.std == pytest.approx(statistics.stdev(row.samples))
        assert row.load_seconds > 0 and row.peak_memory > 50e6 and row.bandwidth > 0
        assert (row.first_token_seconds is None) == (row.bandwidth_share is not None) == row.test.startswith("tg")
        assert row.model == str(folder) or row.model == folder.name
    assert rows[0].size > rows[-1].size
    assert rows[0].threads == torch.get_num_threads() and cells(rows[0])[4] == str(rows[0].threads)
    assert cells(dataclasses.replace(rows[0], threads=None))[4] == "n/a"
    assert any("tg3" in text for text in said)
    assert set(dataclasses.asdict(rows[0])) >= {"model", "size", "recipe", "test", "median", "samples"}


@pytest.mark.parametrize("wrong", [{"repeats": 0}, {"tests": []}, {"quants": []}, {"kvs": []}])
def test_an_empty_sweep(folder: Path, wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="at least one"):
        next(run(folder, **wrong))


def test_a_wrong_recipe_is_named_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="wint5000"):
        next(run(tmp_path / "nowhere", quants=["bf16", "wint5000"]))


def test_read_bandwidth_leaves_the_thread_count_alone() -> None:
    before = torch.get_num_threads()
    assert 1e8 < read_bandwidth(1, size=1 << 22, repeats=3) < 1e13
    assert torch.get_num_threads() == before


def test_read_bandwidth_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for the device after every so many passes; the CPU by another name stands for one."""
    waited: list[int] = []
    monkeypatch.setattr(torch.cpu, "synchronize", lambda: waited.append(1))
    assert 1e8 < read_bandwidth(device="cpu:0", size=1 << 22, repeats=3) < 1e13
    assert len(waited) == 2 * 4


def test_peak_memory_counts_what_was_and_can_start_anew() -> None:
    resident.reset_peak()
    before = resident.peak()
    block = torch.ones(32 << 20, dtype=torch.uint8)
    during = resident.peak()
    assert during - before > 30e6
    del block
    assert resident.peak() >= during - 1e6
