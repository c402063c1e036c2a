"""`qrun generate` for scripts: forms of answers, log-probabilities, candidates, files of prompts, the prompt cache."""

import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cli_doubles
import pytest

import qrun
from qrun.cli.main import main
from qrun.engine import Engine
from qrun.session import Session


@pytest.fixture(autouse=True)
def no_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("QRUN_") and name != "QRUN_CACHE_DIR"]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[cli_doubles.WordEngine]:
    """Let `qrun.load` return the double; the list holds what was loaded."""
    loaded: list[cli_doubles.WordEngine] = []

    def load(model: str, **options: Any) -> cli_doubles.WordEngine:
        loaded.append(cli_doubles.load(model, **options))
        return loaded[-1]

    monkeypatch.setattr(qrun, "load", load, raising=False)
    return loaded


@pytest.fixture(scope="module")
def loaded_spark() -> Engine:
    return qrun.load("spark")


@pytest.fixture
def spark(loaded_spark: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Let `qrun.load` return the embedded model, each time as if it had just been loaded."""

    def load(model: str, **options: Any) -> Engine:
        loaded_spark.reset()
        return loaded_spark

    monkeypatch.setattr(qrun, "load", load, raising=False)
    return loaded_spark


USAGE = {
    "-p x -j nosuch.json": ["nosuch.json", "No such file"],
    "-p x -j {": ["JSON schema", "not valid JSON"],
    '-p x -j {"type":"nonsense"}': ["JSON schema cannot be used"],
    "-p x --grammar x(": ["grammar cannot be used"],
    "-p x --grammar x -j {}": ["--json-schema and --grammar contradict"],
    "-p x --logprobs 3": ["--logprobs needs --json"],
    "-p x --json --logprobs 21": ["--logprobs 21"],
    "--json --jsonl": ["--jsonl and --json contradict"],
    "--jsonl -p x": ["--jsonl and --prompt contradict"],
    "--batch x -f y": ["--batch and --file contradict"],
    "--batch /nonexistent": ["/nonexistent", "No such file"],
    "--jsonl --parallel 2": ["--parallel needs --batch"],
    "--batch x --parallel 0": ["--parallel 0"],
    "-p x --candidates 0": ["--candidates 0"],
    "-p x --candidates 2 --prompt-cache y": ["--prompt-cache", "--candidates"],
    "-p x --prompt-cache /nonexistent/y": ["/nonexistent/y", "no directory"],
    "-p x --prompt-cache /": ["--prompt-cache / is something else"],
}


@pytest.mark.parametrize("line", USAGE)
def test_contradictions_are_refused_before_a_model_is_loaded(
    line: str, engines: list[cli_doubles.WordEngine], capsys: pytest.CaptureFixture[str]
) -> None:
    if "-j" in line.split() or "--grammar" in line:
        pytest.importorskip("llguidance")
    assert main(["generate", *line.split(" ")]) == 2
    out, err = capsys.readouterr()
    assert (out, engines) == ("", [])
    assert err.startswith("qrun: ") and err.count("\n") == 1
    for part in USAGE[line]:
        assert part in err


def test_json_has_usage_and_logprobs(engines: list[cli_doubles.WordEngine], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--json", "-p", "hello", "--logprobs", "2"]) == 0
    answer = json.loads(capsys.readouterr().out)
    content = answer["logprobs"]["content"]
    assert "".join(token["token"] for token in content) == answer["text"] == "You said: hello"
    assert [token["id"] for token in content] == engines[0].played[0].tokens[:-1]
    assert content[0]["logprob"] == -0.5
    assert content[0]["top_logprobs"] == [
        {"token": "b", "id": 65, "logprob": -1.0}, {"token": "c", "id": 66, "logprob": -2.0}
    ]  # fmt: skip
    assert answer["usage"] == {"prompt_tokens": 12, "cached_tokens": 0, "completion_tokens": 12, "total_tokens": 24}
    assert main(["generate", "--json", "-p", "hello"]) == 0
    assert "logprobs" not in json.loads(capsys.readouterr().out)


def test_answers_are_held_to_a_schema(
    engines: list[cli_doubles.WordEngine], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llguidance")
    schema = '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'
    (tmp_path / "schema.json").write_text(schema)
    (tmp_path / "yes.lark").write_text('start: "yes" | "no"')
    for name in (schema, str(tmp_path / "schema.json"), f"@{tmp_path / 'schema.json'}"):
        assert main(["generate", "-j", name, "-p", 'verbatim {"a": 5}']) == 0
        assert capsys.readouterr().out == '{"a": 5}\n'
    assert main(["generate", "--grammar", f"@{tmp_path / 'yes.lark'}", "-p", "verbatim no"]) == 0
    out, err = capsys.readouterr()
    assert (out, "the answer was cut" in err) == ("no\n", False)
    assert main(["generate", "-j", schema, "-p", 'verbatim {"a": 5}', "-n", "3"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("{") and "}" not in out
    assert "the answer was cut" in err and "larger -n" in err
    assert main(["generate", "-j", schema, "-p", 'verbatim {"b": 5}']) == 1  # the double does not obey


def test_the_prompt_cache(spark: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the embedded model: a second question about the same text, another text, a damaged file."""
    file, text = tmp_path / "cache", tmp_path / "text"
    text.write_text("qrun runs language models on this machine. " * 8)

    def ask(question: str) -> tuple[dict[str, Any], str]:
        line = ["generate", "--json", "-f", str(text), "-p", question, "--prompt-cache", str(file), "-n", "2"]
        assert main([*line, "--temp", "0"]) == 0
        out, err = capsys.readouterr()
        return json.loads(out), err

    first, _ = ask("What is it?")
    assert first["usage"]["cached_tokens"] == 0
    written = file.stat().st_ino
    again, err = ask("What is it for?")
    assert again["usage"]["cached_tokens"] > again["usage"]["prompt_tokens"] - 12
    assert file.stat().st_ino == written
    assert "prompt-cache" not in err
    file.write_bytes(file.read_bytes()[:-100])
    cut, err = ask("What is it?")
    assert (cut["text"], cut["usage"]["cached_tokens"]) == (first["text"], 0)
    assert "note: --prompt-cache is not used: " in err
    text.write_text("Something else entirely, about trees. " * 8)
    written = file.stat().st_ino
    assert ask("What is it?")[0]["usage"]["cached_tokens"] < 6
    assert file.stat().st_ino != written
    assert ask("What is it?")[0]["usage"]["cached_tokens"] > 40
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "text"]
    file.write_text("my notes")
    assert main(["generate", "-p", "x", "--prompt-cache", str(file)]) == 2
    assert file.read_text() == "my notes"


