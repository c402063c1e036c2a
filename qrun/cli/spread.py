"""From dataclasses of options to a command's signature, and back. Knows typer's conventions, but no option by name."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

from typer.models import ParameterInfo


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Spread the dataclass parameters of `command` into options, one per field, and hand it the dataclasses back.

    Every option gets an environment variable `QRUN_NAME`, where NAME is the field's name, unless the option names its
    own. The other parameters of `command` stay as they are.
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
        else:
            parameters[name] = _parameter(name, hints[name], parameter.default)

    def spread(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
        command(**values)

    spread.__name__, spread.__doc__ = command.__name__, command.__doc__
    spread.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    spread.__dict__["__signature__"] = inspect.Signature(list(parameters.values()))
    return spread


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    for extra in get_args(annotation)[1:]:
        if isinstance(extra, ParameterInfo):
            extra.envvar = f"QRUN_{name.upper()}" if extra.envvar is None else extra.envvar
            extra.show_envvar = False
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
