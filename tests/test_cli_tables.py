"""The commands that print tables and facts: bench, eval, cache and info, on rows made up or from the double engine."""

import csv
import json
from collections.abc import Iterator

import cli_doubles
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
    model="double", size=2_500_000, parameters=5_100_000, backend="cpu", threads=2, recipe="W4A16C16", kv="bf16",
    test="pp512", mean=1234.5, std=6.7, median=1234.0, samples=(1230.0, 1239.0), first_token_seconds=0.41,
    load_seconds=1.2, peak_memory=600_000_000, bandwidth=2e10, bandwidth_share=None,
)  # fmt: skip
EVAL = EvalRow(
    model="double", recipe="W4A16C16", kv="bf16", size=2_500_000, kv_bytes_per_token=2560, reference="W16A16C16",
    tokens=99, perplexity=4.5, perplexity_error=0.5, kl_mean=0.012, kl_median=0.01, kl_p99=0.1, top1=0.95,
)  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Let the measurements return the rows above; holds what they were asked."""
    found: dict[str, object] = {}

    def run(model: str, **options: object) -> Iterator[BenchRow]:
        found.update(options, model=model)
        yield from (BENCH, BENCH)

    def evaluate(model: str, quants: object, kvs: object, text: object, **options: object) -> list[EvalRow]:
        found.update(options, model=model, quants=quants, kvs=kvs, text=text)
        return [EVAL]

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
    assert len(json.loads(capsys.readouterr().out)) == 2


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
