"""One GGUF file: its header checked against the file, and the bytes of its tensors, some rows at a time.

Read with plain file reads, never mapped, as `qrun.tensorfile` does and for its reasons. It takes versions 2 and 3,
little-endian; knows no architecture and does not look inside the blocks of a quantized tensor.
"""

import array
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias

from torch import Tensor

from qrun.errors import CheckpointError, UnsupportedModelError
from qrun.tensorfile import read_bytes

Value: TypeAlias = "str | int | float | bool | list[str] | array.array[int] | array.array[float]"

SUFFIX: Final = ".gguf"
HEADER_LIMIT: Final = 100_000_000
"""Bytes before the tensors' data; the largest published vocabularies take about 20 MB."""
_KEY_LIMIT: Final = 1 << 16
_MOST: Final = 1 << 17  # keys, tensors
_STRING, _ARRAY, _BOOL = 8, 9, 7
# Type code -> struct's letter, which array has too. A bool is a byte.
_NUMBERS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "B", 10: "Q", 11: "q", 12: "d"}

# Type code -> name, and a block's weights and bytes.
_TYPES: Final[Mapping[int, tuple[str, int, int]]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
}
CODES: Final[Mapping[str, int]] = {name: code for code, (name, _, _) in _TYPES.items()}


@dataclass(frozen=True)
class GgufEntry:
    """Where one tensor lies: its type's name, its shape [..., K], its first byte, and the bytes of a row of K."""

    kind: str
    shape: tuple[int, ...]
    start: int
    row_bytes: int

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes

    @property
    def block_bytes(self) -> int:
        return _TYPES[CODES[self.kind]][2]


class GgufFile:
    """A GGUF file opened for reading: ``metadata`` by key and ``entries`` by tensor name, known from the header alone.

    Raises `CheckpointError` when the file is missing or cut short, or its header contradicts itself or the file, and
    `UnsupportedModelError` for a version, byte order or tensor type that is not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                header = _Header(path, file, path.stat().st_size)
                self.metadata, self.entries = _parse(header)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error

    def read(self, name: str, first: int = 0, rows: int | None = None) -> Tensor:
        """Rows first … first + rows of a tensor, as stored: u8 [rows, row_bytes], a private CPU copy.

        Leading dimensions count as rows, one matrix after another. Raises `CheckpointError` on a short read.
        """
        entry = self.entries[name]
        rows = entry.rows - first if rows is None else rows
        start = entry.start + first * entry.row_bytes
        return read_bytes(self.path, start, rows * entry.row_bytes, name).view(rows, entry.row_bytes)


def gguf_at(path: Path) -> Path | None:
    """The GGUF file that a path means: itself, or the one model in a directory without safetensors; none if neither.

    Raises `CheckpointError` for a directory of several.
    """
    if path.suffix.lower() == SUFFIX and not path.is_dir():
        return path
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return None
    models = sorted(file for file in path.glob(f"*{SUFFIX}") if _is_model(file.name))
    if len(models) > 1:
        raise CheckpointError(f"{path} has several models: give one of {', '.join(file.name for file in models)}")
    return models[0] if models else None


def _is_model(name: str) -> bool:
    """Whether a file is a language model, or the first shard of one."""
    later = re.search(r"-(\d{5})-of-\d{5}\.gguf$", name)
    return not name.startswith("mmproj") and (later is None or int(later[1]) == 1)


class _Header:
    """A cursor that never goes past the end of the file or the limit."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path = path
        self.size = size
        self.position = 0
        self._file = file

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}: the file is damaged; fetch it again")

    def take(self, count: int, what: str) -> bytes:
        if count > min(self.size, HEADER_LIMIT) - self.position:
            where = "the file" if self.size <= HEADER_LIMIT else f"the {HEADER_LIMIT >> 20} MiB a header may have"
            raise CheckpointError(f"{self.path}: {what} goes past the end of {where}: fetch it again")
        data = self._file.read(count)
        if len(data) != count:
            raise CheckpointError(f"{self.path} ended inside {what}: the file changed; fetch it again")
        self.position += count
        return data

    def number(self, code: int, what: str) -> Any:
        letter = _NUMBERS[code]
        (value,) = struct.unpack("<" + letter, self.take(struct.calcsize("<" + letter), what))
        if code != _BOOL:
            return value
        if value > 1:
            raise self.fail(f"{what} is a bool of {value}")
        return bool(value)

    def u32(self, what: str) -> int:
        return self.number(4, what)

    def u64(self, what: str) -> int:
        return self.number(10, what)

    def text(self, what: str, limit: int = HEADER_LIMIT) -> str:
        length = self.u64(what)
        if length > limit:
            raise self.fail(f"{what} has {length} bytes")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not UTF-8") from None

    def value(self, code: int, what: str) -> Value:
        if code == _STRING:
            return self.text(what)
        if code in _NUMBERS:
            return self.number(code, what)
        if code != _ARRAY:
            raise self.fail(f"{what} has the unknown type {code}")
        inner, count = self.u32(what), self.u64(what)
        if inner == _STRING:
            if 8 * count > self.size - self.position:  # before the list grows
                raise self.fail(f"{what} claims {count} strings")
            return [self.text(what) for _ in range(count)]
        if inner not in _NUMBERS:
            raise self.fail(f"{what} is an array of the type {inner}")
        letter = _NUMBERS[inner]
        numbers: array.array[Any] = array.array(letter)
        numbers.frombytes(self.take(count * numbers.itemsize, what))
        return numbers


