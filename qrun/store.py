"""Quantized weights kept on disk, so that the same checkpoint at the same recipe is quantized only once.

One directory per entry, made beside its place and renamed when complete, so a reader sees a whole entry or none. The
store never stops a load: what goes wrong with the disk becomes a note, and the load goes on without it. It trusts
nothing that it reads back, and knows no models.
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import psutil

from qrun.checkpoint import Checkpoint
from qrun.errors import CheckpointError
from qrun.formats import Format, PlainFormat, QTensor, from_tensors
from qrun.paths import cache_dir
from qrun.recipe import Recipe
from qrun.tensorfile import TensorFile, TensorWriter, load_json

WEIGHTS_VERSION: Final = 1
"""Raise when the bytes of a format, or a family's canonical weights, change; older entries are then never opened."""
SHARD_BYTES: Final = 256 << 20
RESERVE_BYTES: Final = 1 << 30
"""Disk space that stays free."""
STALE_SECONDS: Final = 24 * 3600
_TEMP: Final = ".tmp-"


@dataclass(frozen=True)
class StoredEntry:
    """One cached model as ``qrun cache ls`` shows it; times in seconds since the epoch."""

    key: str
    model: str
    recipe: str
    bytes: int
    created: float
    used: float


def store_key(identity: str, recipe: Recipe) -> str:
    """The name of an entry: 64 hexadecimal digits over all that decides the bytes in it.

    The cache and activation parts of a recipe leave no trace in the weights, so they are left out.
    """
    schemes = {role: repr(scheme) for role, scheme in recipe.schemes().items()}
    return hashlib.sha256(json.dumps([WEIGHTS_VERSION, identity, schemes], sort_keys=True).encode()).hexdigest()


class WeightStore:
    """The cache of quantized weights under one directory. ``notes`` collects what did not work, a line each."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.notes: list[str] = []

    @classmethod
    def default(cls) -> Self:
        """The store in the user's cache directory."""
        return cls(cache_dir() / "weights")

    def open(self, checkpoint: Checkpoint, recipe: Recipe) -> "StoredWeights | None":
        """The entry of a checkpoint at a recipe, if there is one; a damaged one is removed and noted."""
        place = self.root / store_key(checkpoint.identity, recipe)
        _remove_stale(self.root)
        if not place.is_dir():
            return None
        try:
            files = _open_files(place)
        except CheckpointError as error:
            self.notes.append(_damaged(place, error))
            return None
        with contextlib.suppress(OSError):  # a cache that cannot be written still reads
            os.utime(place / "meta.json")
        return StoredWeights(place, files, self.notes)

    def writer(self, checkpoint: Checkpoint, recipe: Recipe, *, label: str) -> "WeightWriter":
        """A writer for the entry, as a context manager around the load. ``label`` is what `ls` calls the model."""
        return WeightWriter(self.root, store_key(checkpoint.identity, recipe), label, recipe.label, self.notes)

    def ls(self) -> list[StoredEntry]:
        """Every entry, last used first. Directories that are no entries are left out."""
        found: list[StoredEntry] = []
        for place in _places(self.root):
            with contextlib.suppress(CheckpointError, OSError):
                meta = _read_meta(place)
                used = (place / "meta.json").stat().st_mtime
                found.append(
                    StoredEntry(place.name, meta["model"], meta["recipe"], meta["bytes"], meta["created"], used)
                )
        return sorted(found, key=lambda entry: (-entry.used, entry.key))

    def prune(
        self, keys: Iterable[str] | None = None, *, older_than: float | None = None, everything: bool = False
    ) -> tuple[int, int]:
        """Remove entries by key (its first digits suffice), by seconds since the last use, or all of them.

        Damaged entries and what dead processes left go in any case. Returns how many entries and bytes were freed.
        """
        _remove_stale(self.root)
        listed = {entry.key: entry for entry in self.ls()}
        prefixes = tuple(key for key in keys or () if key)
        count = freed = 0
        for place in _places(self.root):
            entry = listed.get(place.name)
            old = entry is not None and older_than is not None and time.time() - entry.used > older_than
            if entry is None or everything or old or place.name.startswith(prefixes):
                size = sum(file.stat().st_size for file in place.iterdir() if file.is_file())
                shutil.rmtree(place, ignore_errors=True)
                if not place.exists():
                    count, freed = count + 1, freed + size
        return count, freed


class StoredWeights:
    """An entry opened for reading."""

    def __init__(self, place: Path, files: Mapping[str, TensorFile], notes: list[str]) -> None:
        self._place = place
        self._files = files
        self._notes = notes
        self._sound = True

    def get(self, name: str, fmt: Format, shape: tuple[int, ...]) -> QTensor | None:
        """One weight [..., N, K], copied into CPU memory; None if it is not kept, as plain formats are not.

        Where it should be and is not, or is not what ``fmt`` lays out, the entry is damaged: it is removed and noted,
        and this and all later weights are None.
        """
        if not self._sound or isinstance(fmt, PlainFormat):
            return None
        try:
            tensors: dict[str, Any] = {}
            for part, (size, dtype) in fmt.layout(shape).items():
                file = self._files.get(f"{name}.{part}")
                if file is None or (entry := file.entries[f"{name}.{part}"]).shape != size or entry.dtype != dtype:
                    raise CheckpointError(f"{name}.{part} is missing or not of its format's shape")
                tensors[part] = file.read(f"{name}.{part}")
            return from_tensors(fmt, shape, tensors)
        except CheckpointError as error:
            self._sound = False
            self._notes.append(_damaged(self._place, error))
            return None


