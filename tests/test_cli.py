"""The command line in this process: options, errors and their codes, what is written where. No model, no torch."""

import contextlib
import ctypes
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cli_doubles
import pytest
from typer.testing import CliRunner

import qrun
from qrun.cli.interrupt import Abandon
from qrun.cli.main import app, main
from qrun.cli.options import ModelOptions, SweepOptions, parse_size
from qrun.cli.sanitize import one_line, printable
from qrun.errors import UsageError


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> list[cli_doubles.WordEngine]:
    """Let `qrun.load` return the double; the list holds what was loaded."""
    loaded: list[cli_doubles.WordEngine] = []

    def load(model: str, **options: object) -> cli_doubles.WordEngine:
        loaded.append(cli_doubles.load(model, **options))
        return loaded[-1]

    monkeypatch.setattr(qrun, "load", load, raising=False)
    for name in [name for name in os.environ if name.startswith("QRUN_") and name != "QRUN_CACHE_DIR"]:
        monkeypatch.delenv(name)
    give_stdin(monkeypatch, b"")
    return loaded


def give_stdin(monkeypatch: pytest.MonkeyPatch, raw: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))


def test_help_of_every_command_teaches_by_an_example() -> None:
    for command in ("chat", "generate", "info", "bench", "eval", "cache"):
        result = CliRunner().invoke(app, [command, "--help"])
        assert result.exit_code == 0
        assert f"qrun {command}" in result.stdout.partition("Example:")[2], command


def test_no_arguments_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("qrun makes")
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"qrun {qrun.__version__}\n"


def test_help_and_completion_do_not_import_torch() -> None:
    script = (
        "import sys; from qrun.cli.main import main; main(['chat', '--help']); "
        "print([m for m in ('torch', 'numba', 'tokenizers', 'prompt_toolkit') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stderr == "[]\n"
    completion = {"_QRUN_COMPLETE": "complete_bash", "COMP_WORDS": "qrun chat --quant w", "COMP_CWORD": "3"}
    script = "import sys; from qrun.cli.main import main; sys.modules['torch'] = None; main([])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | completion)
    assert "wint4" in done.stdout


USAGE = {
    "chat ernie --wint5": ["--wint5", "--wint4", "qrun chat --help"],
    "chat --temp -1": ["temperature", "-1"],
    "chat --wint4 --wint8": ["--wint4", "--wint8", "contradict"],
    "chat --wint4 --quant nf4": ["--wint4", "--quant nf4"],
    "chat --quant w9": ["w9", "possible"],
    "chat --kv int3": ["int3", "k8v4"],
    "chat -c 32q": ["32q", "32k"],
    "chat -c 0": ["--ctx-size", "0"],
    "chat --threads 0": ["--threads 0"],
    "chat --device tpu": ["tpu", "cuda"],
    "chat --top-k 1.5": ["--top-k"],
    "generate -n 0 -p x": ["--max-tokens 0"],
    "generate -p x --stop ": ["--stop"],
    "generate --raw -s x -p y": ["--raw", "--system"],
    "generate": ["prompt is empty", "-p"],
    "generate -f /nonexistent": ["/nonexistent", "No such file"],
    "caht": ["'caht'", "did you mean 'chat'"],
    "ernie": ["'ernie'", "qrun chat ernie"],
    "cache lss": ["did you mean 'ls'?"],
    "cache prune --foo": ["--foo", "qrun cache prune --help"],
    "bench compare a b --foo": ["--foo", "qrun bench compare --help"],
    "bench -p x": ["-p 'x'"],
    "bench -p 0 -n 0": ["nothing to measure"],
    "eval --window 1": ["--window 1"],
    "cache prune --older-than 3y": ["3y", "30d"],
}


@pytest.mark.parametrize("line", USAGE)
def test_usage_errors_are_one_line_with_code_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split(" ")) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("qrun: ")
    assert err.count("\n") == 1
    for part in USAGE[line]:
        assert part in err


