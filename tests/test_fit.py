"""What fits: the table against the forecast that refuses a load, its recommendation, and its forecast against loads."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from oracle import make

from qrun.aliases import ALIASES
from qrun.cli.fit_cmd import parse_memory
from qrun.cli.main import main
from qrun.errors import BackendError, UsageError
from qrun.fit import Place, best, find_place, fit
from qrun.memory import forecast
from qrun.models import describe
from qrun.models.plan import plan
from qrun.outline import Outline
from qrun.recipe import Recipe
from qrun.tensorfile import TensorWriter

RECIPES = [Recipe.parse(name) for name in ("bf16", "wint8", "wint4")]
ERNIE = Outline(name="ernie:21b", config=describe(ALIASES["ernie:21b"].config), tied=True)


def place(free: float, device: str = "cpu") -> Place:
    return Place(device=device, free=int(free), resident=340_000_000, threads=2, about="of a machine")


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu"])
def test_rows_are_the_forecasts(device: str) -> None:
    rows = fit(ERNIE, RECIPES, [4096, 32768, -1], place(16e9, device))
    assert [(row.recipe, row.context) for row in rows[3:5]] == [("wint8", 4096), ("wint8", 32768)]
    assert len(rows) == 9 and rows[2].context == 131072
    for row in rows:
        need = forecast(ERNIE.config, Recipe.parse(row.recipe), row.context, tied=True, device=device)
        assert (row.weights, row.cache, row.needed) == (need.weights, need.kv, need.needed)
        assert row.fits == (need.needed <= 16e9) == (row.most_context >= row.context)
    assert {row.most_context > 0 for row in rows if row.recipe == "wint8"} == {False}


@pytest.mark.parametrize(
    ("free", "recipe", "context"),
    [
        (60e9, "bf16", 131072), (52e9, "bf16", 32768), (50.5e9, "bf16", 4096), (26e9, "wint4", 131072),
        (27.5e9, "wint8", 32768), (14e9, "wint4", 4096),
    ],
)  # fmt: skip
def test_the_first_recipe_with_some_memory_to_spare(free: float, recipe: str, context: int) -> None:
    """At 26 GB wint8 would fit, but leave hardly anything; at 14 GB nothing leaves a tenth."""
    rows = fit(ERNIE, RECIPES, [4096, 32768, -1], place(free))
    chosen = [row for row in rows if row.recommended]
    assert [(row.recipe, row.context) for row in chosen] == [(recipe, context)]
    assert best(rows) == chosen[0] and chosen[0].fits


def test_nothing_fits() -> None:
    rows = fit(ERNIE, RECIPES, [4096], place(8e9))
    assert not any(row.recommended or row.fits for row in rows)
    assert best(rows).recipe == "wint4"


def test_contexts_end_where_the_model_does() -> None:
    rows = fit(ERNIE, RECIPES[:1], [1 << 20, -1, 131072, 4096], place(1e12))
    assert [row.context for row in rows] == [131072, 4096]


def test_files_in_32_bits_take_more_to_read() -> None:
    wide = Outline(name="x", config=ERNIE.config, tied=True, itemsize=4)
    (narrow,), (wider,) = (fit(outline, RECIPES[2:], [4096], place(1e12)) for outline in (ERNIE, wide))
    assert wider.weights == narrow.weights and wider.needed > narrow.needed


def test_another_machine_needs_no_device_here() -> None:
    assert (find_place("cuda", 3, 24).device, find_place("auto", 3, 24).device) == ("cuda", "cpu")
    here = find_place("cpu")
    assert 0 < here.free <= psutil.virtual_memory().total and here.threads >= 1
    assert find_place("xpu", 1, 24).device == "xpu"
    if not torch.xpu.is_available():
        with pytest.raises(BackendError, match="--device cpu"):
            find_place("xpu")
    if not (torch.cuda.is_available() or torch.xpu.is_available()):
        assert find_place("auto").device == "cpu"
        with pytest.raises(BackendError, match="--device cpu"):
            find_place("cuda")


def test_table_of_one_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "ernie:21b", "--kv", "bf16,int8", "-c", "4096,32k", "--memory", "16GB"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert len(lines) == 2 + 4 * 2 * 2 and len({len(line) for line in lines}) == 1
    (star,) = [line for line in lines if "*" in line]
    assert [cell.strip() for cell in star.split("|")[2:6]] == ["ernie:21b", "wint4", "int8", "32768"]
    assert "qrun chat ernie:21b --wint4 --kv int8 -c 32k" in err
    assert "16.0 GB are free of memory" in err


def test_a_line_for_each_of_several(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--memory", "24GB", "--device", "cuda", "-o", "csv"]) == 0
    found = {row["model"]: row for row in csv.DictReader(capsys.readouterr().out.splitlines())}
    assert set(found) == set(ALIASES)
    assert (found["llama3.1:8b"]["recipe"], found["ernie:300b"]["fits"]) == ("bf16", "False")
    assert main(["fit", "qwen3", "--memory", "24GB", "-o", "jsonl"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["model"] for row in rows} == {name for name in ALIASES if name.startswith("qwen3:")}


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["ernie:21b", "--memory", "8GB"], 0),
        (["ernie:21b", "--wint4", "--memory", "8GB"], 4),
        (["ernie:21b", "--quant", "bf16,wint4", "--memory", "16GB"], 0),
        (["ernie:21b", "--wint4", "-c", "max", "--memory", "16GB"], 4),
        (["ernie:21b", "-c", "max", "--kv", "int4", "--memory", "8GB"], 4),
        (["nosuch"], 3),
        (["./nosuch"], 3),
        (["org/name", "--offline"], 3),
        (["spark", "-c", "4096,x"], 2),
        (["spark", "--quant", "wint4,w99"], 2),
        (["spark", "--memory", "much"], 2),
        (["spark", "--threads", "0"], 2),
    ],
)
def test_exit_codes(options: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *options]) == code
    out, err = capsys.readouterr()
    assert bool(out) == (code in (0, 4)), "what was asked for is shown even where none of it fits"
    assert ("nothing of this fits" in err) == (options[-1] == "8GB" or code == 4)
    assert "Traceback" not in err


def test_sizes_of_memory() -> None:
    assert [parse_memory(text) for text in ("16GB", "24 GiB", "1.5g", "640m", "7")] == [
        16_000_000_000, 24 << 30, 1_500_000_000, 640_000_000, 7,
    ]  # fmt: skip
    for wrong in ("", "GB", "0", "-1GB", "1 2", "1e9", "1ib", "nan"):
        with pytest.raises(UsageError, match="--memory"):
            parse_memory(wrong)


LOAD = """
import sys, json, qrun
card = qrun.load(sys.argv[1], sys.argv[2], device="cpu", context=64, cache=False).card
print(json.dumps([card.predicted_peak, card.measured_peak, card.weight_bytes]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 104 million random parameters, and a tiny one beside it, for the kernels to be compiled with."""
    path = tmp_path_factory.mktemp("models") / "big"
    make("llama", path.parent / "tiny", torch.bfloat16)
    config = {
        "model_type": "llama", "hidden_act": "silu", "hidden_size": 768, "intermediate_size": 2560,
        "num_hidden_layers": 10, "num_attention_heads": 12, "num_key_value_heads": 4, "vocab_size": 32000,
        "max_position_embeddings": 4096, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    with TensorWriter(path / "model.safetensors") as writer:
        for weight in plan(describe(config), tied=True):
            for source in weight.parts[0]:
                writer.add(source.name, torch.randn(source.shape).bfloat16())
    return path


def run(*command: str) -> Any:
    return json.loads(subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, check=True).stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists() or os.name != "posix", reason="peaks are read from /proc")
@pytest.mark.parametrize("quant", ["bf16", "wint4"])
def test_a_load_is_as_expected(folder: Path, quant: str) -> None:
    """Within a tenth, of the run card's expectation and of the table's, in processes of their own."""
    run("-c", LOAD, str(folder.parent / "tiny"), quant)
    expected, measured, weights = run("-c", LOAD, str(folder), quant)
    (row,) = run("-m", "qrun.cli", "fit", str(folder), "--quant", quant, "-c", "64", "--device", "cpu", "-o", "json")
    assert expected == pytest.approx(measured, rel=0.1)
    assert row["loading"] == pytest.approx(measured, rel=0.1)
    assert row["weights"] == weights
    assert measured < row["needed"]
