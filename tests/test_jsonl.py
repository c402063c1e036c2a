"""`qrun generate --jsonl` as a program sees it: requests through a real pipe, events from another, and real signals."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cli_doubles
import pytest

import qrun
from qrun.cli import lines as lines_module
from qrun.cli.lines import Lines
from qrun.cli.main import main

PROGRAM = [sys.executable, str(Path(__file__).with_name("cli_doubles.py"))]
CONSUMER = Path(__file__).with_name("jsonl_consumer.py")
README = Path(__file__).resolve().parents[1] / "README.md"
LIMIT = 60.0


class Peer:
    """The co-process and its pipes."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [*PROGRAM, "generate", "--jsonl", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def send(self, **request: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def event(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def until(self, kind: str) -> dict[str, Any]:
        """The next event of a kind."""
        while (event := self.event())["event"] != kind:
            pass
        return event


@pytest.fixture
def peer() -> Iterator[Peer]:
    started = Peer()
    assert started.event() == {
        "event": "ready", "protocol": 1, "model": "spark", "recipe": "auto", "context": 4096
    }  # fmt: skip
    yield started
    started.process.kill()
    started.process.communicate()


def ask(*requests: str | dict[str, Any], arguments: tuple[str, ...] = ()) -> tuple[list[dict[str, Any]], int]:
    """All events that requests bring, without the first, and the exit code."""
    text = "\n".join(each if isinstance(each, str) else json.dumps(each) for each in requests)
    done = subprocess.run(
        [*PROGRAM, "generate", "--jsonl", *arguments], input=text, capture_output=True, text=True, timeout=LIMIT
    )
    return [json.loads(line) for line in done.stdout.splitlines()][1:], done.returncode


def test_the_shortest_consumer_works(tmp_path: Path) -> None:
    command = tmp_path / "qrun"
    command.write_text(f'#!/bin/sh\nexec {" ".join(PROGRAM)} "$@"\n')
    command.chmod(0o755)
    done = subprocess.run(
        [sys.executable, CONSUMER], capture_output=True, text=True, timeout=LIMIT,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.stdout == "You said: Name a tree. stop\nYou said: Name a river. stop\n"
    assert done.stderr == ""


def test_the_readme_shows_the_shortest_consumer() -> None:
    assert f"```python\n{CONSUMER.read_text()}```\n" in README.read_text()


BAD: dict[str, tuple[str, str]] = {
    "garbage": ("bad_request", "is not JSON"),
    "[1]": ("bad_request", "no JSON object"),
    "[" * 50_000: ("bad_request", "is not JSON"),
    '{"prompt": "x", "bogus": 1}': ("bad_request", "bogus: no such field; there are id, stream, prompt"),
    '{"prompt": "x", "temperature": -2}': ("bad_request", "temperature is -2"),
    '{"prompt": "x", "temperature": true}': ("bad_request", "temperature is true: it must be a number"),
    '{"prompt": "x", "seed": 1.5}': ("bad_request", "seed is 1.5"),
    '{"prompt": "x", "max_tokens": 0}': ("bad_request", "max_tokens is 0: it must be a whole number from 1 on"),
    '{"prompt": "x", "logprobs": 99}': ("bad_request", "logprobs is 99"),
    '{"prompt": "x", "stop": ["a", ""]}': ("bad_request", "stop is"),
    '{"prompt": 5}': ("bad_request", "prompt is 5: it must be a text"),
    '{"prompt": " "}': ("bad_request", "prompt is empty"),
    '{"max_tokens": 5}': ("bad_request", "no prompt"),
    '{"prompt": "x", "messages": [{"role": "user", "content": "x"}]}': ("bad_request", "not both"),
    '{"prompt": "x", "raw": true, "system": "x"}': ("bad_request", "system and raw contradict"),
    '{"messages": []}': ("bad_request", "messages is []"),
    '{"messages": [{"role": "user"}]}': ("bad_request", "message 1: content is missing"),
    '{"messages": [{"role": "root", "content": "x"}]}': ("bad_request", 'message 1: role is "root"'),
    '{"messages": [{"role": "user", "content": "x", "name": "y"}]}': ("bad_request", "message 1: name: no such field"),
    '{"messages": [{"role": "assistant", "content": "x"}]}': ("bad_request", "the last message is the assistant's"),
    '{"prompt": "x", "json_schema": {}, "grammar": "start: /x/"}': ("bad_request", "json_schema and grammar"),
    json.dumps({"prompt": "word " * 5000}): ("too_long", "the context holds 4096"),
}


def test_it_survives_bad_lines_and_says_which_they_were() -> None:
    events, code = ask(*BAD, "", json.dumps({"id": "last", "prompt": "hello", "stream": False}))
    assert code == 0
    *errors, done = events
    for number, (event, (expected, part)) in enumerate(zip(errors, BAD.values(), strict=True), 1):
        assert (event["event"], event["id"], event["line"], event["code"]) == ("error", None, number, expected)
        assert part in event["message"]
        assert "\n" not in event["message"]
    assert (done["id"], done["event"], done["text"]) == ("last", "done", "You said: hello")


def test_reasoning_and_answer_are_told_apart() -> None:
    events, _ = ask({"id": [1], "prompt": "think"}, {"id": 2, "prompt": "think", "stream": False})
    *pieces, last = (each for each in events if each["id"] == [1])
    assert last["event"] == "done"
    for kind, whole in (("reasoning", "hm"), ("delta", "done")):
        assert "".join(piece["text"] for piece in pieces if piece["event"] == kind) == whole
    streamed, whole = (event for event in events if event["event"] == "done")
    assert (streamed["text"], streamed["reasoning"], streamed["finish_reason"]) == ("done", "hm", "stop")
    assert {**streamed, "id": 2} | {"usage": None} == whole | {"usage": None}
    assert [event["id"] for event in events].count(2) == 1


def test_a_conversation_is_only_read_from_where_it_goes_on(peer: Peer) -> None:
    talk = [{"role": "user", "content": "hello there"}]
    peer.send(id=1, messages=talk, stream=False)
    first = peer.until("done")
    assert first["usage"]["cached_tokens"] == 0
    talk += [{"role": "assistant", "content": first["text"]}, {"role": "user", "content": "and now"}]
    peer.send(id=2, messages=talk, stream=False)
    assert peer.until("done")["usage"]["cached_tokens"] == first["usage"]["total_tokens"]


def test_a_request_can_be_cancelled_while_it_runs_or_waits(peer: Peer) -> None:
    peer.send(id="none", cancel=True)
    peer.send(id="a", prompt="long")
    peer.send(id="b", prompt="hello")
    peer.send(id="c", prompt="hello")
    assert peer.until("delta")["id"] == "a"
    peer.send(id="b", cancel=True)
    peer.send(id="a", cancel=True)
    ends = [peer.until("done") for _ in range(3)]
    assert [(end["id"], end["finish_reason"]) for end in ends] == [
        ("a", "cancelled"), ("b", "cancelled"), ("c", "stop")
    ]  # fmt: skip
    assert ends[0]["text"].startswith("w")
    assert ends[1]["text"] == ""
    peer.send(id="b", prompt="again")  # the cancel was for the request before
    assert peer.until("done")["finish_reason"] == "stop"


def test_ctrl_c_ends_a_reply_and_between_two_the_process(peer: Peer) -> None:
    peer.send(id=1, prompt="long")
    peer.until("delta")
    peer.process.send_signal(signal.SIGINT)
    assert peer.until("done")["finish_reason"] == "cancelled"
    peer.send(id=2, prompt="hello")
    assert peer.until("done")["text"] == "You said: hello"
    peer.process.send_signal(signal.SIGINT)
    _, err = peer.process.communicate(timeout=LIMIT)
    assert peer.process.returncode == 130
    assert "Traceback" not in err


def test_it_ends_with_its_input_or_its_reader(peer: Peer) -> None:
    peer.send(id=1, prompt="hello")
    out, _ = peer.process.communicate(timeout=LIMIT)
    assert json.loads(out.splitlines()[-1])["text"] == "You said: hello"
    assert peer.process.returncode == 0
    line = " ".join(f"'{part}'" for part in PROGRAM)
    script = f'echo \'{{"prompt": "flood"}}\' | {line} generate --jsonl --quiet | head -c1; echo ${{PIPESTATUS[1]}}'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=LIMIT)
    assert (done.stdout, done.stderr) == ("{141\n", "")


