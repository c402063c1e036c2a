"""The config file: what it may say, what beats it, what is told of it when it is wrong."""

import json
import os
import re
import tomllib
from pathlib import Path

import cli_doubles
import pytest

import qrun
import qrun.eval
from qrun import paths
from qrun.cli import config_file
from qrun.cli.main import command_line, main

GENERATE = ["generate", "-p", "x"]


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> list[cli_doubles.WordEngine]:
    """Let `qrun.load` return the double; the list holds what was loaded."""
    loaded: list[cli_doubles.WordEngine] = []

    def load(model: str, **options: object) -> cli_doubles.WordEngine:
        loaded.append(cli_doubles.load(model, **options))
        return loaded[-1]

    monkeypatch.setattr(qrun, "load", load, raising=False)
    monkeypatch.setattr("sys.stdin", None)
    for name in [name for name in os.environ if name.startswith("QRUN_") and name != "QRUN_CACHE_DIR"]:
        monkeypatch.delenv(name)
    return loaded


def write(text: str) -> Path:
    """Write the user's config file; returns its path."""
    path = paths.config_dir() / "config.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, dict[str, object]]]:
    """Return what `config show --json` prints, by command and option."""
    assert main(["config", "show", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)["commands"]


def test_a_flag_beats_a_variable_beats_the_file(
    monkeypatch: pytest.MonkeyPatch, engine: list[cli_doubles.WordEngine]
) -> None:
    write('model = "mine"\nctx-size = 2048\ntop_k = 3\nstop = ["q"]\n[generate]\nkv = "int8"\n[chat]\nkv = "int4"\n')
    assert main(GENERATE) == 0
    monkeypatch.setenv("QRUN_TOP_K", "4")
    monkeypatch.setenv("QRUN_KV", "fp8")
    assert main(GENERATE) == 0
    assert main([*GENERATE, "--top-k", "5", "-c", "max"]) == 0
    assert [e.card.model for e in engine] == ["mine"] * 3
    assert [e.loaded_with["context"] for e in engine] == [2048, 2048, -1]
    assert [e.recipe.k for e in engine] == ["int8", "fp8", "fp8"]
    assert [e.chosen[0].top_k for e in engine] == [3, 4, 5]


RIVALS = {
    ("wint4 = true", None, ""): "W4A16C16",
    ("wint4 = true", "wint8", ""): "W8A16C16",
    ("wint4 = true", "wint8", "--fp8"): "Wfp8Afp8C16",
    ("wint4 = true", None, "--quant nf4"): "WNF4A16C16",
    ('quant = "nf4"', None, "--wint4"): "W4A16C16",
    ('quant = "nf4"', "bf16", ""): "W16A16C16",
    ('wint8 = true\n[generate]\nquant = "nf4"', None, ""): "WNF4A16C16",
    ('quant = "nf4"\n[generate]\nwint8 = true', None, ""): "W8A16C16",
    ('quant = "nf4"\n[generate]\nwint8 = false', None, ""): "WNF4A16C16",
    ("wint8 = true\n[generate]\nwint8 = false", None, ""): "auto",
}


@pytest.mark.parametrize(("text", "variable", "flags"), RIVALS)
def test_of_precisions_the_one_set_closest_counts(
    text: str, variable: str | None, flags: str, monkeypatch: pytest.MonkeyPatch, engine: list[cli_doubles.WordEngine]
) -> None:
    write(text)
    if variable is not None:
        monkeypatch.setenv("QRUN_QUANT", variable)
    assert main([*GENERATE, *flags.split()]) == 0
    assert engine[0].recipe.label == RIVALS[text, variable, flags]


def test_a_limit_on_answers_is_none_on_the_text_of_eval(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write("max_tokens = 50\n")
    found = shown(capsys)
    assert found["chat"]["max_tokens"]["value"] == 50
    assert found["eval"]["eval_tokens"]["value"] is None
    for text in ("eval_tokens = 60\n", "[eval]\nmax_tokens = 60\n"):
        write(text)
        assert shown(capsys, "eval")["eval"]["eval_tokens"]["value"] == 60


WRONG = {
    'qunat = "wint4"': ["no option 'qunat'", "did you mean quant?"],
    "zzz = 1": ["no option 'zzz'", "config show"],
    "[chta]\nkv = 1": ["no command 'chta'", "did you mean chat?"],
    "[cache]\nolder_than = 1": ["no command 'cache'"],
    "[generate]\nrepetitions = 1": ["generate has no option 'repetitions'"],
    "[bench]\nrepetition = 1": ["bench has no option 'repetition'", "did you mean repetitions?"],
    'wint4 = "yes"': ['wint4 is "yes"', "true or false"],
    "temp = true": ["temp is true", "a text or a number"],
    "kv = ['int4']": ['kv is ["int4"]', "a text or a number"],
    "stop = [1]": ["stop is [1]", "list of texts"],
    "kv = 2020-01-01": ['kv is "2020-01-01"', "a text or a number"],
    "a = 1\nb = ]": ["line 2"],
    'a = "\\q"': ["line 1"],
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_file_is_told_in_one_line_and_does_not_block_help(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(text)
    assert main(GENERATE) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"qrun: {path}: ")
    assert err.count("\n") == 1
    for part in WRONG[text]:
        assert part in err
    for line in (["--version"], ["--help"], ["generate", "--help"], ["config", "path"], ["cache", "ls"]):
        assert main(line) == 0, line
    assert main(["config", "show"]) == 2


ORIGINS = {
    'temp = "warm"': ("QRUN_TEMP", "warm"),
    "temp = -1": ("QRUN_TEMP", "-1"),
    "threads = 0": ("QRUN_THREADS", "0"),
    'quant = "w9"': ("QRUN_QUANT", "w9"),
    'ctx_size = "32q"': ("QRUN_CTX_SIZE", "32q"),
    'device = "tpu"': ("QRUN_DEVICE", "tpu"),
}


@pytest.mark.parametrize("text", ORIGINS)
def test_an_error_says_who_set_the_value(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(text)
    assert main(GENERATE) == 2
    assert f"(from {path})" in capsys.readouterr().err
    variable, value = ORIGINS[text]
    monkeypatch.setenv(variable, value)
    assert main(GENERATE) == 2
    err = capsys.readouterr().err
    assert f"(from {variable})" in err
    assert str(path) not in err
    assert main([*GENERATE, f"--{variable[5:].lower().replace('_', '-')}={value}"]) == 2
    assert "(from" not in capsys.readouterr().err


def test_an_error_does_not_blame_what_it_does_not_mention(capsys: pytest.CaptureFixture[str]) -> None:
    write('kv = "int8"\ntop_k = 5\nsystem = "a thread"\n')
    assert main([*GENERATE, "--threads", "0"]) == 2
    assert "(from" not in capsys.readouterr().err
    write('model = "nosuch"\n')
    assert main(["generate", "-p", "x"]) == 3
    assert "config.toml" in capsys.readouterr().err


def test_another_file_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write("temp = 0.5\n")
    other = tmp_path / "other.toml"
    other.write_text("temp = 0.25\n")
    monkeypatch.setenv("QRUN_CONFIG", str(other))
    assert shown(capsys)["chat"]["temp"] == {"value": 0.25, "from": str(other)}
    monkeypatch.setenv("QRUN_CONFIG", "")
    assert shown(capsys)["chat"]["temp"] == {"value": None, "from": "default"}
    assert main(["config", "path"]) == 2
    for bad in (tmp_path, tmp_path / "missing.toml"):
        monkeypatch.setenv("QRUN_CONFIG", str(bad))
        assert main(GENERATE) == 2
        assert str(bad) in capsys.readouterr().err
    latin = tmp_path / "latin.toml"
    latin.write_bytes('system = "é"'.encode("latin-1"))
    monkeypatch.setenv("QRUN_CONFIG", str(latin))
    assert main(GENERATE) == 2
    monkeypatch.setattr(config_file, "MOST_BYTES", 5)
    assert main(GENERATE) == 2
    assert "more than 5 bytes" in capsys.readouterr().err


def test_show_names_value_and_origin(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = write("wint4 = true\n[chat]\ntemp = 0.5\n")
    monkeypatch.setenv("QRUN_KV", "int8")
    monkeypatch.setenv("QRUN_QUANT", "nf4")
    assert main(["config", "show"]) == 0
    out = capsys.readouterr().out
    rows = [line.split(maxsplit=1) for line in out.splitlines()]
    settings = dict(rows)
    assert settings["kv"].split() == ["int8", "QRUN_KV"]
    assert settings["quant"].split() == ["nf4", "QRUN_QUANT"]
    assert settings["wint4"].split() == ["false", "default"]
    assert settings["chat.temp"].split() == ["0.5", str(path)]
    assert settings["generate.temp"].split() == ["not", "set", "default"]
    assert len({line.index(line.split()[-1]) for line in out.splitlines()}) == 1
    assert main(["config", "show", "nosuch"]) == 2


def test_init_writes_every_option_and_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    before = shown(capsys)
    assert main(["config", "init"]) == 0
    path = paths.config_dir() / "config.toml"
    text = path.read_text(encoding="utf-8")
    assert shown(capsys) == before
    assert [each.name for each in path.parent.iterdir()] == ["config.toml"]
    content = tomllib.loads(re.sub(r"^#(?! )", "", text, flags=re.MULTILINE))
    places = config_file.default_map(command_line(), content)
    for name, command in config_file.commands(command_line()).items():
        assert set(places[name]) == {setting.name for setting in config_file.settings(command).values()}
    assert main(["config", "init"]) == 2
    assert path.read_text(encoding="utf-8") == text
