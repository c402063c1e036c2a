"""The pictures: what they show of made-up rows, and that a file is whole or not there."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from test_cli_tables import BENCH, EVAL

from qrun import plot
from qrun.errors import UsageError


def words(picture: Path) -> set[str]:
    """The texts of an SVG, which matplotlib notes beside the outlines it draws."""
    return set(re.findall(r"<!-- (.*?) -->", picture.read_text(encoding="utf-8")))


def test_speed_as_bars(tmp_path: Path) -> None:
    rows = [
        replace(BENCH, recipe=recipe, test=test, model="a $b$ model")
        for recipe in ("W4A16C16", "W8A16C16")
        for test in ("pp64", "pp512", "tg128")
    ]
    plot.speed(rows, tmp_path / "x.svg")
    found = words(tmp_path / "x.svg")
    assert {"W4A16C16", "W8A16C16", "pp64", "pp512", "tg128", "reading a prompt", "writing"} <= found
    assert "a $b$ model: CPU, 2 threads" in found
    assert "tokens already in the cache" not in found


def test_speed_by_depth(tmp_path: Path) -> None:
    rows = [replace(BENCH, test=f"pp64{at}", kv=kv) for kv in ("bf16", "int8") for at in ("", " @ d512", " @ d4096")]
    plot.speed(rows, tmp_path / "x.svg")
    found = words(tmp_path / "x.svg")
    assert {"W4A16C16, bf16 cache, pp64", "W4A16C16, int8 cache, pp64", "tokens already in the cache"} <= found
    assert "writing" not in found


def test_quality(tmp_path: Path) -> None:
    rows = [
        replace(EVAL, recipe=recipe, kv=kv, kl_mean=kl)
        for recipe, kv, kl in (
            ("W16A16C16", "bf16", 0.0), ("W16A16Ck8v4", "k8v4", 0.01), ("mix:dense=w8,kv=k8v4", "k8v4", 0.02),
        )
    ]  # fmt: skip
    plot.quality(rows, tmp_path / "x.svg")
    found = words(tmp_path / "x.svg")
    assert {"W16A16", "mix:dense=w8", "k8v4", "k8v4 cache", "bits per weight", "KiB of cache per token"} <= found
    assert "bf16 cache" not in found, "what does not diverge has no place on a logarithmic axis"
    plot.quality(rows[1:2], tmp_path / "x.svg")
    assert "KiB of cache per token" not in words(tmp_path / "x.svg")
    plot.quality([rows[1], replace(rows[1], recipe="W16A16C4", kv="int4")], tmp_path / "x.svg")
    assert "KiB of cache per token" in words(tmp_path / "x.svg")
    assert "bits per weight" not in words(tmp_path / "x.svg"), "they are all the same"
    plot.quality(rows[:1], tmp_path / "x.svg")


def test_a_png_and_its_unfinished_self(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = tmp_path / "x.PNG"
    plot.check(picture)
    plot.speed([BENCH], picture)
    before = picture.read_bytes()
    assert before.startswith(b"\x89PNG")

    def break_off(*arguments: object, **options: object) -> Iterator[None]:
        Path(str(arguments[1])).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", break_off)
    with pytest.raises(KeyboardInterrupt):
        plot.speed([BENCH], picture)
    assert picture.read_bytes() == before
    assert list(tmp_path.iterdir()) == [picture]


def test_what_cannot_be_drawn_to(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"x\.pdf: name a file"):
        plot.check(tmp_path / "x.pdf")
    with pytest.raises(UsageError, match="no folder"):
        plot.check(tmp_path / "nowhere" / "x.png")
    plot.check(Path("x.svg"))
