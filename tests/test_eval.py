"""The quality measures: against a computation from transformers' own logits, and their sense of direction."""

import math
from pathlib import Path

import pytest
import tokenizers
import torch
from oracle import logits, make
from tokenizers import models, pre_tokenizers

from qrun.errors import UsageError
from qrun.eval import HELD_OUT, EvalRow, evaluate

WINDOW = 24
IDS = [(5 * i * i + 3 * i + 1) % 97 for i in range(90)]
TEXT = " ".join(f"w{i}" for i in IDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer of one word per id, and a held-out text."""
    path = tmp_path_factory.mktemp("model")
    make("ernie-moe", path, torch.bfloat16, hidden_size=128)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 131)} | {"w0": 131, "w1": 132, "w2": 133}
    tokenizer = tokenizers.Tokenizer(models.WordLevel({k: v for k, v in words.items() if v < 131}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / HELD_OUT).write_text(TEXT, encoding="utf-8")
    return path


def rows_of(folder: Path, *args: object, **options: object) -> list[EvalRow]:
    return evaluate(folder, *args, window=WINDOW, cache=False, **options)


def test_against_transformers(folder: Path) -> None:
    """Perplexity of every token but the first of each window, in the reference precision."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = [0 if i < 3 else i for i in IDS]
    losses: list[float] = []
    for start in range(0, len(ids), WINDOW):
        window = ids[start : start + WINDOW]
        scores = torch.log_softmax(logits(model, window), -1)
        losses += [-float(scores[at, token]) for at, token in enumerate(window[1:])]
    (row,) = rows_of(folder, ["fp32"], reference="fp32")
    assert row.tokens == len(losses) == 90 - 4
    assert row.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-3)
    assert row.perplexity_error > 0
    assert row.kl_mean == row.kl_p99 == 0 and row.top1 == 1


def test_fewer_bits_move_the_distribution_further(folder: Path) -> None:
    rows = rows_of(folder, ["wint8", "wint4", "wint2"])
    assert [row.recipe for row in rows] == ["W8A16C16", "W4A16C16", "W2A16C16"]
    assert 0 < rows[0].kl_mean < rows[1].kl_mean < rows[2].kl_mean
    assert rows[0].size > rows[1].size > rows[2].size
    for row in rows:
        assert row.reference == "W16A16C16"
        assert row.kl_median <= row.kl_p99 and 0 <= row.top1 <= 1


def test_every_cache_format_for_every_recipe(folder: Path) -> None:
    rows = rows_of(folder, ["bf16", "wint8"], [None, "int8", "int4"])
    assert [row.kv for row in rows] == ["bf16", "int8", "int4"] * 2
    plain, eight, four = rows[:3]
    assert plain.kl_mean == 0 < eight.kl_mean < four.kl_mean
    assert plain.kv_bytes_per_token > eight.kv_bytes_per_token > four.kv_bytes_per_token


def test_a_text_of_ones_own(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT[: len(TEXT) // 2], encoding="utf-8")
    (from_file,) = rows_of(folder, text=file)
    (from_text,) = rows_of(folder, text=file.read_text(encoding="utf-8"))
    (limited,) = rows_of(folder, text=file, max_tokens=10)
    assert from_file == from_text
    assert limited.tokens == 9


def test_texts_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in folder.iterdir():
        if file.name != HELD_OUT:
            (bare / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UsageError, match="no held-out text"):
        rows_of(bare)
    with pytest.raises(UsageError, match="cannot read"):
        rows_of(folder, text=tmp_path / "missing.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UsageError, match="UTF-8"):
        rows_of(folder, text=tmp_path / "latin.txt")
    with pytest.raises(UsageError, match="1 tokens"):
        rows_of(folder, text="w5")
    with pytest.raises(UsageError, match="at least one recipe"):
        rows_of(folder, [])
