"""The quality measures: against a computation from transformers' own logits, and their sense of direction."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
from oracle import logits, make
from tokenizers import models, pre_tokenizers

import qrun.eval
from qrun.api import load
from qrun.errors import DoesNotFitError, UsageError
from qrun.eval import BUILT_IN, HELD_OUT, EvalRow, evaluate

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
    assert (from_file.text, from_text.text) == ("text.txt", "")
    assert replace(from_file, text="") == from_text
    assert limited.tokens == 9


def test_texts_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in folder.iterdir():
        if file.name != HELD_OUT:
            (bare / file.name).write_bytes(file.read_bytes())
    (row,) = rows_of(bare, max_tokens=50)
    assert (row.text, row.tokens) == (BUILT_IN, 50 - 3)
    with pytest.raises(UsageError, match="cannot read"):
        rows_of(folder, text=tmp_path / "missing.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UsageError, match="UTF-8"):
        rows_of(folder, text=tmp_path / "latin.txt")
    with pytest.raises(UsageError, match="1 tokens"):
        rows_of(folder, text="w5")
    with pytest.raises(UsageError, match="at least one recipe"):
        rows_of(folder, [])


def test_quarters_of_the_window(folder: Path) -> None:
    """The windows' quarters together are the whole; a short last window fills only the first of them."""
    (row,) = rows_of(folder, ["wint4"], max_tokens=2 * WINDOW + 6)
    assert row.bits_per_weight == pytest.approx(8 * row.size / row.parameters)
    counts = [18, 12, 12, 12]
    assert sum(n * kl for n, kl in zip(counts, row.kl_by_quarter, strict=True)) / 54 == pytest.approx(row.kl_mean)
    losses = [n * math.log(p) for n, p in zip([17, 12, 12, 10], row.perplexity_by_quarter, strict=True)]
    assert sum(losses) / 51 == pytest.approx(math.log(row.perplexity))
    assert len(set(row.kl_by_quarter)) == 4
    (short,) = rows_of(folder, ["wint4"], max_tokens=7)
    assert short.kl_by_quarter == short.perplexity_by_quarter == ()


def test_the_size_of_chunks_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rows_of(folder, ["wint8"], ["int8", "bf16"])
    monkeypatch.setattr(qrun.eval, "CHUNK", 7)
    for row, before in zip(rows_of(folder, ["wint8"], ["int8", "bf16"]), whole, strict=True):
        assert row.perplexity == pytest.approx(before.perplexity, rel=1e-4)
        assert row.kl_by_quarter == pytest.approx(before.kl_by_quarter, rel=0.05)


def test_engines_beside_each_other_share_weights_alone(folder: Path) -> None:
    base = load(folder, "bf16", context=WINDOW, cache=False)
    other = base.beside("int4")
    assert other.decoder is base.decoder and (base.card.kv, other.card.kv) == ("bf16", "int4")
    assert other.card.kv_bytes_per_token < base.card.kv_bytes_per_token
    alone = base.logits(IDS[:20])
    assert base.cached_ids == tuple(IDS[:20]) and other.cached_ids == ()
    pairs = zip(base.logits_chunks(IDS[:20], 8), other.logits_chunks(IDS[:20], 8), strict=True)
    assert [(len(one), len(two)) for one, two in pairs] == [(8, 8), (8, 8), (4, 4)]
    torch.testing.assert_close(base.logits(IDS[:20]), alone)


def test_windows_longer_than_the_model_or_the_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="takes 1 to 512"):
        evaluate(folder, window=513, cache=False)
    monkeypatch.setattr(qrun.eval, "available", lambda: 10_000)
    with pytest.raises(DoesNotFitError, match=r"2 caches of 24 tokens need .* fewer formats with --kv"):
        rows_of(folder, ["bf16"], ["bf16", "int8"])


def test_another_model_can_be_the_measure() -> None:
    """The same weights under another name: as without it."""
    options = {"window": 64, "max_tokens": 256, "device": "cpu", "cache": False}
    itself = evaluate(None, ["wint4"], **options)
    other = evaluate(None, ["wint4", "bf16"], against="spark", **options)
    assert other[0].kl_mean == pytest.approx(itself[0].kl_mean, rel=1e-6)
    assert other[1].kl_mean == pytest.approx(0.0, abs=1e-6)
