"""A GGUF file, or the shards of one, as a checkpoint: configs from its metadata, tensors under Hugging Face's names."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final, Self

import torch
from torch import Tensor

from qrun.checkpoint import Checkpoint
from qrun.errors import CheckpointError, ModelNotFoundError
from qrun.gguf_file import GgufFile, gguf_at
from qrun.gguf_model import config_of, generation_of
from qrun.gguf_names import Piece, pieces
from qrun.readers.gguf import PLAIN, GgufReader, expand

_SHARD: Final = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_MOST_SHARDS: Final = 1000


@dataclass(frozen=True)
class GgufCheckpoint(Checkpoint):
    """A model in GGUF. Make one with `open`; ``file`` is the one with the metadata, ``path`` its path."""

    file: GgufFile = field(kw_only=True)
    pieces: Mapping[str, Piece] = field(kw_only=True)
    """Where each tensor lies, by its Hugging Face name."""

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read the header of a file, and of its other shards if it is the first of several.

        Raises `ModelNotFoundError` if there is no such file, `CheckpointError` if one is missing, damaged or lies, and
        `UnsupportedModelError` for a model that qrun does not run.
        """
        if not path.is_file():
            raise ModelNotFoundError(f"there is no file {path}: check the path")
        first = GgufFile(path)
        files = _holders(first)
        config = config_of(first, files)
        return cls(path, config, generation_of(first.metadata), {}, file=first, pieces=pieces(files, config))

    def names(self) -> Sequence[str]:
        return sorted(self.pieces)

    def __contains__(self, name: str) -> bool:
        return name in self.pieces

    def shape(self, name: str) -> tuple[int, ...]:
        return self._piece(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that `read` gives: float32 where the tensor is quantized."""
        return PLAIN.get(self._piece(name).kind, torch.float32)

    def nbytes(self, name: str) -> int:
        return self._piece(name).nbytes

    def read(self, name: str) -> Tensor:
        """The tensor's values, a private CPU copy, expanded where it is quantized."""
        return expand(name, self._piece(name))

    @cached_property
    def reader(self) -> GgufReader:
        return GgufReader(self, self.pieces)

    def require(self, name: str, shape: Sequence[int]) -> None:
        self._piece(name).require(name, tuple(shape))

    @cached_property
    def identity(self) -> str:
        """Names, sizes and times of the files, for a cache's key."""
        digest = hashlib.sha256()
        for path in sorted({piece.file.path for piece in self.pieces.values()} | {self.path}):
            status = path.stat()
            digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        return f"gguf:{digest.hexdigest()}"

    def _piece(self, name: str) -> Piece:
        try:
            return self.pieces[name]
        except KeyError:
            raise CheckpointError(
                f"{self.path} has no tensor {name}: the file is not a whole model, or of a kind that qrun does not run"
            ) from None


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at a path: a GGUF file, a directory that has one and no safetensors, or a safetensors directory.

    Raises as `GgufCheckpoint.open` and `Checkpoint.open`, and `CheckpointError` where a directory has several models.
    """
    file = gguf_at(path)
    return Checkpoint.open(path) if file is None else GgufCheckpoint.open(file)


def _holders(first: GgufFile) -> dict[str, GgufFile]:
    """Which file holds each tensor: the one that was opened, or one of its shards."""
    count = first.metadata.get("split.count", 1)
    files = [first]
    if count not in (0, 1):
        match = _SHARD.fullmatch(first.path.name)
        named = int(match["count"]) if match else 0
        if match is None or not 1 < named <= _MOST_SHARDS or count != named or first.metadata.get("split.no") != 0:
            raise CheckpointError(
                f"{first.path} is a shard of {count!r}: give the first one, under its own name …-00001-of-….gguf"
            )
        for number in range(2, named + 1):
            path = first.path.with_name(f"{match['stem']}-{number:05}-of-{match['count']}.gguf")
            if not path.is_file():
                raise CheckpointError(f"{first.path.parent} has no {path.name}: fetch the missing shard")
            shard = GgufFile(path)
            if (shard.metadata.get("split.no"), shard.metadata.get("split.count")) != (number - 1, count):
                raise CheckpointError(f"{path} is not shard {number} of {count}: fetch it again")
            files.append(shard)
    holders: dict[str, GgufFile] = {}
    for file in files:
        for name in file.entries:
            if name in holders:
                raise CheckpointError(
                    f"{name} is both in {holders[name].path.name} and in {file.path.name}: fetch both"
                )
            holders[name] = file
    return holders
