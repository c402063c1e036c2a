"""A conversation's cache on disk: ids and what the cache holds of them, one safetensors file.

Written beside its place and renamed when complete, readable by its owner alone; read back only into an engine of the
same model and weights, and trusted in nothing. It knows caches and files, no model and no text.
"""

import contextlib
import os
import tempfile
import zlib
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, cast, get_args

import torch
from torch import Tensor

from qrun.cache import KVCache, KVStore
from qrun.errors import CheckpointError, SnapshotError
from qrun.formats.kv import KVFormat, kv_format
from qrun.recipe import CacheType
from qrun.tensorfile import TensorFile, TensorWriter

KIND: Final = "qrun-kv"
VERSION: Final = "1"
"""Raise when the layout of the file or the bytes of a cache format change."""
AGAIN: Final = "its text must be read again"


@dataclass(frozen=True)
class Origin:
    """What a cache's numbers come from: the checkpoint's identity, and the recipe without its cache part."""

    model: str
    weights: str


def write(path: Path, cache: KVCache, ids: list[int], origin: Origin) -> None:
    """Keep ids and the first ``len(ids)`` positions of the cache; of these one layer's keys are copied at a time.

    Raises SnapshotError where the file cannot be written; what was there before is then untouched.
    """
    try:
        with _beside(path) as place, TensorWriter(place, _room(cache)) as out:
            checksum = 0
            for name, tensor in _contents(cache, ids):
                out.add(name, tensor)
                checksum = _checksum(tensor, checksum)
            out.metadata.update(
                kind=KIND, version=VERSION, qrun=version("qrun-llm"), model=origin.model, weights=origin.weights,
                k=cache.layers[0].k.format.name, v=cache.layers[0].v.format.name, crc32=f"{checksum:08x}",
            )  # fmt: skip
    except OSError as error:
        raise SnapshotError(
            f"{path}: cannot write the snapshot ({error.strerror or error}); choose another place"
        ) from error


