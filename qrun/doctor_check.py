"""What `qrun doctor` finds, as plain data, and what of it may leave the machine. It looks at nothing itself."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal, TypeAlias

Status: TypeAlias = Literal["ok", "note", "warning", "failure"]
Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with what is looked at, how much of it is done, and of how much."""

PUBLIC: Final = ("usr", "opt", "lib", "lib64", "bin", "dev", "sys", "proc", "etc")
"""Top directories whose insides are nobody's secret."""
_TOKEN: Final = re.compile(r"\b(hf_|sk-|ghp_|github_pat_)[\w-]{8,}")
_LOGIN: Final = re.compile(r"://[^/\s@]+@")
_PATH: Final = re.compile(r"(?<![\w~./:…])/([\w.+@-]+)(/[^\s'\",;:()]*)")


@dataclass(frozen=True)
class Run:
    """One call of a kernel: |found - wanted| / |wanted| and what it may be, its time, and bytes of weights a second."""

    tokens: int
    error: float
    bound: float
    milliseconds: float
    bytes_per_second: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at. ``fix`` says what to do about it; kernels also say what ran, and how it did."""

    section: str
    name: str
    status: Status
    detail: str
    fix: str = ""
    kernel: str = ""
    fallback: bool = False
    runs: tuple[Run, ...] = ()


def failed(checks: Iterable[Check]) -> bool:
    """Whether anything is wrong; notes and warnings are not."""
    return any(check.status == "failure" for check in checks)


def summary(checks: Iterable[Check]) -> str:
    """How many of each status: `40 ok, 2 notes, 1 warning, no failures`."""
    found = [check.status for check in checks]
    counts = [f"{found.count('ok')} ok"]
    for status in ("note", "warning", "failure"):
        count = found.count(status)
        counts.append(f"{count or 'no'} {status}{'' if count == 1 else 's'}")
    return ", ".join(counts)


def first_line(error: BaseException) -> str:
    """An error in one line, its type first."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def public(check: Check, home: Path) -> Check:
    """The check as it may be shown to strangers."""
    return replace(
        check, name=_public(check.name, home), detail=_public(check.detail, home), fix=_public(check.fix, home)
    )


def _public(text: str, home: Path) -> str:
    """Text without tokens and logins, the home directory as ``~``, other users' and projects' paths cut short."""
    text = _LOGIN.sub("://…@", _TOKEN.sub(r"\1…", text))
    if home != Path(home.anchor):
        text = re.sub(rf"{re.escape(str(home))}(?![\w.-])", "~", text)
    return _PATH.sub(lambda found: found[0] if found[1] in PUBLIC else f"/{found[1]}/…", text)