@pytest.mark.parametrize(("model", "code"), [("nosuch", 3), ("toobig", 4), ("slow", 5), ("bug", 1)])
def test_errors_become_exit_codes(model: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", model, "-p", "x"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "\x1b" not in err
    assert ("QRUN_DEBUG" in err) == (model == "bug")


def test_a_traceback_is_there_for_who_asks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "bug", "-p", "x", "-v"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_bad_environment_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QRUN_TEMP", "warm")
    assert main(["generate", "-p", "x"]) == 2
    assert "QRUN_TEMP" in capsys.readouterr().err


def test_environment_mirrors_options_and_the_command_line_wins(
    monkeypatch: pytest.MonkeyPatch, engine: list[cli_doubles.WordEngine]
) -> None:
    monkeypatch.setenv("QRUN_QUANT", "wint8")
    monkeypatch.setenv("QRUN_CTX_SIZE", "2k")
    monkeypatch.setenv("QRUN_TOP_K", "3")
    assert main(["generate", "-p", "x"]) == 0
    assert main(["generate", "-p", "x", "--wint4", "--top-k", "5", "-c", "max"]) == 0
    assert [e.loaded_with["quant"].label for e in engine] == ["W8A16C16", "W4A16C16"]
    assert [e.loaded_with["context"] for e in engine] == [2048, -1]
    assert [e.chosen[0].top_k for e in engine] == [3, 5]


def test_sizes_and_sweeps() -> None:
    assert [parse_size(text) for text in ("4096", "32k", "1M")] == [4096, 32768, 1 << 20]
    with pytest.raises(UsageError):
        parse_size("-1")
    sweep = SweepOptions(quant="wint8,mix:experts=w4,dense=w8,nf4", kv="bf16,k8v4")
    assert [recipe.name for recipe in sweep.recipes()] == ["wint8", "mix:experts=w4,dense=w8", "nf4"]
    assert sweep.kvs() == ["bf16", "k8v4"]
    assert len(SweepOptions().recipes("bf16,wint8")) == 2
    assert len(SweepOptions(wint4=True).recipes("bf16,wint8")) == 1
    assert ModelOptions(wint2=True).recipe().notes


def test_only_text_reaches_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "-p", "hello there", "--seed", "3"]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    assert "hello there" in out
    assert "int4 g64" in err
    assert "2.50 KiB" in err
    assert "seed 3" in err
    assert "\x1b" not in err
    assert main(["generate", "-p", "hello there", "--quiet"]) == 0
    assert capsys.readouterr() == (out, "")


def test_the_embedded_model_is_called_a_demonstration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "-p", "x"]) == 0
    assert "a demonstration of 5.1 M parameters" in capsys.readouterr().err


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--json", "-p", "think", "--wint4"]) == 0
    out, _ = capsys.readouterr()
    answer = json.loads(out)
    assert out.count("\n") == 1
    assert (answer["text"], answer["reasoning"], answer["finish_reason"]) == ("done", "hm", "stop")
    assert set(answer) >= {"usage", "timings", "seed", "model", "recipe"}
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"]
    assert answer["recipe"] == "W4A16C16"


def test_reasoning_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "-p", "think"]) == 0
    out, err = capsys.readouterr()
    assert out == "done\n"
    assert "hm\n" in err


def test_prompt_is_stdin_then_files_then_argument(
    monkeypatch: pytest.MonkeyPatch, engine: list[cli_doubles.WordEngine], tmp_path: Path
) -> None:
    note = tmp_path / "note.txt"
    note.write_bytes("\ufefftwo\n".encode())
    give_stdin(monkeypatch, b"one\n")
    assert main(["generate", "--raw", "-p", "three", "-f", str(note)]) == 0
    assert engine[0].tokenizer.decode(engine[0].prompts[0]) == "one\n\ntwo\n\nthree"
    give_stdin(monkeypatch, b"from a dash")
    assert main(["generate", "-", "--raw"]) == 0
    assert engine[1].tokenizer.decode(engine[1].prompts[0]) == "from a dash"
    assert engine[1].card.model == "spark"


def test_chat_without_a_terminal_answers_and_exits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    give_stdin(monkeypatch, b"/usr/bin\nis a path\n")
    assert main(["chat"]) == 0
    assert "/usr/bin\nis a path" in capsys.readouterr().out


def test_stdin_that_is_not_text_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    give_stdin(monkeypatch, b"ok \xff")
    assert main(["chat"]) == 2
    assert "UTF-8 (byte 3)" in capsys.readouterr().err


def test_control_characters_do_not_reach_the_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "-p", "escape"]) == 0
    out = capsys.readouterr().out
    assert "red" in out
    assert all(char.isprintable() or char == "\n" for char in out)
    assert printable("a\tb\r\n\x1b[2J\x9b\x7f") == "a\tb\n␛[2J�␡"
    assert one_line("a\n\x1b b") == "a ␛ b"


@pytest.mark.timeout(30)
def test_an_interrupt_that_a_library_loses_still_ends_the_work() -> None:
    lose = ctypes.CFUNCTYPE(None)(lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt), Abandon():
        lose()
        time.sleep(60)
    with pytest.raises(KeyboardInterrupt), Abandon():
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise RuntimeError("half a compiler")
    with pytest.raises(RuntimeError), Abandon():
        raise RuntimeError("no interrupt")


def test_cache_ls_and_prune_on_an_empty_cache(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "ls"]) == 0
    assert capsys.readouterr().out.startswith("| key")
    assert main(["cache", "prune"]) == 0
    assert main(["cache", "prune", "abcdef"]) == 2
