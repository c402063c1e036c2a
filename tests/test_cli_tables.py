"""The commands that print tables and facts: bench, eval, cache and info, on rows made up or from the double engine."""

import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cli_doubles
import psutil
import pytest

import qrun
import qrun.bench
import qrun.eval
from qrun.bench import BenchRow
from qrun.cli.cache_cmd import age, ago
from qrun.cli.card import number, rows, size
from qrun.cli.main import main
from qrun.cli.table import markdown
from qrun.errors import UsageError
from qrun.eval import EvalRow

BENCH = BenchRow(
    model="double", size=2_500_000, parameters=5_100_000, backend="cpu", device="CPU, 2 threads", threads=2,
    recipe="W4A16C16", kv="bf16", test="pp512", mean=1234.5, std=6.7, median=1234.0, samples=(1230.0, 1239.0),
    variation=0.005, drift=0.0, noisy=False, in_turns=True, first_token_seconds=0.41, load_seconds=1.2,
    quantize_seconds=0.5, from_store=False, peak_memory=600_000_000, bandwidth=2e10, bandwidth_share=None,
)  # fmt: skip
EVAL = EvalRow(
    model="double", parameters=5_100_000, recipe="W4A16C16", kv="bf16", size=2_500_000, bits_per_weight=3.92,
    kv_bytes_per_token=2560, reference="W16A16C16", text="book.txt", window=512, tokens=99, perplexity=4.5,
    perplexity_error=0.5, kl_mean=0.012, kl_median=0.01, kl_p99=0.1, top1=0.95,
    perplexity_by_quarter=(4.0, 4.5, 4.6, 4.9), kl_by_quarter=(0.011, 0.012, 0.0125, 0.0133),
)  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Let the measurements return the rows above; holds what they were asked."""
    found: dict[str, object] = {}

    def run(model: str, **options: object) -> Iterator[BenchRow]:
        found.update(options, model=model)
        yield from found.get("rows", (BENCH, BENCH))

    def evaluate(model: str, quants: object, kvs: object, text: object, **options: object) -> list[EvalRow]:
        found.update(options, model=model, quants=quants, kvs=kvs, text=text)
        return found.get("rows", [EVAL])

    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 4.0)
    monkeypatch.setattr(qrun.bench, "run", run)
    monkeypatch.setattr(qrun.eval, "evaluate", evaluate)
    return found


def test_bench_forms(asked: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    line = ["bench", "--quant", "bf16,wint4", "--kv", "int8,k8v4", "-p", "16,32", "-n", "8", "-d", "0,64", "-r", "2"]
    assert main(line) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 4
    assert len({len(row) for row in table}) == 1
    assert "1234.50 ± 6.70" in table[2]
    assert [str(test) for test in asked["tests"]] == [
        "pp16", "pp32", "tg8", "pp16 @ d64", "pp32 @ d64", "tg8 @ d64",
    ]  # fmt: skip
    assert asked["kvs"] == ["int8", "k8v4"]
    assert [recipe.name for recipe in asked["quants"]] == ["bf16", "wint4"]
    assert "context" not in asked
    assert main(["bench", "-o", "csv"]) == 0
    found = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert (found[0]["test"], found[0]["samples"], len(found)) == ("pp512", "1230.0 1239.0", 2)
    assert main(["bench", "-o", "jsonl"]) == 0
    assert [json.loads(row)["mean"] for row in capsys.readouterr().out.splitlines()] == [1234.5, 1234.5]
    assert main(["bench", "-o", "json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert len(written) == 2 and written[0]["samples"] == [1230.0, 1239.0]
    assert written[0]["qrun"] == qrun.__version__ and written[0]["busy"] == 0.04
    assert {"torch", "processor", "cores", "when"} <= set(written[0])


def test_bench_says_what_disturbed_it(
    asked: dict[str, object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "qwen3"]) == 0
    assert capsys.readouterr().err == ""
    disturbed = replace(BENCH, noisy=True, variation=0.02, drift=-0.11, test="tg128")
    asked["rows"] = [BENCH, disturbed, replace(BENCH, in_turns=False, text="built-in", kl_mean=0.5, top1=0.875)]
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 55.0)
    assert main(["bench", "qwen3", "--quality"]) == 0
    out, err = capsys.readouterr()
    for part in (
        "other programs take 55 %",
        "1 of 3 tests",
        "tg128 of W4A16C16 by 11 %",
        "one after another",
        "built-in",
    ):
        assert part in err
    assert [cell.strip() for cell in out.splitlines()[0].split("|")[-3:-1]] == ["KL", "same top"]
    assert [cell.strip() for cell in out.splitlines()[-1].split("|")[-3:-1]] == ["0.50000", "87.5 %"]
    assert asked["quality"] is True


def test_eval_of_long_windows_shows_how_the_divergence_grows(
    asked: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "--window", "2048"]) == 0
    header, _, row = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in header.split("|")[-3:-1]] == ["KL 1st ¼", "KL last ¼"]
    assert [cell.strip() for cell in row.split("|")[-3:-1]] == ["0.01100", "0.01330"]
    assert main(["eval"]) == 0
    assert "¼" not in capsys.readouterr().out
    asked["rows"] = [replace(EVAL, text="built-in")]
    assert main(["eval"]) == 0
    assert "qrun eval --text FILE" in capsys.readouterr().err


def test_pictures(
    asked: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("bench", "eval"):
        picture = tmp_path / f"{command}.svg"
        assert main([command, "--plot", str(picture)]) == 0
        assert "</svg>" in picture.read_text(encoding="utf-8")
        asked.clear()
        capsys.readouterr()
        assert main([command, "--plot", str(tmp_path / "picture.pdf")]) == 2
        assert ".png or .svg" in capsys.readouterr().err
        with monkeypatch.context() as without:
            without.setitem(sys.modules, "matplotlib", None)
            assert main([command, "--plot", str(picture)]) == 2
        assert 'pip install "qrun-llm[plot]"' in capsys.readouterr().err
        assert asked == {}, "nothing is measured for a picture that cannot be drawn"


def test_eval(asked: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval"]) == 0
    assert "4.500 ± 0.500" in capsys.readouterr().out
    assert [recipe.label for recipe in asked["quants"]][:2] == ["W16A16C16", "W8A16C16"]
    assert main(["eval", "--wint4", "-o", "json", "-n", "50"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["kl_mean"] == 0.012
    assert [recipe.name for recipe in asked["quants"]] == ["wint4"]
    assert asked["max_tokens"] == 50


def test_info(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(qrun, "load", cli_doubles.load, raising=False)
    assert main(["info", "--wint4"]) == 0
    out = capsys.readouterr().out
    for word in ("python", "memory", "int4 g64", "KiB a token", "numba int4 dot", "(fallback)"):
        assert word in out
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["card"]["bindings"][0]["op"] == "qkv"
    assert found["machine"]["qrun"] == qrun.__version__


def test_numbers_as_people_write_them() -> None:
    assert [size(n) for n in (0, 999, 1500, 640_000_000, 12_900_000_000)] == [
        "0 B", "999 B", "1.5 KB", "640 MB", "12.9 GB",
    ]  # fmt: skip
    assert [number(n) for n in (5_100_000, 360_000_000, 21_900_000_000)] == ["5.1 M", "360 M", "21.9 B"]
    assert [ago(n) for n in (5, 65, 7300, 200_000)] == ["5 s", "1 min", "2 h", "2 d"]
    assert age("30d") == 30 * 86400
    with pytest.raises(UsageError):
        age("30")
    assert dict(rows(cli_doubles.CARD))["loaded"] == "in 1.2 s, quantized in 0.5 s"


def test_a_table_is_as_wide_as_its_widest_cell() -> None:
    assert list(markdown(("a", "b"), [("long", "1"), ("x", "22")], left=1)) == [
        "| a    |  b |\n",
        "|------|---:|\n",
        "| long |  1 |\n",
        "| x    | 22 |\n",
    ]
