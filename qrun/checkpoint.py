"""A checkpoint directory: its configs, and its tensors one at a time, each checked before it is believed.

Everything in it is untrusted. Opening reads JSON and safetensors headers only; `Checkpoint.read` copies one tensor
out and keeps nothing, so resident memory grows by what the caller holds. Knows no architecture and no hub; how other
tools store quantized weights, its readers know.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Self, cast

import torch
from torch import Tensor

from qrun.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from qrun.formats import Format, QTensor
from qrun.readers import Reader, open_reader, quantization
from qrun.tensorfile import Entry, TensorFile, load_json

CONFIG_LIMIT: Final = 8 << 20
INDEX_LIMIT: Final = 100 << 20
MODELOPT: Final = "hf_quant_config.json"
INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
WEIGHT_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
WEIGHT: Final = ".weight"
_SNAPSHOT: Final = re.compile(r"models--(?P<org>.+?)--(?P<name>.+)/snapshots/(?P<sha>[0-9a-f]{40})$")


@dataclass(frozen=True)
class Checkpoint:
    """A model directory whose headers have been read and found consistent. Make one with `open`."""

    path: Path
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    files: Mapping[str, TensorFile]
    """Which file holds each tensor."""

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read the configs and every safetensors header of a directory.

        Raises `ModelNotFoundError` if there is no such directory, `CheckpointError` if a file is missing, damaged or
        lies, and `UnsupportedModelError` for one that is quantized in a way that is not read.
        """
        _require_directory(path)
        config = read_config(path)
        generation = path / "generation_config.json"
        return cls(path, config, _read_json(generation) if generation.exists() else {}, _open_shards(path))

    def names(self) -> Sequence[str]:
        """Every tensor's name, sorted."""
        return sorted(self.files)

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def has(self, name: str) -> bool:
        """Whether there is a weight of this name, as a tensor or quantized in others."""
        return len(self.sources(name)) > 1 or name in self

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).dtype

    def nbytes(self, name: str) -> int:
        """Bytes of the tensor as it is stored, from the header."""
        return self._entry(name).nbytes

    def read(self, name: str) -> Tensor:
        """The tensor as stored: a private CPU copy. Raises `CheckpointError` if there is none or the file is short."""
        self._entry(name)
        return self.files[name].read(name)

    def metadata(self, name: str) -> Mapping[str, str]:
        """The notes in the file that holds a tensor."""
        self._entry(name)
        return self.files[name].metadata

    @cached_property
    def _formats(self) -> dict[tuple[str, tuple[int, ...]], Format]:
        return {}

    @cached_property
    def reader(self) -> Reader | None:
        """What reads the weights that are quantized already; none where the config knows of none."""
        return open_reader(self, self.config)

    def format(self, name: str, shape: Sequence[int]) -> Format | None:
        """The format in which a weight is quantized here; none for one of plain numbers."""
        module = name.removesuffix(WEIGHT)
        if self.reader is None or not name.endswith(WEIGHT) or not self.reader.holds(module):
            return None
        # Asked for by the check, the forecast and the loader, and some readers look into tensors for it.
        key = name, tuple(shape)
        if key not in self._formats:
            self._formats[key] = self.reader.format(module, key[1])
        return self._formats[key]

    def packed(self, name: str, shape: Sequence[int]) -> QTensor:
        """A weight that has a `format`, as it is stored. Raises `CheckpointError` if its tensors are not what that
        needs, or hold what is no number."""
        assert self.reader is not None, "asked for after `format`"
        held = self.reader.read(name.removesuffix(WEIGHT), tuple(shape))
        for part, tensor in held.tensors().items():
            if tensor.dtype.is_floating_point and part != "codes" and not bool(torch.isfinite(tensor.float()).all()):
                raise CheckpointError(f"{name} has a {part} that is NaN or infinite: the checkpoint is damaged")
        return held

    def shared(self, name: str) -> object:
        """What the rows of a quantized weight share, to be compared with another's."""
        return self.reader.shared(name.removesuffix(WEIGHT)) if self.reader is not None else None

    def sources(self, name: str) -> Sequence[str]:
        """The tensors on disk that a weight is made of."""
        module = name.removesuffix(WEIGHT)
        if self.reader is not None and name.endswith(WEIGHT) and self.reader.holds(module):
            return self.reader.parts(module)
        return (name,)

    @property
    def itemsize(self) -> int:
        """Bytes of the widest number that reading a weight gives."""
        if self.reader is not None:
            return 4
        return max(self.dtype(name).itemsize for name in self.names())

    def require(self, name: str, shape: Sequence[int]) -> None:
        """Raise `CheckpointError` unless there is a weight of exactly the shape its config promises, in floating point
        or quantized."""
        if self.format(name, shape) is not None:
            return
        entry = self._entry(name)
        if entry.shape != tuple(shape):
            raise CheckpointError(
                f"{name} in {self.files[name].path} has shape {list(entry.shape)}, its config.json says {list(shape)}: "
                "the files belong to different models; fetch them again"
            )
        if entry.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{name} in {self.files[name].path} is {_short(entry.dtype)}, not "
                f"{', '.join(map(_short, WEIGHT_DTYPES[:-1]))}: fetch the model's unquantized checkpoint"
            )

    def weight(self, name: str, shape: Sequence[int]) -> Tensor:
        """`read`, of a tensor that is what `require` asks for; float32 where it is quantized."""
        if self.format(name, shape) is not None:
            return self.packed(name, shape).dequantize()
        self.require(name, shape)
        return self.read(name)

    @cached_property
    def identity(self) -> str:
        """What this checkpoint is, for a cache's key: the hub revision and file sizes, or file names, sizes, times."""
        hub = _SNAPSHOT.search(self.path.absolute().as_posix())
        digest = hashlib.sha256()
        for file in sorted({self.path / "config.json", *(f.path for f in self.files.values())}):
            status = file.stat()
            digest.update(f"{file.name}\0{status.st_size}\0{0 if hub else status.st_mtime_ns}\0".encode())
        if hub:
            return f"{hub['org']}/{hub['name']}@{hub['sha']}:{digest.hexdigest()[:16]}"
        return f"sha256:{digest.hexdigest()}"

    def _entry(self, name: str) -> Entry:
        try:
            return self.files[name].entries[name]
        except KeyError:
            raise CheckpointError(
                f"{self.path} has no tensor {name}: the checkpoint is incomplete, or its config.json is another model's"
            ) from None