def test_a_request_comes_before_the_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engines: list[cli_doubles.WordEngine] = []

    def load(model: str, **options: Any) -> cli_doubles.WordEngine:
        engines.append(cli_doubles.load(model, **options))
        return engines[-1]

    monkeypatch.setattr(qrun, "load", load, raising=False)
    requests = [
        {"prompt": "one"},
        {"prompt": "two", "top_k": 5, "seed": 9, "max_tokens": 2, "system": "Long.", "logprobs": 2, "think": False},
        {"prompt": "three", "raw": True},
    ]
    (tmp_path / "in").write_text("\n".join(map(json.dumps, requests)))
    with (tmp_path / "in").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert main(["generate", "--jsonl", "--top-k", "3", "--temp", "0.5", "-n", "9", "-s", "Brief."]) == 0
    (engine,) = engines
    assert [(s.top_k, s.temperature, s.seed) for s in engine.chosen] == [(3, 0.5, None), (5, 0.5, 9), (3, 0.5, None)]
    assert [played.max_tokens for played in engine.played] == [9, 2, 9]
    assert [len(played.logprobs) for played in engine.played] == [0, 2, 0]
    read = [engine.tokenizer.text_after([], ids) for ids in engine.prompts]
    assert "Brief." in read[0] and "Long." in read[1] and "Brief." not in read[1]
    assert read[1].endswith("</think>\n\n") and not read[0].endswith("</think>\n\n")
    assert read[2] == "three"


@pytest.mark.parametrize("block", [1, 5, 1 << 16])
def test_lines_have_a_bound_and_a_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, block: int) -> None:
    monkeypatch.setattr(lines_module, "LONGEST", 12)
    monkeypatch.setattr(lines_module, "_BLOCK", block)
    file = tmp_path / "in"
    file.write_bytes(b"\xef\xbb\xbfone\r\n\n  \n" + b"x" * 100 + b"\ntwo two two \n" + b"y" * 13)
    lines = Lines(str(file))
    found = [(line.number, line.end, line.text) for line in lines]
    assert found == [(1, 8, b"one\r"), (4, 113, None), (5, 126, b"two two two "), (6, 139, None)]
    assert lines.size == 139