class WeightWriter(contextlib.AbstractContextManager["WeightWriter"]):
    """Writes one entry, weight by weight, holding none. Only `commit` keeps it; leaving the block before discards it.

    When the disk is full or cannot be written, the entry is discarded, a note says so, and further calls do nothing.
    """

    def __init__(self, root: Path, key: str, model: str, recipe: str, notes: list[str]) -> None:
        self.notes = notes
        self._place = root / key
        self._temp = root / f"{_TEMP}{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._meta: dict[str, Any] = {"version": WEIGHTS_VERSION, "model": model, "recipe": recipe}
        self._shards: list[TensorWriter] = []
        self._active = False

    def __enter__(self) -> Self:
        with self._giving_up():
            self._temp.mkdir(parents=True)
            self._active = True
        return self

    def add(self, name: str, weight: QTensor) -> None:
        """Append one weight, each name once, in any order. Plain formats are passed over: the checkpoint has them."""
        if not self._active or isinstance(weight.format, PlainFormat):
            return
        with self._giving_up():
            parts = weight.tensors()
            if not self._shards or self._shards[-1].nbytes >= SHARD_BYTES or not self._shards[-1].fits(len(parts)):
                self._next_shard(weight.nbytes)
            for part, tensor in parts.items():
                self._shards[-1].add(f"{name}.{part}", tensor.cpu())

    def commit(self) -> None:
        """Make the entry durable and visible, all at once. If another process was first, its entry stays."""
        if not self._active:
            return
        with self._giving_up():
            if self._shards:
                self._shards[-1].close()
            sizes = {shard.path.name: shard.path.stat().st_size for shard in self._shards}
            meta = self._meta | {"bytes": sum(sizes.values()), "created": time.time(), "shards": sizes}
            with (self._temp / "meta.json").open("w", encoding="utf-8") as file:
                json.dump(meta, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            _sync_directory(self._temp)
            try:
                self._temp.rename(self._place)
            except OSError:
                if not (self._place / "meta.json").exists():
                    raise
            _sync_directory(self._place.parent)
        self._discard()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()

    def _next_shard(self, least: int) -> None:
        if self._shards:
            self._shards[-1].close()
        free = shutil.disk_usage(self._temp).free
        if free < least + SHARD_BYTES + RESERVE_BYTES:
            raise OSError(f"only {free / 1e9:.1f} GB are free")
        self._shards.append(TensorWriter(self._temp / f"{len(self._shards):05d}.safetensors"))

    @contextlib.contextmanager
    def _giving_up(self) -> Generator[None]:
        """Turn a failing disk into a note and an inactive writer."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            self.notes.append(f"the quantized weights are not kept for the next start ({self._place.parent}: {reason})")
            self._discard()

    def _discard(self) -> None:
        self._active = False
        if self._shards:
            self._shards[-1].abandon()
        shutil.rmtree(self._temp, ignore_errors=True)


def _open_files(place: Path) -> dict[str, TensorFile]:
    """Tensor key -> the shard that holds it. Raises `CheckpointError` unless all shards are there as written."""
    found: dict[str, TensorFile] = {}
    for name, size in _read_meta(place)["shards"].items():
        file = TensorFile(place / Path(name).name)
        if file.path.stat().st_size != size:
            raise CheckpointError(f"{file.path} has another size than when it was written")
        found.update(dict.fromkeys(file.entries, file))
    return found


def _read_meta(place: Path) -> dict[str, Any]:
    """``meta.json``, with every value of the right type. Raises `CheckpointError`."""
    path = place / "meta.json"
    try:
        meta = load_json(path.read_bytes(), path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    kinds = {"version": int, "model": str, "recipe": str, "bytes": int, "created": float, "shards": dict}
    if any(not isinstance(meta.get(key), kind) for key, kind in kinds.items()) or meta["version"] != WEIGHTS_VERSION:
        raise CheckpointError(f"{path} is not one of this version's")
    return meta


def _damaged(place: Path, error: CheckpointError) -> str:
    """Remove a damaged entry; the note that says so."""
    shutil.rmtree(place, ignore_errors=True)
    return f"cached weights were damaged and removed ({error}); this start quantizes again"


def _places(root: Path) -> list[Path]:
    try:
        return sorted(place for place in root.iterdir() if place.is_dir() and len(place.name) == 64)
    except OSError:
        return []


def _remove_stale(root: Path) -> None:
    """Remove what a process that is gone left unfinished."""
    for place in root.glob(f"{_TEMP}*"):
        with contextlib.suppress(OSError, ValueError):
            host, pid, _ = place.name.removeprefix(_TEMP).rsplit("-", 2)
            dead = host == _host() and not psutil.pid_exists(int(pid))
            if dead or time.time() - place.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(place, ignore_errors=True)


def _host() -> str:
    return "".join(c for c in socket.gethostname() if c.isalnum()) or "host"


def _sync_directory(path: Path) -> None:
    """Make a rename durable, where the system lets a directory be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
