"""From dataclasses of options to a command's signature, and back. Knows typer's conventions, but no option by name."""

import dataclasses
import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.models import ParameterInfo

from qrun import paths
from qrun.errors import ModelNotFoundError, UsageError

SOURCES = ("DEFAULT", "DEFAULT_MAP", "ENVIRONMENT", "COMMANDLINE")
"""Where typer says a value came from, the weakest first; its default map is our config file."""

TYPED = "typed"


@dataclasses.dataclass(frozen=True)
class Rival:
    """Marks the options that exclude each other: one set closer to the command line silences the others."""

    group: str


def rivals(kind: type) -> list[list[str]]:
    """Return the names of the fields of a dataclass that exclude each other, group by group."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name, hint in get_type_hints(kind, include_extras=True).items():
        for extra in get_args(hint)[1:] if get_origin(hint) is Annotated else ():
            if isinstance(extra, Rival):
                groups[extra.group].append(name)
    return list(groups.values())


def settle(values: dict[str, Any], context: typer.Context, groups: Sequence[Sequence[str]]) -> None:
    """Put back to its default, in `values`, whatever a rival beats: a flag beats a variable, a variable the file."""
    defaults = {param.name: param.default for param in context.command.params}
    for names in groups:
        ranks = {name: _rank(context, name) for name in names if values.get(name) != defaults.get(name)}
        for name, rank in ranks.items():
            if rank < max(ranks.values()):
                values[name] = defaults[name]


def origin(context: typer.Context, name: str) -> str:
    """Return the variable or the file that set a parameter; empty for the command line and for defaults."""
    source = SOURCES[_rank(context, name)]
    if source == "DEFAULT_MAP":
        return str(paths.config_file())
    variables = [param.envvar for param in context.command.params if param.name == name]
    return str(variables[0]) if source == "ENVIRONMENT" else ""


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Spread the dataclass parameters of `command` into options, one per field, and hand it the dataclasses back.

    Every option gets an environment variable `QRUN_NAME`, where NAME is the field's name, unless the option names its
    own. The other parameters of `command` stay as they are; one called `typed` gets the names of the parameters that
    were on the command line. An error about a value says which variable or file set it.
    """
    groups: dict[str, Any] = {}
    parameters: dict[str, inspect.Parameter] = {}
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        if dataclasses.is_dataclass(hints[name]):
            groups[name] = hints[name]
            fields = get_type_hints(hints[name], include_extras=True)
            for field in dataclasses.fields(groups[name]):
                parameters[field.name] = _parameter(field.name, fields[field.name], field.default)
        elif name != TYPED:
            parameters[name] = _parameter(name, hints[name], parameter.default)
    wants_typed = TYPED in hints

    def spread(context: typer.Context, **values: Any) -> None:
        for name, group in groups.items():
            settle(values, context, rivals(group))
            values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
        if wants_typed:
            names = (param.name for param in context.command.params)
            values[TYPED] = frozenset(name for name in names if SOURCES[_rank(context, name)] == "COMMANDLINE")
        try:
            command(**values)
        except (UsageError, ModelNotFoundError) as error:
            raise type(error)(_blaming(str(error), context)) from error

    spread.__name__, spread.__doc__ = command.__name__, one_line_paragraphs(command.__doc__ or "")
    spread.__annotations__ = {"context": typer.Context} | {name: each.annotation for name, each in parameters.items()}
    first = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    spread.__dict__["__signature__"] = inspect.Signature([first, *parameters.values()])
    return spread


def one_line_paragraphs(text: str) -> str:
    """Return a docstring with each paragraph on one line, for the terminal to wrap; indented ones stay as they are."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(each if "\n " in each else each.replace("\n", " ") for each in paragraphs)


def _rank(context: typer.Context, name: str) -> int:
    source = context.get_parameter_source(name)
    return SOURCES.index(source.name) if source is not None else 0


def _blaming(message: str, context: typer.Context) -> str:
    """Return an error's message with who set the values it complains of, if that was not the command line."""
    complaint = re.split("[:;] ", message)[0]
    found: dict[str, None] = {}
    for param in context.command.params:
        where, value = origin(context, param.name), context.params.get(param.name)
        names = [opt for opt in (*param.opts, *param.secondary_opts) if opt.startswith("-")]
        words = [*names, value] if value and isinstance(value, str) else names
        named = any(re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", complaint) for word in words)
        subject = complaint.partition(" is ")[0].replace("_", "-")
        if where and (named or f"--{subject}" in names):
            found[f" (from {where})"] = None
    return complaint + "".join(found) + message.removeprefix(complaint)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    for extra in get_args(annotation)[1:]:
        if isinstance(extra, ParameterInfo):
            extra.envvar = f"QRUN_{name.upper()}" if extra.envvar is None else extra.envvar
            extra.show_envvar = False
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
