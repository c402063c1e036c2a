"""Comparing what `qrun bench` wrote: which rows belong together, and when a ratio means something."""

import json
from pathlib import Path
from typing import Any

import pytest

from qrun.bench_compare import Comparison, compare, differences, read
from qrun.cli.main import main
from qrun.errors import UsageError

ROW: dict[str, Any] = {
    "model": "m", "backend": "cpu", "recipe": "W4A16C16", "kv": "bf16", "test": "pp512", "threads": 2,
    "device": "CPU, 2 threads", "processor": "A 9", "qrun": "1", "torch": "2", "samples": [100.0, 101.0, 99.0],
}  # fmt: skip


def write(path: Path, *changes: dict[str, Any], lines: bool = False) -> Path:
    rows = [ROW | change for change in changes]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows), encoding="utf-8")
    return path


def compared(folder: Path, *files: list[list[float]]) -> list[Comparison]:
    """A row per list of samples, in a file per argument."""
    paths = [write(folder / f"{i}.json", *({"samples": samples} for samples in rows)) for i, rows in enumerate(files)]
    return compare([read(path) for path in paths])


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ([100, 101, 99], [120, 121, 119], "faster"),
        ([100, 101, 99], [80, 81, 79], "slower"),
        ([100, 101, 99], [102, 103, 101], "within noise"),  # three errors of 0.8 %
        ([100, 130, 70], [120, 150, 90], "within noise"),
        ([100, 100, 100], [101.5, 101.5, 101.5], "within noise"),  # 2 % at least
        ([100], [200, 201], "one run"),
    ],
)
def test_verdicts(tmp_path: Path, before: list[float], after: list[float], verdict: str) -> None:
    (row,) = compared(tmp_path, [before], [after])
    assert row.verdict == verdict
    assert row.ratio == pytest.approx(sorted(after)[len(after) // 2] / sorted(before)[len(before) // 2], rel=0.01)
    assert (row.noise is None) == (verdict == "one run")


def test_noise_is_three_standard_errors_of_the_ratio(tmp_path: Path) -> None:
    (row,) = compared(tmp_path, [[90, 100, 110]], [[180, 200, 220]])
    assert row.ratio == pytest.approx(2)
    assert row.noise == pytest.approx(3 * (2 * (0.1 / 3**0.5) ** 2) ** 0.5)
    (row,) = compared(tmp_path, [[90, 100, 110], [90, 100, 110]], [[180, 200, 220]])
    assert row.noise < 3 * (2 * (0.1 / 3**0.5) ** 2) ** 0.5, "rows of one test are taken together"


def test_rows_are_joined_by_what_was_measured(tmp_path: Path) -> None:
    names = ({"test": "tg8"}, {}, {"kv": "int8"}, {"recipe": "W8A16C16"}, {"backend": "cuda"}, {"model": "n"})
    first = write(tmp_path / "a.json", *names)
    other = write(tmp_path / "b.jsonl", {"samples": [50, 51]}, {"test": "tg9"}, lines=True)
    rows = compare([read(first), read(other), read(first)])
    assert [(row.test, row.kv, row.other[-6:], row.verdict) for row in rows[:4]] == [
        ("tg8", "bf16", ".jsonl"[-6:], "only in the first"),
        ("tg8", "bf16", "a.json", "within noise"),
        ("pp512", "bf16", ".jsonl"[-6:], "slower"),
        ("pp512", "bf16", "a.json", "within noise"),
    ]
    assert [row.verdict for row in rows].count("only in the first") == 5
    assert (rows[-1].test, rows[-1].verdict, rows[-1].first_median) == ("tg9", "not in the first", None)
    assert len(rows) == 13, "what only the second file has is nothing to the third"


def test_other_machines_are_named(tmp_path: Path) -> None:
    first = read(write(tmp_path / "a.json", {}))
    other = read(write(tmp_path / "b.json", {"threads": 4, "processor": "B 7"}, {"threads": 2, "processor": "B 7"}))
    found = differences([first, other])
    assert len(found) == 2
    assert "a B 7" in found[0] and "a A 9" in found[0]
    assert "4 threads and 2 threads" in found[1]
    assert differences([first, first]) == []
    busy = read(write(tmp_path / "c.json", {"busy": 0.02}, {"busy": 0.5}, {"busy": "much"}))
    assert [text[-55:] for text in differences([first, busy])] == [
        "measured while other programs took 50 % of the processor"[-55:]
    ]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "[1]", "[", "nonsense", '[{"model": "m"}]', "[" * 100_000, '{"samples": [1]}\n{'],
)
def test_what_is_no_result(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=r"x\.json.*qrun bench"):
        read(path)


@pytest.mark.parametrize("samples", [[], [0], [-1.0], ["1"], [True], [float("nan")], [1e999], None, 5, [10**400]])
def test_what_are_no_speeds(tmp_path: Path, samples: Any) -> None:
    with pytest.raises(UsageError, match="no test of qrun bench"):
        read(write(tmp_path / "x.json", {"samples": samples}))


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read(tmp_path / "missing.json")
    (tmp_path / "latin.json").write_bytes(b"[\xe9]")
    with pytest.raises(UsageError, match="cannot read"):
        read(tmp_path / "latin.json")
    monkeypatch.setattr("qrun.bench_compare.LARGEST", 3)
    with pytest.raises(UsageError, match="over"):
        read(write(tmp_path / "x.json", {}))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write(tmp_path / "a.json", {}, {"test": "\x1b[31mtg8"})
    other = write(tmp_path / "b.json", {"samples": [120.0, 121.0, 119.0], "threads": 4})
    assert main(["bench", "compare", str(first), str(other)]) == 0
    out, err = capsys.readouterr()
    assert "\x1b" not in out
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()]
    assert table[2][-5:] == ["100.00", "120.00", "1.200", "± 0.023", "faster"]
    assert table[3][-5:] == ["100.00", "", "", "", "only in the first"]
    assert "4 threads" in err
    assert main(["bench", "compare", str(first), str(other), "-o", "json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert (written[0]["ratio"], written[1]["ratio"], written[0]["verdict"]) == (1.2, None, "faster")


def test_a_model_named_compare_is_a_path(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "compare", "only.json"]) == 2
    assert "two files or more" in capsys.readouterr().err
    assert main(["bench", "./compare"]) == 3
    assert "./compare" in capsys.readouterr().err
    assert main(["bench", "--help"]) == 0
    assert "qrun bench compare" in capsys.readouterr().out
