"""Where a quantization stands, on disk: what it was asked, which layers are finished, and the activations behind them.

Every file is written beside and renamed, and the journal says last what holds, so that whatever is interrupted can go
on. Knows no models and no formats.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from qrun.errors import UsageError
from qrun.tensorfile import TensorFile, TensorWriter, load_json

_JOURNAL: Final = "journal.json"
_LOCK: Final = "lock"
_STATE: Final = "activations-{}.safetensors"


def partial(out: Path) -> Path:
    """The directory in which ``out`` is made."""
    return out.with_name(out.name + ".partial")


class Journal:
    """The unfinished directory of one quantization. Make it with `open`."""

    def __init__(self, place: Path, settings: str, layers: list[dict[str, Any]]) -> None:
        self.place = place
        self.layers = layers
        """A report of each finished layer."""
        self._settings = settings

    @classmethod
    @contextmanager
    def open(cls, out: Path, settings: Mapping[str, Any]) -> Generator["Journal"]:
        """The journal of ``out``: a new one, or that of an interrupted run with the same settings.

        Raises UsageError if ``out`` exists, another process is at it, or other settings began it.
        """
        if out.exists():
            raise UsageError(f"{out} exists already: name another directory, or delete it")
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        place = partial(out)
        place.mkdir(parents=True, exist_ok=True)
        with (place / _LOCK).open("w") as lock:
            try:
                _hold(lock.fileno())
            except OSError:
                raise UsageError(f"another qrun is writing {out}: wait for it, or name another directory") from None
            layers: list[dict[str, Any]] = []
            path = place / _JOURNAL
            if path.exists():
                found = load_json(path.read_bytes(), path)
                if found.get("settings") != digest:
                    raise UsageError(
                        f"{place} was begun with other settings: repeat those to go on, or delete it to begin anew"
                    )
                layers = found["layers"]
            yield cls(place, digest, layers)

    def begin(self, state: Mapping[str, Tensor]) -> None:
        """Keep the inputs of the first layer."""
        self._keep(0, state)
        self._write()

    def finish(self, report: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
        """The next layer is finished, its shard in place; ``state`` are the inputs of the one after it."""
        done = len(self.layers)
        self._keep(done + 1, state)
        self.layers.append(dict(report))
        self._write()
        (self.place / _STATE.format(done)).unlink(missing_ok=True)

    def state(self) -> dict[str, Tensor] | None:
        """The inputs of the next layer; none if not even those of the first were kept."""
        path = self.place / _STATE.format(len(self.layers))
        if not (self.place / _JOURNAL).exists() or not path.exists():
            return None
        file = TensorFile(path)
        return {name: file.read(name) for name in file.entries}

    @contextmanager
    def shard(self, name: str, tensors: int) -> Generator[TensorWriter]:
        """A file for so many tensors, which appears when all of them are written."""
        beside = self.place / f".{name}.part"
        try:
            with TensorWriter(beside, room=8192 + 400 * tensors) as writer:
                writer.metadata["format"] = "pt"
                yield writer
            beside.replace(self.place / name)
        finally:
            beside.unlink(missing_ok=True)

    def text(self, name: str, content: str) -> None:
        """Write a small file."""
        beside = self.place / f".{name}.part"
        try:
            with beside.open("w", encoding="utf-8") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self.place / name)
        finally:
            beside.unlink(missing_ok=True)

    def complete(self, out: Path) -> None:
        """Everything is written: take away the journal and give the directory its name."""
        # A process that was killed may have left more than the last activations, and files that were not yet renamed.
        for name in (_STATE.format("*"), ".*.part", _JOURNAL, _LOCK):
            for path in self.place.glob(name):
                path.unlink(missing_ok=True)
        _sync(self.place)
        self.place.rename(out)
        _sync(out.parent)

    def copy(self, file: Path) -> None:
        """Copy a small file of the model."""
        beside = self.place / f".{file.name}.part"
        try:
            shutil.copyfile(file, beside)
            beside.replace(self.place / file.name)
        finally:
            beside.unlink(missing_ok=True)

    def _keep(self, layer: int, state: Mapping[str, Tensor]) -> None:
        if state:
            with self.shard(_STATE.format(layer), len(state)) as writer:
                for name, tensor in state.items():
                    writer.add(name, tensor)

    def _write(self) -> None:
        self.text(_JOURNAL, json.dumps({"settings": self._settings, "layers": self.layers}))


def _hold(handle: int) -> None:
    import fcntl  # which Windows has not, where the command says so before it comes here

    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _sync(directory: Path) -> None:
    with suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