def batch(
    capsys: pytest.CaptureFixture[str], file: Path, text: str | bytes, *options: str, code: int = 0
) -> list[dict[str, Any]]:
    """What a file brings."""
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    assert main(["generate", "--batch", str(file), "--temp", "0", "-n", "6", *options]) == code
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_file_of_prompts(spark: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["how do I quit?", "What is wint4?", "", "hello", "how do I quit?"]
    answers = batch(capsys, tmp_path / "in.txt", "\n".join(prompts), "--parallel", "3")
    assert [answer["line"] for answer in answers] == [1, 2, 4, 5]
    alone: list[str] = []
    for answer in answers:
        assert main(["generate", "-p", prompts[answer["line"] - 1], "--temp", "0", "-n", "6"]) == 0
        alone.append(capsys.readouterr().out.removesuffix("\n"))
    assert [answer["text"] for answer in answers] == alone
    assert {answer["finish_reason"] for answer in answers} <= {"length", "stop"}
    assert all(answer["id"] is None and answer["usage"]["completion_tokens"] for answer in answers)


def test_a_file_of_requests_with_bad_ones(spark: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        b'{"id": "a", "prompt": "hello", "max_tokens": 2}',
        b"\xff",
        b'{"id": "c", "prompt": "hello", "bogus": 1}',
        b'{"id": "d", "prompt": "To", "raw": true, "logprobs": 1, "stop": ["zzz"]}',
        b'{"id": "e"}',
    ]
    answers = batch(capsys, tmp_path / "in.jsonl", b"\n".join(lines), code=1)
    assert [(answer["line"], answer["id"]) for answer in answers] == [(1, "a"), (2, None), (3, "c"), (4, "d"), (5, "e")]
    assert [answer.get("error", {}).get("code") for answer in answers] == [
        None, "bad_request", "bad_request", None, "bad_request"
    ]  # fmt: skip
    assert "bogus: no such field" in answers[2]["error"]["message"]
    assert answers[0]["usage"]["completion_tokens"] == 2
    assert len(answers[3]["logprobs"]["content"]) == answers[3]["usage"]["completion_tokens"] == 6
    assert batch(capsys, tmp_path / "in.jsonl", b'"no object"', code=1)[0]["error"]["code"] == "bad_request"
    assert batch(capsys, tmp_path / "in.txt", b'"a prompt"')[0]["line"] == 1
    assert batch(capsys, tmp_path / "in.txt", b"\n \n", code=2) == []


def test_lines_are_read_as_there_is_room(spark: Engine, tmp_path: Path) -> None:
    read: list[int] = []

    def texts() -> Iterator[str]:
        for n in range(40):
            read.append(n)
            yield f"hello {n}"

    replies = Session(spark, max_tokens=2).together(texts(), width=2)
    for n, reply in enumerate(replies):
        list(reply)
        assert n < len(read) <= n + 8
    assert len(read) == 40


def test_candidates_differ_by_their_seeds(spark: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["generate", "-p", "how do I quit?", "-n", "6", "--temp", "2", "--top-k", "0", "--seed", "5"]
    assert main([*line, "--candidates", "3", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    candidates = answer["candidates"]
    assert [each["seed"] for each in candidates] == [5, 6, 7]
    assert {name: answer[name] for name in candidates[0]} == candidates[0]
    assert len({each["text"] for each in candidates}) > 1
    assert answer["usage"]["completion_tokens"] > 6
    assert main([*line, "--candidates", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["candidates"] == candidates
    assert main([*line, "--candidates", "3", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert out == "\n---\n".join(each["text"] for each in candidates) + "\n"
