"""What `/set` can change on a session, by name: the sampling, and when a reply ends."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal, TypeVar

from qrun.errors import UsageError

if TYPE_CHECKING:
    from qrun.sampler import Sampling
    from qrun.session import Session

_T = TypeVar("_T")

FLOATS = ("temperature", "top_p", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty")
INTEGERS = ("top_k", "seed")
OTHERS = ("max_tokens", "overflow", "loop_guard", "stop")
ALIASES = {"temp": "temperature", "n": "max_tokens"}
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
        session.loop_guard = _choice(key, value, {"on": True, "off": False})
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
    }
    yield from values.items() if only is None else [(canonical(only), values[canonical(only)])]


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