class Snapshot:
    """A snapshot opened for reading, its header found to fit a cache that nothing was done to yet.

    Raises SnapshotError where the file is missing, damaged, of another version, model or recipe, or too long.
    """

    def __init__(self, path: Path, cache: KVCache, *, origin: Origin, vocab: int) -> None:
        self.path = path
        if not path.is_file():
            raise SnapshotError(f"there is no snapshot {path}: check the path")
        with self._reading():
            self._file = TensorFile(path, limit=_room(cache))
        about = self._file.metadata
        self._check_origin(about, origin)
        self._formats = tuple(self._format(about, side) for side in ("k", "v"))
        self.length = self._check_shapes(cache)
        with self._reading():
            found: Any = self._file.read("ids")
        self._checksum = _checksum(found, 0)
        self.ids: list[int] = found.tolist()
        if not all(0 <= i < vocab for i in self.ids):
            raise self._damaged(f"a token id is outside 0 … {vocab - 1}")

    def fill(self, cache: KVCache) -> None:
        """Put what it holds into the cache's first positions, in the cache's formats; its length is left as it is.

        Raises SnapshotError where the file turns out damaged.
        """
        checksum = self._checksum
        for i, layer in enumerate(cache.layers):
            for side, kind, store in zip("kv", self._formats, (layer.k, layer.v), strict=True):
                parts: dict[str, Tensor] = {}
                for part in kind.layout(store.head_dim):
                    with self._reading():
                        parts[part] = self._file.read(_name(i, side, part))
                    checksum = _checksum(parts[part], checksum)
                store.take(KVStore.of(kind, store.head_dim, parts["codes"], parts.get("scale")), self.length)
        if f"{checksum:08x}" != self._file.metadata.get("crc32"):
            raise self._damaged("its contents are not those that were written")

    def _check_origin(self, about: Mapping[str, str], origin: Origin) -> None:
        if about.get("kind") != KIND:
            raise SnapshotError(f"{self.path} is no snapshot of a cache: give one that qrun wrote")
        if about.get("version") != VERSION:
            raise SnapshotError(
                f"{self.path} is a snapshot of version {_said(about, 'version')}, this qrun reads {VERSION}: {AGAIN}"
            )
        if about.get("model") != origin.model:
            raise SnapshotError(
                f"{self.path} belongs to another model ({_said(about, 'model')}, not {origin.model[:48]!r}): load that "
                f"one, or {AGAIN}"
            )
        if about.get("weights") != origin.weights:
            raise SnapshotError(
                f"{self.path} was made with weights in {_said(about, 'weights')}, these are in {origin.weights}: use "
                f"that --quant, or {AGAIN}"
            )

    def _format(self, about: Mapping[str, str], side: str) -> KVFormat:
        name = about.get(side)
        if name not in get_args(CacheType):
            raise SnapshotError(
                f"{self.path} has {side} in {_said(about, side)}, a format that this qrun does not know: {AGAIN}"
            )
        return kv_format(cast(CacheType, name))

    def _check_shapes(self, cache: KVCache) -> int:
        """The number of its positions, if they and nothing else are there in the shapes of the cache."""
        shape = self._file.entries["ids"].shape if "ids" in self._file.entries else ()
        length = shape[0] if shape else 0
        if length > cache.capacity:
            raise SnapshotError(
                f"{self.path} holds {length} tokens and the context {cache.capacity}: give a larger one with -c"
            )
        wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"ids": ((length,), torch.long)}
        for i, layer in enumerate(cache.layers):
            for side, kind, store in zip("kv", self._formats, (layer.k, layer.v), strict=True):
                for part, (size, dtype) in kind.layout(store.head_dim).items():
                    wanted[_name(i, side, part)] = ((store.codes.shape[0], length, *size), dtype)
        found = {name: (entry.shape, entry.dtype) for name, entry in self._file.entries.items()}
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise self._damaged(f"{name} is not what this model's cache has there")
        return length

    @contextlib.contextmanager
    def _reading(self) -> Generator[None]:
        try:
            yield
        except CheckpointError as error:
            cause = error.__cause__
            if isinstance(cause, OSError):
                raise SnapshotError(f"cannot read {self.path}: {cause.strerror or cause}") from error
            raise self._damaged("no safetensors file, or cut short") from error

    def _damaged(self, why: str) -> SnapshotError:
        return SnapshotError(f"{self.path} is damaged ({why}): delete it; {AGAIN}")


def _contents(cache: KVCache, ids: list[int]) -> Iterator[tuple[str, Tensor]]:
    """What is written, in this order: CPU tensors, contiguous."""
    yield "ids", torch.tensor(ids, dtype=torch.long)
    for i, layer in enumerate(cache.layers):
        for side, store in (("k", layer.k), ("v", layer.v)):
            for part, tensor in store.parts().items():
                yield _name(i, side, part), tensor[:, : len(ids)].contiguous().cpu()


def _said(about: Mapping[str, str], key: str) -> str:
    """What a file says of itself, fit to be shown: it may be anything, of any length."""
    return repr(about.get(key, "")[:48])


def _name(layer: int, side: str, part: str) -> str:
    return f"layers.{layer}.{side}.{part}"


def _room(cache: KVCache) -> int:
    """Bytes for the header: four tensors a layer, and the metadata."""
    return (1 << 16) + (len(cache.layers) << 10)


def _checksum(tensor: Tensor, before: int) -> int:
    return zlib.crc32(cast(Any, tensor.view(-1).view(torch.uint8).numpy()), before) if tensor.numel() else before


@contextlib.contextmanager
def _beside(path: Path) -> Generator[Path]:
    """A file beside path, readable by its owner alone, that takes path's place if all goes well, else is removed."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    place = Path(name)
    try:
        yield place
        place.replace(path)
    except BaseException:
        place.unlink(missing_ok=True)
        raise
