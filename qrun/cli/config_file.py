"""The user's config file: TOML whose keys are options, at the top for every command, in a table for one of them.

Turned into typer's default map, which ranks below variables and flags. Knows the commands only by their parameters.
"""

import difflib
import json
import tomllib
from collections.abc import Collection, Mapping
from typing import Any, NoReturn, cast

from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from qrun import paths
from qrun.cli.options import ModelOptions
from qrun.cli.spread import rivals
from qrun.errors import UsageError

MOST_BYTES = 1 << 20
POSITIONAL = "model"
"""The one argument that may be set, where it may be left out; others say what to do rather than how."""

Setting = TyperOption | TyperArgument


def commands(root: TyperGroup) -> dict[str, TyperCommand]:
    """Return the commands that heed the file: all but those of groups, such as `qrun config` and `qrun cache`."""
    return {name: command for name, command in root.commands.items() if isinstance(command, TyperCommand)}


def settings(command: TyperCommand) -> dict[str, Setting]:
    """Return what can be set of a command, by the name of its option."""
    found: dict[str, Setting] = {}
    for param in command.params:
        if isinstance(param, TyperOption) and param.expose_value and not param.is_eager:
            found[_long_names(param)[0]] = param
        elif isinstance(param, TyperArgument) and param.name == POSITIONAL and not param.required:
            found[POSITIONAL] = param
    return found


def shared_name(name: str, setting: Setting) -> str:
    """Return the key that sets an option for every command: its name, unless its variable has another.

    `--max-tokens` of eval is `eval_tokens`, as its variable is `QRUN_EVAL_TOKENS`: it is not what chat calls so.
    """
    variable = setting.envvar.removeprefix("QRUN_").lower() if isinstance(setting.envvar, str) else name
    return name if variable in _long_names(setting) else variable


def read() -> dict[str, Any]:
    """Return the contents of the file; nothing if there is none.

    Raises:
        UsageError: it cannot be read, or is no TOML, or `QRUN_CONFIG` names a file that does not exist.
    """
    path = paths.config_file()
    if path is None or (path == paths.config_dir() / "config.toml" and not path.exists()):
        return {}
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UsageError(f"{path} has more than {MOST_BYTES} bytes: that is no config file")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the config file {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: {error}: correct it, or give QRUN_CONFIG= to do without") from None


def default_map(root: TyperGroup, content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what the file says of each command, as typer wants it: by parameter, with the values that flags give.

    Raises:
        UsageError: a key is no option of a command, or its value is of the wrong kind.
    """
    tables: dict[str, Any] = {name: value for name, value in content.items() if isinstance(value, dict)}
    top = {_plain(name): value for name, value in content.items() if name not in tables}
    known = {key for command in commands(root).values() for key in _keys(command, shared=True)}
    for name in tables:
        _check(name, commands(root), f"there is no command {name!r} with options")
    for name in top:
        _check(name, known, f"there is no option {name!r}")
    return {
        name: _merged(command, top, {_plain(key): value for key, value in tables.get(name, {}).items()})
        for name, command in commands(root).items()
    }


def _merged(command: TyperCommand, top: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The values for one command, by parameter: what its own table says replaces what is said for all."""
    shared, mine = _keys(command, shared=True), _keys(command, shared=False)
    for name in own:
        _check(name, mine, f"{command.name} has no option {name!r}")
    upper = {shared[key].name: _as_flag(key, shared[key], value) for key, value in top.items() if key in shared}
    lower = {mine[key].name: _as_flag(key, mine[key], value) for key, value in own.items()}
    for names in rivals(ModelOptions):
        if any(lower.get(name) for name in names):
            upper = {name: value for name, value in upper.items() if name not in names}
    return upper | lower


def _keys(command: TyperCommand, *, shared: bool) -> dict[str, Setting]:
    """Every key that sets something of the command, in its own table or for all commands."""
    found: dict[str, Setting] = {}
    for name, setting in settings(command).items():
        key = shared_name(name, setting)
        names = _long_names(setting) if key == name else () if shared else (name,)
        found |= dict.fromkeys((key, *names), setting)
    return found


def _long_names(setting: Setting) -> list[str]:
    return [_plain(name.removeprefix("--")) for name in setting.opts if name.startswith("--")] or [setting.name]


def _plain(key: str) -> str:
    return key.lower().replace("-", "_")


def _as_flag(key: str, setting: Setting, value: Any) -> bool | str | list[str]:
    """The value as the command line would have it, so that it is checked as there."""
    if isinstance(setting, TyperOption) and setting.is_flag:
        return value if isinstance(value, bool) else _refuse(key, value, "true or false")
    if setting.multiple:
        items = cast("list[object]", value) if isinstance(value, list) else [value]
        texts = [item for item in items if isinstance(item, str)]
        return texts if len(texts) == len(items) else _refuse(key, value, "a text, or a list of texts")
    plain = isinstance(value, str | int | float) and not isinstance(value, bool)
    return str(value) if plain else _refuse(key, value, "a text or a number")


def _refuse(key: str, value: Any, want: str) -> NoReturn:
    shown = json.dumps(value, default=str, ensure_ascii=False)
    raise UsageError(f"{paths.config_file()}: {key} is {shown}: it must be {want}")


def _check(name: str, known: Collection[str], complaint: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        advice = f"did you mean {near[0]}?" if near else "qrun config show lists what there is"
        raise UsageError(f"{paths.config_file()}: {complaint}: {advice}")
