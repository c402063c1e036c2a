"""What the shells complete, asked as they ask: through variables, of a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# torch is poisoned: completion that imports it fails.
SCRIPT = "import sys; sys.modules['torch'] = None; from qrun.cli.main import run; run()"

Ask = Callable[..., list[str]]


@pytest.fixture
def bash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Return what bash is offered for its words; a broken config file is there and must not matter."""
    for folder in ("models/tiny", "qwen-mine", "empty", "home/hub/models--acme--rocket/snapshots"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("models/tiny", "qwen-mine"):
        (tmp_path / folder / "config.json").write_text("{}")
    (tmp_path / "broken.toml").write_text("[")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("QRUN_CONFIG", str(tmp_path / "broken.toml"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)

    def ask(*words: str) -> list[str]:
        asked = {"_QRUN_COMPLETE": "complete_bash", "COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
        return offered(asked, tmp_path)

    return ask


def offered(asked: dict[str, str], place: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=place, env=os.environ | asked, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    return done.stdout.split("\n")[:-1] if done.stdout.strip() else []


def test_bash_completes_models(bash: Ask) -> None:
    every = bash("qrun", "chat", "")
    assert {"spark", "ernie", "qwen3:0.6b", "acme/rocket", "qwen-mine"} <= set(every)
    assert not {"empty", "models"} & set(every)
    assert bash("qrun", "bench", "models/") == ["models/tiny"]
    assert bash("qrun", "chat", "./q") == ["./qwen-mine"]
    assert bash("qrun", "chat", "spark", "x") == []


def test_bash_breaks_words_at_colons_and_gets_the_rest(bash: Ask) -> None:
    assert bash("qrun", "chat", "ernie", ":") == ["0.3b", "21b", "21b-thinking", "300b"]
    assert bash("qrun", "chat", "ernie", ":", "21") == ["21b", "21b-thinking"]
    assert bash("qrun", "chat", "ernie", ":", "21b", "--kv", "=", "k") == ["k8v4"]


def test_bash_completes_recipes_formats_and_choices(bash: Ask) -> None:
    assert bash("qrun", "chat", "--quant", "w") == ["wint8", "wint4", "w8a8"]
    assert bash("qrun", "bench", "--quant", "bf16,nf") == ["bf16,nf4"]
    assert bash("qrun", "eval", "--kv", "bf16,int8,k") == ["bf16,int8,k8v4"]
    assert bash("qrun", "chat", "--quant", "mix:experts", "=", "w4,") == []
    assert bash("qrun", "chat", "--device", "c") == ["cuda", "cpu"]
    assert bash("qrun", "config", "show", "ev") == ["eval"]
    assert bash("qrun", "config", "i") == ["init"]


SHELLS = [("zsh", '"qwen3\\\\:1.7b":"Qwen/Qwen3-1.7B"'), ("fish", "qwen3:1.7b\tQwen/Qwen3-1.7B")]


@pytest.mark.parametrize(("shell", "expected"), SHELLS)
def test_zsh_and_fish(shell: str, expected: str, tmp_path: Path) -> None:
    asked = {
        "_QRUN_COMPLETE": f"complete_{shell}",
        "_TYPER_COMPLETE_ARGS": "qrun chat qwen3:1.7",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    assert expected in "\n".join(offered(asked, tmp_path))
