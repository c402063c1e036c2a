"""Renders a chat template in a process of its own; run as a script by ``qrun.template``, imports nothing of qrun.

Templates come with checkpoints, so they are untrusted. Jinja's sandbox keeps them from Python's internals but lets
them compute for ever or fill the memory; here the operating system bounds both, and only this process dies of it.

Protocol, one JSON value a line: first ``{"path": sys.path, "memory": bytes}``, answered ``{}``; then requests
``{"source": str, "variables": {...}, "output": characters, "seconds": float}``, each answered ``{"text": str}``,
``{"refused": str}`` (the template raised an exception of its own) or ``{"error": str}``. No answer means that the
process was killed at a bound.
"""

import json
import sys
from typing import Any


def _bound_memory(limit: int) -> None:
    if sys.platform != "win32":
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_AS)
        if most == resource.RLIM_INFINITY or most > limit:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _bound_time(seconds: float) -> None:
    """Die after so many seconds, even inside one long C call and even if the parent is gone; 0 lifts the bound."""
    if sys.platform != "win32":
        import signal

        signal.setitimer(signal.ITIMER_REAL, seconds)


class _Refused(Exception):
    """What a template's ``raise_exception`` raises."""


def _environment() -> Any:
    from datetime import datetime

    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """``{% generation %}…{% endgeneration %}`` marks the assistant's text for training; here it is transparent."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise _Refused(message)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment: Any = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def _render(environment: Any, request: dict[str, Any]) -> str:
    chunks: list[str] = []
    room: int = request["output"]
    for chunk in environment.from_string(request["source"]).generate(request["variables"]):
        room -= len(chunk)
        if room < 0:
            raise ValueError(f"its output is longer than {request['output']} characters")
        chunks.append(chunk)
    return "".join(chunks)


def _answer(environment: Any, request: dict[str, Any]) -> dict[str, str]:
    try:
        return {"text": _render(environment, request)}
    except _Refused as refusal:
        return {"refused": " ".join(str(refusal).split())[:300]}
    except MemoryError:
        return {"error": "it uses too much memory"}
    except RecursionError:
        return {"error": "it recurses without end"}
    except Exception as error:  # whatever a hostile template provokes
        line = getattr(error, "lineno", None)
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        return {"error": f"line {line}: {reason}" if line else reason}


def main() -> None:
    """Serve requests until standard input closes."""
    hello = json.loads(sys.stdin.readline())
    sys.path[:] = hello["path"]
    environment = _environment()
    _bound_memory(hello["memory"])
    print("{}", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        _bound_time(request["seconds"])
        answer = json.dumps(_answer(environment, request))
        _bound_time(0)
        print(answer, flush=True)


if __name__ == "__main__":
    main()
