"""The command line on the embedded model, for real: what a new user does first."""

import io
import json
import sys

import pytest

from qrun.cli.main import main


def test_generate_with_the_embedded_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["generate", "--wint4", "--kv", "int4", "--json", "-n", "12", "--seed", "5", "-v", "--threads", "2"]
    answers: list[dict[str, object]] = []
    for _ in range(2):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"How do I start a chat?")))
        assert main(line) == 0
        out, err = capsys.readouterr()
        answers.append(json.loads(out))
    assert answers[0]["text"] == answers[1]["text"] != ""
    assert answers[0]["seed"] == 5
    assert "from the cache of quantized weights" in err
    assert "a demonstration of" in err
    assert "int4 g64" in err
    assert "qkv" in err
    assert main(["cache", "ls"]) == 0
    assert "spark" in capsys.readouterr().out
    assert main(["cache", "prune"]) == 0
    assert "1 deleted" in capsys.readouterr().err
