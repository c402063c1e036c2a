"""The benchmark: what it counts and on which tokens it runs. The speeds themselves are the machine's affair."""

import dataclasses
import math
import statistics
from pathlib import Path

import psutil
import pytest
import torch
from oracle import make

import qrun.bench
import qrun.contender
from qrun import resident
from qrun.api import load
from qrun.bandwidth import read_bandwidth
from qrun.bench import BenchRow, Sample, Test, bytes_per_token, measure, run
from qrun.cli.bench_cmd import cells
from qrun.contender import Contender, fit_beside
from qrun.engine import Engine
from qrun.errors import ContextOverflowError, RecipeError, UsageError
from qrun.recipe import Recipe


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
        for kv, recipes in (("int8", ("W16A16C8", "W4A16C8")), ("bf16", ("W16A16C16", "W4A16C16")))
        for recipe in recipes
        for test in ("pp8", "tg3")
    ]
    for row in rows:
        assert len(row.samples) == 3 and all(math.isfinite(speed) and speed > 0 for speed in row.samples)
        assert row.mean == pytest.approx(statistics.fmean(row.samples))
        assert row.median == statistics.median(row.samples)
        assert row.std == pytest.approx(statistics.stdev(row.samples))
        assert row.load_seconds > 0 and row.peak_memory > 50e6 and row.bandwidth > 0
        assert (row.quantize_seconds is None) == row.recipe.startswith("W16") and not row.from_store
        assert row.quantize_seconds is None or 0 < row.quantize_seconds < row.load_seconds
        assert row.in_turns and row.kl_mean is None
        assert (row.first_token_seconds is None) == (row.bandwidth_share is not None) == row.test.startswith("tg")
        assert row.model == str(folder) or row.model == folder.name
    assert rows[0].size > rows[-1].size
    assert rows[0].threads == torch.get_num_threads() and cells(rows[0])[4] == str(rows[0].threads)
    assert cells(dataclasses.replace(rows[0], threads=None))[4] == "n/a"
    assert any("tg3" in text for text in said)
    assert set(dataclasses.asdict(rows[0])) >= {"model", "size", "recipe", "test", "median", "samples"}


SWEEP = {"quants": ["bf16", "wint8"], "tests": [Test("pp", 8), Test("tg", 3), Test("pp", 8, 4)], "cache": False}


def runs(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: object) -> tuple[list[str], list[BenchRow]]:
    """What a sweep runs, in order, and its rows; the speed of a run is 100 t/s and what its test and turn say."""
    made: list[str] = []

    def play(engine: Engine, test: Test, *, turn: int) -> Sample:
        made.append(f"{engine.card.recipe[:3]} {test} {turn}")
        speed = 100 + (turn * 10 if test.kind == "tg" else 0)
        return Sample(test.tokens / speed, 0.5)

    monkeypatch.setattr(qrun.bench, "measure", play)
    monkeypatch.setattr(qrun.bench, "read_bandwidth", lambda: 1e9)
    return made, list(run(folder, **(SWEEP | options)))


def test_all_recipes_and_the_tests_of_one_depth_take_turns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, rows = runs(folder, monkeypatch, repeats=1)
    round_ = ["W16 pp8", "W16 tg3", "W8A pp8", "W8A tg3"]
    deep = ["W16 pp8 @ d4", "W8A pp8 @ d4"]
    assert made == [f"{name} {turn}" for names in (round_, deep) for turn in (0, 1) for name in names]
    assert [f"{row.recipe[:3]} {row.test}" for row in rows] == round_ + deep
    assert all(row.in_turns for row in rows)


def test_recipes_come_one_by_one_where_memory_is_short(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qrun.contender, "available", lambda device: 1 << 20)
    made, rows = runs(folder, monkeypatch, repeats=1, tests=SWEEP["tests"][:2])
    assert made == [f"{r} {test} {turn}" for r in ("W16", "W8A") for turn in (0, 1) for test in ("pp8", "tg3")]
    assert not any(row.in_turns for row in rows)


def test_noise(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, (steady, rising) = runs(folder, monkeypatch, repeats=4, quants=["bf16"], tests=SWEEP["tests"][:2])
    assert (steady.variation, steady.drift, steady.noisy) == (pytest.approx(0), pytest.approx(0), False)
    assert rising.samples == pytest.approx((110, 120, 130, 140))  # the warm-up is none of them
    assert rising.drift == pytest.approx(135 / 115 - 1)
    assert rising.variation == pytest.approx(statistics.stdev((110, 120, 130, 140)) / 125)
    assert rising.noisy
    assert steady.in_turns, "a single recipe has nobody to wait for"


def test_what_fits_beside(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = [Recipe.parse(name) for name in ("bf16", "wint8", "fp32")]

    def least(recipes: list[Recipe], kvs: list[str | None]) -> int:
        """The memory from which on they fit, to 64 bytes."""
        low, high = 0, 1 << 40
        while high - low > 64:
            middle = (low + high) // 2
            monkeypatch.setattr(qrun.contender, "available", lambda device, free=middle: free)
            low, high = (low, middle) if fit_beside(engine, recipes, kvs) else (middle, high)
        return high

    two, three = least(recipes[:2], [None]), least(recipes, [None])
    kept = engine.context * engine.card.kv_bytes_per_token
    assert three - two > sum(line.bytes for line in engine.card.roles) * 1.5, "fp32 weights are twice those of BF16"
    assert least(recipes[:2], ["int8", "fp32"]) - two == pytest.approx(2 * kept, abs=128), "each its largest cache"


def test_the_memory_of_a_turn_is_its_engines(folder: Path) -> None:
    first = Contender.load(folder, Recipe.parse(), context=64, cache=False)
    second = Contender.load(folder, Recipe.parse("wint8"), beside=[first], context=64, cache=False)
    assert first.peak >= first.held > 50e6
    before = first.held, second.held, second.peak
    with second.turn():
        block = torch.ones(96 << 20, dtype=torch.uint8)
    assert 90e6 < second.held - before[1] < 120e6
    assert second.peak >= before[1] + 90e6
    assert first.held == before[0]
    del block
    second.set_kv("int4")
    assert second.engine.card.kv == "int4" and second.peak < before[2] + 200e6
    second.set_kv(None)
    assert second.engine.card.kv == "bf16"


def test_freed_memory_is_nobodys(folder: Path) -> None:
    """What was freed before a load is no part of its peak, though the C library may keep it."""
    blocks = [torch.ones(100_000, dtype=torch.uint8) for _ in range(2000)]  # each too small to be mapped by itself
    before = psutil.Process().memory_info().rss
    del blocks
    assert Contender.load(folder, Recipe.parse(), context=64, cache=False).held < before - 100e6


def test_quality_in_the_same_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qrun.bench, "QUALITY_TOKENS", 64)
    _, rows = runs(None, monkeypatch, quants=["bf16", "wint8"], kvs=[None, "int4"], tests=[Test("tg", 3)], quality=True)
    plain, eight, four, both = rows
    assert plain.kl_mean == 0 and plain.top1 == 1 and plain.text == "heldout.txt"
    assert 0 < eight.kl_mean < four.kl_mean and both.kl_mean not in (eight.kl_mean, four.kl_mean)
    assert cells(eight, quality=True)[-2:] == (f"{eight.kl_mean:.5f}", f"{100 * eight.top1:.1f} %")


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
