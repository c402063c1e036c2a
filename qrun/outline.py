"""From what a user calls a model to the little that a forecast needs of it: its config, and what file headers tell.

Weights are never fetched: of a repository on the hub come its config and the header of one file. It knows no recipe.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

from qrun.aliases import ALIASES, Alias, family
from qrun.assign import Formats, by_checkpoint
from qrun.checkpoint import INDEX, INDEX_LIMIT, SINGLE, has_all_weights, read_config
from qrun.errors import CheckpointError, ModelNotFoundError
from qrun.gguf_checkpoint import open_checkpoint
from qrun.hub import EMBEDDED, HubClient, HuggingFace, is_offline
from qrun.models import describe
from qrun.models.config import ModelConfig
from qrun.names import ELSE, Name, local_path, resolve
from qrun.readers import quantization
from qrun.recipe import Recipe
from qrun.tensorfile import DTYPES, load_json

HEAD: Final = "lm_head.weight"
HEAD_PARTS: Final = (HEAD, "lm_head.qweight", "lm_head.W_q", "lm_head._weight")


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A model as ``name`` calls it. ``itemsize`` is bytes per number in its files, ``tied`` none where nothing tells;
    ``note`` is what the user should know of it (may be empty)."""

    name: str
    config: ModelConfig
    tied: bool | None
    itemsize: int = 2
    stored: Formats | None = None
    """The formats of a checkpoint that is quantized already."""
    files: int | None = None
    """Bytes of one of which no more is known than that it is quantized."""
    note: str = ""

    @property
    def quantized(self) -> bool:
        return self.stored is not None or self.files is not None


def outlines(name: str, *, offline: bool = False, client: HubClient | None = None) -> list[Outline]:
    """What ``name`` stands for: one model, or every size of a bare family, or every short name if it is empty.

    Short names need no network. Raises `ModelNotFoundError` if there is no such model here or on the hub, and
    `CheckpointError` if its files are of no use.
    """
    short = name.lower()
    if not name:
        return [_of_alias(alias) for alias in ALIASES.values()]
    if name == EMBEDDED:
        return [_of_directory(Path(__file__).parent / EMBEDDED, name)]
    here = local_path(name)
    if here is not None:
        return [_of_directory(here, name)]
    if short in ALIASES:
        return [_of_alias(ALIASES[short])]
    if family(short):
        return [_of_alias(alias) for alias in family(short)]
    meant = resolve(name, Recipe.parse(), context=1, memory=1 << 62)[0]
    return [_of_repository(meant, client or HuggingFace(), offline=offline or is_offline())]


def _of_alias(alias: Alias) -> Outline:
    config = describe(alias.config)
    return Outline(name=alias.name, config=config, tied=config.tied)


def _of_directory(path: Path, name: str) -> Outline:
    checkpoint = open_checkpoint(path)
    config = describe(checkpoint.config)
    stored = by_checkpoint(checkpoint, Recipe.parse("auto")) if checkpoint.reader is not None else None
    return Outline(
        name=name, config=config, tied=_tied(config, checkpoint.has(HEAD)), itemsize=checkpoint.itemsize, stored=stored
    )


def _tied(config: ModelConfig, has_head: bool) -> bool:
    return not has_head if config.tied is None else config.tied


def _of_repository(meant: Name, client: HubClient, *, offline: bool) -> Outline:
    """From the hub; where it cannot be asked, from the cache as far as that goes."""
    if offline:
        return _cached(meant, client)
    try:
        return _asked(meant, client)
    except ModelNotFoundError as error:
        with contextlib.suppress(ModelNotFoundError):
            return _cached(meant, client, f"{str(error).removesuffix(f', {ELSE}')}; the cached copy is used")
        raise


def _cached(meant: Name, client: HubClient, note: str = "") -> Outline:
    path = client.file(meant.repo, "config.json", meant.revision or "main", offline=True).parent
    if has_all_weights(path):
        found = _of_directory(path, meant.label)
        return replace(found, note=note)
    config = describe(read_config(path))
    return Outline(name=meant.label, config=config, tied=config.tied, note=note)


def _asked(meant: Name, client: HubClient) -> Outline:
    repo, revision = meant.repo, meant.revision or "main"
    sizes = {name: size for name, size in client.sizes(repo, revision).items() if "/" not in name}
    if "config.json" not in sizes:
        raise CheckpointError(f"{repo} has no config.json: choose a transformers-style repository, {ELSE}")
    said = read_config(client.file(repo, "config.json", revision).parent)
    config = describe(said)
    shards = sorted(name for name in sizes if name.endswith(".safetensors") and not name.startswith("consolidated"))
    if not shards:
        raise CheckpointError(f"{repo} has no safetensors weights: choose a repository that has, {ELSE}")
    names: Mapping[str, object] = {}
    if SINGLE not in sizes and INDEX in sizes:
        if sizes[INDEX] > INDEX_LIMIT:
            raise CheckpointError(f"{repo}: {INDEX} is larger than {INDEX_LIMIT >> 20} MiB: choose another repository")
        index = load_json(client.file(repo, INDEX, revision).read_bytes(), f"{repo}/{INDEX}").get("weight_map")
        names = cast(dict[str, Any], index) if isinstance(index, dict) else {}
    header = client.header(repo, SINGLE if SINGLE in sizes else shards[0], revision)
    kinds = [DTYPES[kind].itemsize for kind in header.values() if kind in DTYPES]
    return Outline(
        name=meant.label,
        config=config,
        tied=_tied(config, any(name.startswith(HEAD_PARTS) for name in (names or header))),
        itemsize=max(kinds, default=2),
        files=sum(sizes[name] for name in shards) if quantization(said) else None,
        note=meant.note,
    )
