"""One safetensors file: its header checked against the file, its tensors read by copy, and a writer that streams.

Tensors are read with plain file reads into private memory, never mapped: a mapped page counts as resident memory until
it is unmapped, and a mapped file that is cut short while it is read ends the process with SIGBUS. So reading a tensor
costs its own bytes and nothing else, and a damaged file is always an error with a message. Knows nothing of
checkpoints, models or formats.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, cast

import torch
from torch import Tensor

from qrun.errors import CheckpointError

HEADER_LIMIT: Final = 100_000_000
"""Bytes; the limit of the safetensors library itself."""

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES: Final[Mapping[torch.dtype, str]] = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: dtype, shape, and its first byte and size in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


class TensorFile:
    """A safetensors file opened for reading: ``entries`` by name and ``metadata``, known from the header alone.

    Raises `CheckpointError` when the file is missing or cut short, or its header does not describe exactly its bytes
    or is larger than ``limit``.
    """

    def __init__(self, path: Path, limit: int = HEADER_LIMIT) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > min(size - 8, limit):
                    raise CheckpointError(f"{path} is cut short or not a safetensors file: fetch it again")
                text = file.read(length)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
        header = load_json(text, f"the header of {path}")
        notes: object = header.pop("__metadata__", None)
        pairs = cast(dict[str, object], notes).items() if isinstance(notes, dict) else ()
        self.metadata = {key: value for key, value in pairs if isinstance(value, str)}
        self.entries = _parse(path, header, data_start=8 + length, size=size)

    def read(self, name: str) -> Tensor:
        """The tensor, a private CPU copy in the dtype of the file. Raises `CheckpointError` on a short read."""
        entry = self.entries[name]
        return read_bytes(self.path, entry.start, entry.nbytes, name).view(entry.dtype).view(entry.shape)


def read_bytes(path: Path, start: int, nbytes: int, name: str) -> Tensor:
    """Bytes of a file as a private CPU tensor, u8 [nbytes]. Raises `CheckpointError`, naming the tensor, if they are
    not there."""
    buffer = torch.empty(nbytes, dtype=torch.uint8)
    view = memoryview(cast(Any, buffer.numpy()))
    done = 0
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            while done < nbytes:
                count = file.readinto(view[done:])
                if not count:
                    raise CheckpointError(f"{path} ended inside {name}: the file changed; fetch it again")
                done += count
    except OSError as error:
        raise CheckpointError(f"cannot read {name} from {path}: {error.strerror or error}") from error
    return buffer


def load_json(text: bytes, where: object) -> dict[str, Any]:
    """An untrusted JSON object. Raises `CheckpointError` if it is not one, or if a key appears twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise CheckpointError(f"{where} names {twice!r} twice: the file is damaged; fetch it again")
        return found

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON ({_first_line(error)}): fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} holds a JSON {type(value).__name__}, not an object: fetch it again")
    return cast(dict[str, Any], value)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def _parse(path: Path, header: Mapping[str, object], *, data_start: int, size: int) -> dict[str, Entry]:
    """Entries of a header, each inside the file, together covering its data without a gap or an overlap."""
    entries: dict[str, Entry] = {}
    for name, raw in header.items():
        dtype, shape, begin, end = _fields(path, name, raw)
        nbytes = math.prod(shape) * dtype.itemsize
        if end - begin != nbytes:
            raise CheckpointError(
                f"{path}: {name} {list(shape)} takes {nbytes} bytes, its header says {end - begin}: fetch it again"
            )
        entries[name] = Entry(dtype, shape, data_start + begin, nbytes)
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != position:
            raise CheckpointError(f"{path}: {name} overlaps another tensor or leaves a gap: fetch it again")
        position += entry.nbytes
    if position != size:
        state = "is cut short" if position > size else "is longer than its header says"
        raise CheckpointError(f"{path} {state} ({size} bytes, not {position}): fetch it again")
    return entries


def _fields(path: Path, name: str, raw: object) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    fields = cast(dict[str, Any], raw) if isinstance(raw, dict) else {}
    code, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not _naturals(shape) or not _naturals(offsets) or len(cast(list[int], offsets)) != 2:
        raise CheckpointError(f"{path}: the header entry of {name} is malformed: fetch it again")
    if not isinstance(code, str) or code not in DTYPES:
        raise CheckpointError(f"{path}: {name} has dtype {code!r}, not one of {', '.join(DTYPES)}")
    begin, end = cast(list[int], offsets)
    return DTYPES[code], tuple(cast(list[int], shape)), begin, end


def _naturals(value: object) -> bool:
    """A list of integers >= 0 (and no booleans, which Python counts as integers)."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in cast(list[object], value))


class TensorWriter:
    """Writes one safetensors file tensor by tensor, holding no tensor longer than its own `add`.

    Room for the header is left at the front and filled in at the end (the format allows trailing blanks there);
    ``metadata`` may be added to until then. As a context manager it finishes and syncs the file on success and leaves
    it unfinished on an error. Raises OSError.
    """

    ROOM: Final = 1 << 16

    def __init__(self, path: Path, room: int = ROOM) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        self._room = room
        self._file = path.open("wb")
        self._header: dict[str, Any] = {}
        self._header_bytes = 2
        self._offset = 0
        self._file.seek(8 + room)

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data so far."""
        return self._offset

    def fits(self, names: int) -> bool:
        """Whether the header has room for ``names`` more tensors of ordinary names (up to 150 characters)."""
        return self._header_bytes + 300 * names < self._room

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a CPU tensor. Its bytes are written as they lie if it is contiguous, else from a temporary copy."""
        nbytes = tensor.numel() * tensor.element_size()
        entry = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._offset, self._offset + nbytes],
        }
        self._header_bytes += len(json.dumps({name: entry}))
        if self._header_bytes > self._room:
            raise ValueError(f"no room in the header for {name}")
        if nbytes:
            flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
            self._file.write(memoryview(cast(Any, flat.numpy())))
        self._header[name] = entry
        self._offset += nbytes

    def close(self) -> None:
        """Write the header, sync to disk and close."""
        try:
            header = {"__metadata__": self.metadata} | self._header if self.metadata else self._header
            text = json.dumps(header).encode().ljust(self._room)
            if len(text) > self._room:
                raise ValueError(f"no room in the header for {len(self.metadata)} metadata")
            self._file.seek(0)
            self._file.write(len(text).to_bytes(8, "little") + text)
            self._file.truncate(8 + self._room + self._offset)
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def abandon(self) -> None:
        """Close without finishing; nothing is promised about what lies on disk."""
        try:
            self._file.close()
        except OSError:
            self._file.raw.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()
