"""What `/set` can change on a session, by name: the sampling, thinking, and when a reply ends."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from qrun.errors import UsageError

if TYPE_CHECKING:
    from qrun.sampler import Sampling
    from qrun.session import Session

_T = TypeVar("_T")

FLOATS = ("temperature", "top_p", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty")
INTEGERS = ("top_k", "seed")
OTHERS = ("max_tokens", "overflow", "loop_guard", "stop", "think")
ALIASES = {"temp": "temperature", "n": "max_tokens"}
OPTIONS = {"temperature": "temp"}
"""Settings whose option has another name."""
NOTHING = ("", "off", "none", "random", "default")


def canonical(name: str) -> str:
    """Return the setting's own name for what was typed: `--top-p` and `temp` are understood.

    Raises:
        UsageError: there is no such setting.
    """
    plain = name.lower().lstrip("-").replace("-", "_")
    plain = ALIASES.get(plain, plain)
    if plain not in (*FLOATS, *INTEGERS, *OTHERS):
        raise UsageError(f"there is no setting {name}: possible are {', '.join((*FLOATS, *INTEGERS, *OTHERS))}")
    return plain


def change(session: "Session", name: str, value: str) -> None:
    """Set one setting from text; `off` or `random` removes a limit or the seed.

    Raises:
        UsageError: no such setting, or an impossible value; nothing is changed then.
    """
    key = canonical(name)
    if key in FLOATS or key in INTEGERS:
        number = None if key == "seed" and value in NOTHING else _number(key, value)
        session.sampling = dataclasses.replace(_sampling(session), **{key: number})
    elif key == "max_tokens":
        limit = None if value in NOTHING else int(_number(key, value, whole=True))
        if limit is not None and limit < 1:
            raise UsageError(f"max_tokens is {limit}: it must be 1 or more, or off")
        session.max_tokens = limit
    elif key == "stop":
        session.stop = () if value in NOTHING else (value,)
    elif key == "loop_guard":
        session.loop_guard = switch(key, value)
    elif key == "think":
        session.thinking = None if value in ("auto", "default") else switch(key, value)
    else:
        policies: dict[str, Literal["stop", "roll"]] = {"stop": "stop", "roll": "roll"}
        session.overflow = _choice(key, value, policies)


def described(session: "Session", only: str | None = None) -> Iterator[tuple[str, str]]:
    """Yield the settings as (name, value); with `only`, that one."""
    sampling = _sampling(session)
    values = {name: f"{getattr(sampling, name):g}" for name in FLOATS} | {"top_k": str(sampling.top_k)}
    values |= {
        "seed": "random" if sampling.seed is None else str(sampling.seed),
        "max_tokens": str(session.max_tokens or "off"),
        "overflow": session.overflow,
        "loop_guard": "on" if session.loop_guard else "off",
        "stop": " ".join(repr(text) for text in session.stop) or "off",
        "think": {None: "auto", True: "on", False: "off"}[session.thinking],
    }
    yield from values.items() if only is None else [(canonical(only), values[canonical(only)])]


def changed(session: "Session") -> dict[str, Any]:
    """Return the settings that are not the model's own, in JSON's types, for `restore`."""
    from qrun.sampler import Sampling

    now, usual = _sampling(session), Sampling.from_generation_config(session.engine.generation_defaults)
    names = [name for name in (*FLOATS, *INTEGERS) if getattr(now, name) != getattr(usual, name)]
    values: dict[str, Any] = {name: getattr(now, name) for name in names}
    values |= {"stop": list(session.stop)} if session.stop else {}
    usually = {"max_tokens": "off", "overflow": "stop", "loop_guard": "on", "think": "auto"}
    others = dict(described(session))
    return values | {name: others[name] for name, usual in usually.items() if others[name] != usual}


def restore(session: "Session", values: object, typed: Collection[str]) -> None:
    """Set what `changed` has returned, except for what was typed as an option this time.

    Raises:
        UsageError: a setting is impossible, so that the file it comes from must be damaged.
    """
    if not isinstance(values, dict):
        raise UsageError(f"the saved chat's settings are {values!r}: its file is damaged")
    for name, value in cast("dict[str, Any]", values).items():
        if OPTIONS.get(name, name) in typed:
            continue
        if name == "stop" and isinstance(value, list):
            session.stop = tuple(str(text) for text in cast("list[object]", value) if text)
        else:
            change(session, name, "random" if value is None else str(value))


def switch(name: str, value: str) -> bool:
    """Return what `on` and `off` mean.

    Raises:
        UsageError: it is neither.
    """
    return _choice(name, value, {"on": True, "off": False})


def _sampling(session: "Session") -> "Sampling":
    from qrun.sampler import Sampling

    return session.sampling or Sampling.from_generation_config(session.engine.generation_defaults)


def _number(name: str, value: str, *, whole: bool = False) -> float:
    try:
        return int(value) if whole or name in INTEGERS else float(value)
    except ValueError:
        kind = "a whole number" if whole or name in INTEGERS else "a number"
        raise UsageError(f"{name} {value!r} is not {kind}: /set {name} 1, for example") from None


def _choice(name: str, value: str, choices: Mapping[str, _T]) -> _T:
    if value not in choices:
        raise UsageError(f"{name} {value!r} does not exist: {' or '.join(choices)}")
    return choices[value]
