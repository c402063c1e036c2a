"""Constrained replies: any tokens a model may want, and what comes out is still what the schema or grammar says."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import make
from text_doubles import FAMILIES, write_family

import qrun
from qrun import grammar
from qrun.errors import QrunError, UsageError
from qrun.sampler import Sampler, Sampling
from qrun.tokenizer import Tokenizer

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["köttbullar", "naïve \"café\"", 3, None]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": -5, "maximum": 70}, "maxItems": 4},
        "deep": {"type": "object", "properties": {"ok": {"type": "boolean"}}, "additionalProperties": False},
    },
    "required": ["name", "kind", "sizes"],
    "additionalProperties": False,
}  # fmt: skip


def check(value: Any) -> None:
    """What SCHEMA says, by hand."""
    assert isinstance(value, dict) and {"name", "kind", "sizes"} <= set(value) <= set(SCHEMA["properties"])
    assert isinstance(value["name"], str) and len(value["name"]) <= 8
    assert value["kind"] in ["köttbullar", 'naïve "café"', 3, None]
    assert isinstance(value["sizes"], list) and len(value["sizes"]) <= 4
    assert all(type(size) is int and -5 <= size <= 70 for size in value["sizes"])
    assert value.get("deep", {}) in ({}, {"ok": True}, {"ok": False})


class Chance:
    """A model that wants tokens at random, drawn by the sampler under a constraint; the ids it was given."""

    def __init__(self, vocab: int, seed: int) -> None:
        self.vocab = vocab
        self.random = torch.Generator().manual_seed(seed)
        self.sampler = Sampler(Sampling(temperature=1.0, top_k=0, top_p=1.0, seed=seed), [], vocab, "cpu")

    def write(self, constraint: Any, stop_ids: Sequence[int], most: int = 600, want: int | None = None) -> list[int]:
        ids: list[int] = []
        while len(ids) < most and not constraint.complete:
            logits = 3 * torch.randn(1, self.vocab, generator=self.random)
            if want is not None:
                logits[:, want] += 30
            token = int(self.sampler(logits, constraint.allowed()))
            if token in stop_ids:
                return ids
            constraint.push(token)
            ids.append(token)
        assert constraint.complete, "the reply did not end"
        return ids


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = tokenizer.stream()
    return "".join(map(stream.push, ids)) + stream.flush()


@pytest.fixture(scope="module", params=["ernie", "llama3", "mistral"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_dir(write_family(request.param, tmp_path_factory.mktemp(request.param)))


def test_random_tokens_become_what_the_schema_says(tokenizer: Tokenizer) -> None:
    """Byte-level, byte-fallback and prefix-space tokenizers; a vocabulary that is larger than its tokenizer's."""
    vocab = tokenizer.vocab_size + 37
    seen: set[str] = set()
    for seed in range(4):
        held = grammar.json_schema(tokenizer, vocab, SCHEMA, tokenizer.stop_ids)
        ids = Chance(vocab, seed).write(held, tokenizer.stop_ids)
        assert max(ids) < tokenizer.vocab_size and not tokenizer.special_ids & set(ids)
        text = text_of(tokenizer, ids)
        check(json.loads(text))
        space = re.findall(r"\s+", re.sub(r'"(\\.|[^"\\])*"', "text", text))
        assert all(re.fullmatch(r" |\n {0,40}", part) for part in space), "endless space is JSON too"
        seen.add(text)
    assert len(seen) == 4


def test_an_end_may_come_where_the_grammar_may_end_and_nowhere_else(tokenizer: Tokenizer) -> None:
    vocab = tokenizer.vocab_size + 1
    held = grammar.grammar(tokenizer, vocab, 'start: "ab" ("," "ab")*', tokenizer.stop_ids)
    for part in ("ab", ",ab"):
        allowed = held.allowed()
        assert allowed is not None and allowed.shape == (vocab,) and allowed.dtype == torch.bool
        assert not allowed[list(tokenizer.stop_ids)].any() or part == ",ab"
        for byte in tokenizer.encode(part, special=False)[-len(part) :]:
            if not held.allowed()[byte]:  # type: ignore[index] - a tokenizer that puts a space before a text
                continue
            held.push(byte)
    allowed = held.allowed()
    assert allowed is not None and bool(allowed[list(tokenizer.stop_ids)].all()) and not held.complete
    want = min(tokenizer.stop_ids)
    again = grammar.grammar(tokenizer, vocab, 'start: "ab" ("," "ab")*', tokenizer.stop_ids)
    assert text_of(tokenizer, Chance(vocab, 1).write(again, tokenizer.stop_ids, want=want)).strip() == "ab"


@pytest.mark.parametrize("tokens", ["all", "few"])
def test_a_random_model_answers_in_json(tokens: str, tmp_path: Path) -> None:
    """Through the engine: at every temperature, with cuts and penalties, from logits that mean nothing."""
    write_family("llama3", tmp_path)
    tokenizer = Tokenizer.from_dir(tmp_path)
    make("llama", tmp_path, vocab_size=tokenizer.vocab_size + 6)
    engine = qrun.load(tmp_path, "wint8", context=512, cache=False)
    cuts: dict[str, Any] = {"top_k": 0, "top_p": 1.0} if tokens == "all" else {"top_k": 5, "repeat_penalty": 1.3}
    for seed, temperature in enumerate((0.0, 0.7, 1.0, 3.0, 20.0)):
        held = grammar.json_schema(tokenizer, engine.config.vocab, SCHEMA, tokenizer.stop_ids)
        made = engine.generate(
            [5, 6, 7], temperature=temperature, seed=seed, stop_ids=tokenizer.stop_ids, constraint=held, max_tokens=400,
            loop_guard=False, **cuts,
        )  # fmt: skip
        text = text_of(tokenizer, list(made))
        assert made.finish_reason == "stop"
        check(json.loads(text))


