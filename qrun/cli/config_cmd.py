"""`qrun config`: what is set, and where. The file itself is `qrun.cli.config_file`."""

import json
import os
import textwrap
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from qrun import paths
from qrun.cli import config_file
from qrun.cli.console import Console
from qrun.cli.helptext import Command
from qrun.cli.helptext import value as placeholder
from qrun.cli.options import ModelOptions
from qrun.cli.sanitize import one_line
from qrun.cli.spread import origin, rivals, settle
from qrun.errors import UsageError

app = typer.Typer(
    no_args_is_help=True,
    help="What options are when they are not given: the config file and QRUN_* variables. "
    "Example:  qrun config show chat",
)

Values = dict[str, tuple[Any, str]]
"""What a command's options are when none is given, by name, and which file or variable says so."""

HEADER = """\
# What qrun's options are when they are not given. A QRUN_* variable beats this file, a flag beats both.
# A table such as [chat], after everything else, holds for that command and beats what stands above it.
"""


def _complete_command(context: typer.Context, incomplete: str) -> list[str]:
    return [name for name in config_file.commands(_root(context)) if name.startswith(incomplete)]


@app.command(cls=Command)
def show(
    context: typer.Context,
    command: Annotated[
        str | None,
        typer.Argument(metavar="COMMAND", autocompletion=_complete_command, help="Only the settings of this command."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what every option is when it is not given, and which file or variable says so.

    Example:  qrun config show chat
    """
    root = _root(context)
    defaults = config_file.default_map(root, config_file.read())
    found = {name: _values(each, name, defaults[name]) for name, each in config_file.commands(root).items()}
    if command is not None:
        if command not in found:
            raise UsageError(f"there is no command {command!r} with options: give one of {', '.join(found)}")
        found = {command: found[command]}
    console = Console()
    if as_json:
        tree = {
            name: {key: {"value": value, "from": where} for key, (value, where) in values.items()}
            for name, values in found.items()
        }
        file = paths.config_file()
        shown = {"file": None if file is None else str(file), "commands": tree}
        console.raw(json.dumps(shown, ensure_ascii=False, default=str) + "\n")
        return
    rows = _rows(found)
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, value, where in rows:
        console.raw(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {where}".rstrip() + "\n")


@app.command("path", cls=Command)
def show_path() -> None:
    """Print the path of the config file.

    Example:  $EDITOR "$(qrun config path)"
    """
    Console().raw(f"{_path()}\n")


@app.command(cls=Command)
def init(context: typer.Context) -> None:
    """Write a config file that names every option, all of them commented out.

    Example:  qrun config init
    """
    path = _path()
    if path.exists():
        raise UsageError(f"{path} exists: edit it, or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(_template(_root(context)), encoding="utf-8")
        beside.rename(path)
    finally:
        beside.unlink(missing_ok=True)
    Console().note(f"{path} written: remove the # before what you set")


def _path() -> Path:
    path = paths.config_file()
    if path is None:
        raise UsageError("no config file is read: QRUN_CONFIG is empty")
    return path


def _root(context: typer.Context) -> TyperGroup:
    root = context.find_root().command
    assert isinstance(root, TyperGroup)
    return root


def _values(command: TyperCommand, called: str, defaults: dict[str, Any]) -> Values:
    context = typer.Context(command, info_name=called, default_map=defaults)
    settings = config_file.settings(command)
    for setting in settings.values():
        setting.handle_parse_result(context, {}, [])
    values = dict(context.params)
    settle(values, context, rivals(ModelOptions))
    found: Values = {}
    for name, setting in settings.items():
        silenced = values[setting.name] != context.params[setting.name]
        where = "" if silenced else origin(context, setting.name)
        found[config_file.shared_name(name, setting)] = values[setting.name], where or "default"
    return found


def _rows(found: Mapping[str, Values]) -> list[tuple[str, str, str]]:
    """Name, value and origin: one row for all commands that agree, one for each where they do not."""
    by_name: defaultdict[str, dict[str, tuple[str, str]]] = defaultdict(dict)
    for command, values in found.items():
        for name, (value, where) in values.items():
            by_name[name][command] = _text(value), where
    rows: list[tuple[str, str, str]] = []
    for name, commands in by_name.items():
        if len(set(commands.values())) == 1:
            commands = {"": next(iter(commands.values()))}
        rows += [(f"{command}.{name}".lstrip("."), *each) for command, each in commands.items()]
    return rows


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return one_line(", ".join(map(str, cast("Sequence[object]", value)))) or "not set"
    return "not set" if value is None else one_line(str(value))


def _template(root: TyperGroup) -> str:
    """A config file with every option, commented out, and what it does; what one command alone has is in its table."""
    tables = {name: config_file.settings(command) for name, command in config_file.commands(root).items()}
    marked = [(_mark(name, each), each) for settings in tables.values() for name, each in settings.items()]
    uses = Counter(mark for mark, _ in marked)
    common: dict[str, tuple[tuple[str, str], config_file.Setting]] = {}
    for mark, each in marked:
        if uses[mark] > 1:
            common.setdefault(mark[0], (mark, each))
    lines = [HEADER]
    for name, (_, setting) in common.items():
        lines += _lines(name, setting)
    listed = {mark for mark, _ in common.values()}
    for command, settings in tables.items():
        own = {name: each for name, each in settings.items() if _mark(name, each) not in listed}
        lines += [f"[{json.dumps(command) if ' ' in command else command}]", ""] if own else []
        for name, setting in own.items():
            lines += _lines(name, setting)
    return "\n".join(lines)


def _mark(name: str, setting: config_file.Setting) -> tuple[str, str]:
    """What tells whether two commands have the same option."""
    return config_file.shared_name(name, setting), setting.help or ""


def _lines(name: str, setting: config_file.Setting) -> list[str]:
    comment = textwrap.wrap(setting.help or "", 110, initial_indent="# ", subsequent_indent="# ")
    return [*comment, f"#{name} = {_example(setting)}", ""]


def _example(setting: config_file.Setting) -> str:
    """A value in TOML: the default, or a placeholder for what has none."""
    if isinstance(setting, TyperOption) and setting.is_flag:
        return json.dumps(bool(setting.default))
    return json.dumps(
        setting.metavar or placeholder(setting) if setting.default is None else setting.default, ensure_ascii=False
    )
