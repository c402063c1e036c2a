"""What a model's name means: a directory here, or a repository and a revision on the hub. Asks no network."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qrun.aliases import ALIASES, Alias, family, known_names
from qrun.errors import DoesNotFitError, ModelNotFoundError
from qrun.memory import Forecast, forecast, human
from qrun.models import describe
from qrun.recipe import Recipe

ELSE: Final = "or talk to the embedded model: qrun chat spark"
"""How every message about a model that cannot be had ends."""
_REPO: Final = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class Name:
    """A repository, a revision if one was named, and what the user should know of how it was chosen (may be empty)."""

    repo: str
    revision: str | None = None
    note: str = ""

    @property
    def label(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def local_path(text: str) -> Path | None:
    """The model here that ``text`` names; None if it names one on the hub.

    A directory that happens to be called like a short name counts only if it holds a model.
    Raises `ModelNotFoundError` for a path to nothing.
    """
    if not text.strip():
        raise ModelNotFoundError(f"the model's name is empty: give a directory, a short name or org/name, {ELSE}")
    path = Path(text).expanduser()
    if path.exists() and ((path / "config.json").exists() or text.lower() not in known_names()):
        return path
    if text.startswith((".", "/", "~")) or text.partition("@")[0].count("/") > 1 or "\\" in text:
        raise ModelNotFoundError(f"there is no directory {text}: check the path, {ELSE}")
    return None


def resolve(text: str, recipe: Recipe, *, context: int, memory: int, device: str = "cpu") -> list[Name]:
    """What a short name, a bare family, or ``org/name[@revision]`` can mean, best first; one, except for a family.

    A bare family means those that fit ``memory`` bytes of ``device`` at this recipe and context (-1: all the model
    has), the largest first.

    Raises `ModelNotFoundError` for a name that means nothing, `DoesNotFitError` if none of a family fits.
    """
    short, _, pinned = text.lower().partition("@")
    if short in ALIASES:
        return [Name(ALIASES[short].repo, pinned or None)]
    members = family(short)
    if members:
        return [
            Name(
                alias.repo,
                pinned or None,
                f"{text} is {alias.name} ({alias.repo}), the largest that fits {human(memory)} at {recipe.name}",
            )
            for alias in _fitting(short, members, recipe, context, memory, device)
        ]
    match = _REPO.fullmatch(text)
    if match is None:
        group = short.split(":")[0]
        tags = [alias.name for alias in ALIASES.values() if group in (alias.name.split(":")[0], *alias.families)]
        known = ", ".join(tags) or "one of ernie, llama, mistral, qwen2.5, qwen3 (with a tag, as in qwen3:4b)"
        raise ModelNotFoundError(f"no model is called {text!r}: use a directory, org/name, {known}, {ELSE}")
    return [_torch_style(match["repo"], match["revision"])]


def _torch_style(repo: str, revision: str | None) -> Name:
    """ERNIE's repositories for another framework have another layout; their twins in ``-PT`` are meant."""
    if not repo.startswith("baidu/ERNIE-4.5-") or repo.endswith(("-PT", "-Thinking")):
        return Name(repo, revision)
    twin = repo.removesuffix("-Paddle") + "-PT"
    return Name(twin, revision, f"{twin} instead of {repo}: the -PT repositories are in the layout that qrun reads")


def _fitting(name: str, members: list[Alias], recipe: Recipe, context: int, memory: int, device: str) -> list[Alias]:
    needs = {alias.name: _need(alias, recipe, context, device) for alias in members}
    by_size = sorted(members, key=lambda alias: needs[alias.name].parameters, reverse=True)
    fitting = [alias for alias in by_size if needs[alias.name].needed <= memory]
    if fitting:
        return fitting
    least = by_size[-1].name
    raise DoesNotFitError(
        f"no {name} model fits at {recipe.name}: {least} needs {human(needs[least].needed)}, {human(memory)} are free; "
        f"try --quant wint4 or a smaller --ctx-size, {ELSE}"
    )


def _need(alias: Alias, recipe: Recipe, context: int, device: str) -> Forecast:
    config = describe(alias.config)
    room = config.positions if context < 1 else min(context, config.positions)
    return forecast(config, recipe, room, device=device)