def test_spark_answers_in_json() -> None:
    engine = qrun.load(None, "wint4", context=256)
    tokenizer = Tokenizer.from_dir(engine.source, vocab_size=engine.config.vocab)
    prompt = tokenizer.encode_chat([{"role": "user", "content": "how do I quit?"}])
    for seed in (0, 2):
        held = grammar.json_schema(tokenizer, engine.config.vocab, json.dumps(SCHEMA), tokenizer.stop_ids)
        made = engine.generate(
            prompt, temperature=float(seed), seed=seed, stop_ids=tokenizer.stop_ids, constraint=held, max_tokens=200
        )
        text = text_of(tokenizer, list(made))
        assert made.finish_reason == "stop" and text.startswith("{") and text.endswith("}")
        check(json.loads(text))


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", "not valid JSON .*line 1"),
        ("[1]", r"the JSON schema is \[1\]: it must be an object"),
        ('{"type": "objekt"}', "Invalid type: objekt"),
        ('{"type": "string", "pattern": "("}', "unclosed group"),
        ('{"not": {"type": "string"}}', 'Unimplemented keys: ."not"'),
        ('{"$ref": "http://example.org/x.json"}', "example.org"),
        ('{"type": "integer", "minimum": 5, "maximum": 1}', "Unsatisfiable"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused_before_anything_is_loaded(schema: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        grammar.check_json_schema(schema)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Empty grammar"),
        ('start: "a" b', 'unknown name: "b"'),
        ('x: "a"', "no start rule"),
        ("start: /(/", "unclosed"),
    ],
)
def test_a_grammar_that_cannot_be_used_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        grammar.check_grammar(text)
    assert "\n" not in str(caught.value)


def test_a_token_that_a_grammar_does_not_allow_is_an_error(tokenizer: Tokenizer, capfd: Any) -> None:
    held = grammar.grammar(tokenizer, tokenizer.vocab_size, 'start: "ab"', tokenizer.stop_ids)
    special = min(tokenizer.special_ids - tokenizer.stop_ids)
    with pytest.raises(QrunError, match=f"left its grammar at token {special}"):
        held.push(special)
    with pytest.raises(QrunError, match="cannot be held to its grammar any further"):
        held.allowed()
    assert capfd.readouterr() == ("", "")


def test_the_tables_of_a_vocabulary_are_made_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    grammar.json_schema(tokenizer, tokenizer.vocab_size + 2, {}, tokenizer.stop_ids)
    monkeypatch.setattr(Tokenizer, "to_json", lambda self: pytest.fail("made again"))
    again = Tokenizer.from_dir(tokenizer.directory)
    grammar.json_schema(again, tokenizer.vocab_size + 2, {"type": "array"}, tokenizer.stop_ids)
    with pytest.raises(pytest.fail.Exception):
        grammar.json_schema(again, tokenizer.vocab_size + 3, {}, tokenizer.stop_ids)


def test_without_llguidance_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UsageError, match=r'pip install "qrun-llm\[grammar\]"'):
        grammar.check_json_schema({})


@pytest.mark.parametrize("family", ["qwen3", "ernie-thinking"])
@pytest.mark.parametrize("inside", [True, False])
def test_reasoning_is_free_and_the_answer_is_held(family: str, inside: bool, tmp_path: Path) -> None:
    """</think> is one token in the one vocabulary and several in the other; no end comes before the answer."""
    tokenizer = Tokenizer.from_dir(write_family(family, tmp_path))
    vocab, stops = tokenizer.vocab_size, tokenizer.stop_ids
    plain = grammar.json_schema(tokenizer, vocab, SCHEMA, stops)
    held = grammar.after_reasoning(plain, tokenizer, vocab=vocab, stop_ids=stops, inside=inside)
    opening = tokenizer.token_id("<think>")
    assert (opening is None) == (family == "ernie-thinking")
    if not inside and opening is None:
        assert held is plain, "what is no token cannot be foreseen"
        return
    if not inside:
        allowed = held.allowed()
        assert allowed is not None and allowed[opening] and int(allowed.sum()) < 20, "it may open, or answer at once"
        held.push(opening)
    free = held.allowed()
    assert free is not None and int(free.sum()) == vocab - len(stops) and not free[list(stops)].any()
    thoughts = tokenizer.encode("Zürich </thin <think> 5 </think>", special=False)
    thoughts = [token for token in thoughts if token != opening]
    if tokenizer.token_id("</think>") is None:
        assert "</think>" in text_of(tokenizer, thoughts)
    else:
        thoughts = [*tokenizer.encode("Zürich </thin", special=False), tokenizer.token_id("</think>")]
    for token in thoughts:
        assert held.allowed() is free and not held.complete
        held.push(token)
    assert held.allowed() is not free
    check(json.loads(text_of(tokenizer, Chance(vocab, 3).write(held, stops))))


def test_a_model_that_may_reason_and_does_not_is_held_from_its_first_token(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(write_family("qwen3", tmp_path))
    vocab, stops = tokenizer.vocab_size, tokenizer.stop_ids
    for seed in range(5):
        plain = grammar.grammar(tokenizer, vocab, "start: /[0-9]{2,4}/", stops)
        held = grammar.after_reasoning(plain, tokenizer, vocab=vocab, stop_ids=stops, inside=False)
        text = text_of(tokenizer, Chance(vocab, seed).write(held, stops))
        assert re.fullmatch(r"[0-9]{2,4}", text) or "</think>" in text
    assert {"qwen3", "ernie-thinking"} <= set(FAMILIES)
