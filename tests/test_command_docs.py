"""COMMANDS.md and the help it is made of: up to date, the same for everyone, every example one that works."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from qrun.cli.main import FIRST_STEPS, command_line, main

ROOT = Path(__file__).resolve().parents[1]

# The tools are no package, and the root is not on the path here: see conftest.
sys.modules.setdefault("tools", ModuleType("tools")).__path__ = [str(ROOT / "tools")]

from tools import command_docs  # noqa: E402

ORDER = ["chat", "generate", "fit", "bench", "eval", "quantize", "doctor", "info", "cache", "config"]


def every(group: TyperGroup, path: str = "qrun") -> Iterator[tuple[str, TyperCommand | TyperGroup]]:
    """Every command and group with what is typed to call it."""
    yield path, group
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from every(command, f"{path} {name}")
        elif isinstance(command, TyperCommand):
            yield f"{path} {name}", command


COMMANDS = dict(every(command_line()))


def test_the_page_is_up_to_date() -> None:
    page = command_docs.TARGET.read_text(encoding="utf-8")
    assert page == command_docs.render(command_line()), "run: python -m tools.command_docs"


def test_the_page_does_not_depend_on_who_makes_it(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('quant = "nf4"\n')
    script = (
        f"import sys; sys.path.append({str(ROOT)!r}); from tools import command_docs; "
        "from qrun.cli.main import command_line; sys.stdout.write(command_docs.render(command_line()))"
    )
    other = {"COLUMNS": "40", "QRUN_KV": "int4", "QRUN_CONFIG": str(tmp_path / "config.toml"), "NO_COLOR": "1"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=os.environ | other, capture_output=True, cwd=tmp_path, timeout=60, check=True)
    assert done.stdout.decode() == command_docs.render(command_line())


def test_the_page_has_every_option_and_every_link_leads_somewhere() -> None:
    page = command_docs.render(command_line())
    for path, command in COMMANDS.items():
        assert f"# {path}\n" in page or path == "qrun"
        for param in command.params:
            if isinstance(param, TyperOption) and path != "qrun":
                assert f"`{param.opts[0]}" in page, (path, param.opts)
    titles = {command_docs._anchor(line.lstrip("# ")) for line in page.splitlines() if line.startswith("#")}
    links = re.findall(r"\]\(#([\w-]+)\)", page)
    assert len(links) > 10
    assert set(links) <= titles


def test_commands_stand_in_the_order_of_use() -> None:
    names = list(command_line().commands)
    known = [name for name in names if name in ORDER]
    assert len(known) > 5
    assert known == [name for name in ORDER if name in names]


def test_help_fits_the_terminal_and_leaves_examples_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("QRUN_CONFIG", "")
    assert main(["bench", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    example = lines[lines.index("Example:") + 1]
    assert example.startswith("  qrun bench ")
    assert len(example) > 60
    assert max(len(line) for line in lines if line != example) <= 60
    assert {"Arguments:", "Options:", "Model and precision:"} <= set(lines)
    assert any(line.startswith("  -c, --ctx-size TOKENS ") for line in lines)
    assert main(["cache"]) == 0
    assert "  prune  " in capsys.readouterr().out


def test_help_shows_the_defaults_of_the_config_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.toml").write_text('kv = "k8v4"\n')
    monkeypatch.setenv("QRUN_CONFIG", str(tmp_path / "config.toml"))
    assert main(["chat", "--help"]) == 0
    assert "[default: k8v4]" in capsys.readouterr().out


@pytest.mark.parametrize("path", COMMANDS)
def test_every_help_has_an_example_that_parses(path: str) -> None:
    lines = re.findall(r":  (?:.*\W)?qrun ([^|>)\n]*)", COMMANDS[path].help or "")
    assert re.search(r"(^|\. )Example:  ", COMMANDS[path].help or "", re.MULTILINE), f"{path} has no example"
    for line in lines:
        parse(shlex.split(line))


def test_the_first_screen_names_commands_that_work() -> None:
    lines = re.findall(r"^  qrun (.*?)   ", FIRST_STEPS, re.MULTILINE)
    assert len(lines) > 2
    for line in lines:
        if line != "--help":
            parse(shlex.split(line))


def parse(words: list[str]) -> None:
    """Let typer parse a command line, without running it."""
    command: object = command_line()
    context = None
    while isinstance(command, TyperGroup):
        context = typer.Context(command, info_name="qrun", parent=context)
        _, command, words = command.resolve_command(context, words)
    assert isinstance(command, TyperCommand)
    command.make_context("qrun", words, parent=context)