def read_config(path: Path) -> dict[str, Any]:
    """``config.json`` of a directory, with Model Optimizer's own file where that says how weights are quantized.

    Raises `CheckpointError` if unusable, `UnsupportedModelError` if weights are quantized in a way that is not read.
    """
    config = _read_json(path / "config.json")
    if not config.get("quantization_config") and (path / MODELOPT).exists():
        config["quantization_config"] = _read_json(path / MODELOPT) | {"quant_method": "modelopt"}
    try:
        quantization(config)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{path.name or path}: {error}") from None
    return config


def has_all_weights(path: Path) -> bool:
    """Whether a directory has every weight file that it should; false while a download is partial. Opens none."""
    if (path / SINGLE).exists() or not (path / INDEX).exists():
        return (path / SINGLE).exists()
    return all((path / shard).exists() for shard in _read_index(path / INDEX).values())


def _require_directory(path: Path) -> None:
    if path.suffix.lower() == ".gguf":
        raise UnsupportedModelError(f"{path} is a GGUF file, which cannot be used here: give a safetensors directory")
    if path.is_file():
        raise CheckpointError(f"{path} is a file: give the directory that holds it with its config.json")
    if not path.is_dir():
        raise ModelNotFoundError(
            f"there is no directory {path}: check the path, or talk to the embedded model: qrun chat spark"
        )


def _read_json(path: Path, limit: int = CONFIG_LIMIT) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(limit + 1)
    except FileNotFoundError:
        hint = _other_kind(path.parent)
        raise CheckpointError(f"{path.parent} has no {path.name}{hint or ': it is not a model directory'}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if len(text) > limit:
        raise CheckpointError(f"{path} is larger than {limit >> 20} MiB: not a plausible {path.name}; fetch it again")
    return load_json(text, path)


def _other_kind(path: Path) -> str:
    """What a directory without safetensors holds instead, as the end of a sentence; empty if nothing known."""
    if any(path.glob("*.gguf")):
        return ", but GGUF files: give one of them by its name"
    pickles = [file.name for pattern in PICKLES for file in path.glob(pattern)]
    if pickles:
        return (
            f": only {min(pickles)}, refused because a pickle can run code; convert it to safetensors "
            "with transformers' save_pretrained on a machine that may run it"
        )
    return ""


def _open_shards(path: Path) -> dict[str, TensorFile]:
    """Which file holds each tensor. Every file is checked against its header, and the index against the files."""
    index: dict[str, str] = {}
    if (path / SINGLE).exists():
        shards = [SINGLE]
    elif (path / INDEX).exists():
        index = _read_index(path / INDEX)
        shards = sorted(set(index.values()))
    else:
        shards = sorted(file.name for file in path.glob("*.safetensors") if not file.name.startswith("consolidated"))
    if not shards:
        raise CheckpointError(f"{path} has no safetensors{_other_kind(path) or ': fetch the weights too'}")
    found: dict[str, TensorFile] = {}
    for shard in shards:
        if not (path / shard).exists():
            raise CheckpointError(f"{path} has no {shard}, which its index names: fetch the missing shard")
        file = TensorFile(path / shard)
        for name in file.entries:
            if name in found:
                raise CheckpointError(
                    f"{path}: {name} is both in {found[name].path.name} and in {shard}: fetch it again"
                )
            found[name] = file
    for name, shard in index.items():
        if name not in found or found[name].path.name != shard:
            raise CheckpointError(f"{path}: the index puts {name} in {shard}, which does not hold it: fetch it again")
    return found


def _read_index(path: Path) -> dict[str, str]:
    weight_map = _read_json(path, INDEX_LIMIT).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map: fetch it again")
    for name, shard in cast(dict[str, object], weight_map).items():
        plain = isinstance(shard, str) and Path(shard).name == shard and "\\" not in shard
        if not plain or not str(shard).endswith(".safetensors"):
            raise CheckpointError(
                f"{path} puts {name} in {shard!r}, which is not a safetensors file beside it: refused"
            )
    return cast(dict[str, str], weight_map)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