def _parse(header: _Header) -> tuple[dict[str, Value], dict[str, GgufEntry]]:
    if header.size < 24 or header.take(4, "the header") != b"GGUF":
        raise CheckpointError(f"{header.path} is cut short or not a GGUF file: fetch it again")
    version = header.u32("the version")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
        kind = "a big-endian GGUF file" if swapped else f"GGUF version {version}"
        raise UnsupportedModelError(f"{header.path} is {kind}; qrun reads little-endian GGUF 2 and 3: convert it again")
    tensors, keys = header.u64("the number of tensors"), header.u64("the number of keys")
    for count, what in ((tensors, "tensors"), (keys, "keys")):
        if count > _MOST:
            raise header.fail(f"the header claims {count} {what}")
    metadata: dict[str, Value] = {}
    for _ in range(keys):
        key = header.text("a key", _KEY_LIMIT)
        if key in metadata:
            raise header.fail(f"{key} is there twice")
        metadata[key] = header.value(header.u32(key), key)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise header.fail(f"general.alignment is {alignment!r}")
    found = [_tensor(header) for _ in range(tensors)]
    return metadata, _placed(header, found, alignment)


def _tensor(header: _Header) -> tuple[str, GgufEntry]:
    """A tensor's name and entry, its ``start`` counted from the first tensor's."""
    name = header.text("a tensor's name", _KEY_LIMIT)
    dims = header.u32(name)
    if not 1 <= dims <= 4:
        raise header.fail(f"{name} has {dims} dimensions")
    shape = tuple(reversed([header.u64(name) for _ in range(dims)]))
    code, offset = header.u32(name), header.u64(name)
    if code not in _TYPES:
        raise UnsupportedModelError(
            f"{header.path}: {name} has the tensor type {code}, which qrun does not know: "
            f"quantize the model to one of {', '.join(CODES)}"
        )
    kind, block, size = _TYPES[code]
    if 0 in shape or math.prod(shape) >= 1 << 60 or shape[-1] % block:
        raise header.fail(f"{name} is {kind} of the shape {list(shape)}")
    return name, GgufEntry(kind, shape, offset, shape[-1] // block * size)


def _placed(header: _Header, found: list[tuple[str, GgufEntry]], alignment: int) -> dict[str, GgufEntry]:
    """Entries with their place in the file: aligned, one after another with nothing between but padding."""
    start = header.position + -header.position % alignment
    entries: dict[str, GgufEntry] = {}
    expected = 0
    for name, entry in sorted(found, key=lambda item: item[1].start):
        if name in entries:
            raise header.fail(f"the tensor {name} is there twice")
        if entry.start != expected:
            raise header.fail(f"{name} overlaps another tensor or leaves a gap")
        entries[name] = GgufEntry(entry.kind, entry.shape, start + entry.start, entry.row_bytes)
        end = entry.start + entry.nbytes
        if start + end > header.size:
            raise CheckpointError(
                f"{header.path} is cut short ({header.size} bytes, {name} ends at {start + end}): fetch it again"
            )
        expected = end + -end % alignment
    return entries
