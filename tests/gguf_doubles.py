"""Writes GGUF files for tests: those of the fixtures with something changed, or made up."""

import array
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qrun.gguf_file import CODES, GgufEntry, GgufFile

Tensors = Mapping[str, tuple[int, tuple[int, ...], bytes]]
"""Name -> type code, shape [..., K], data."""
_ARRAYS = {"B": 0, "b": 1, "H": 2, "h": 3, "I": 4, "i": 5, "f": 6, "Q": 10, "q": 11, "d": 12}


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def value(item: Any) -> bytes:
    """A value with its type before it."""
    if isinstance(item, bytes):
        return item
    if isinstance(item, str):
        return struct.pack("<I", 8) + text(item)
    if isinstance(item, bool):
        return struct.pack("<IB", 7, item)
    if isinstance(item, int):
        return struct.pack("<II", 4, item)
    if isinstance(item, float):
        return struct.pack("<If", 6, item)
    if isinstance(item, array.array):
        return struct.pack("<IIQ", 9, _ARRAYS[item.typecode], len(item)) + item.tobytes()
    return struct.pack("<IIQ", 9, 8, len(item)) + b"".join(map(text, item))


def encode(metadata: Mapping[str, Any], tensors: Tensors, *, version: int = 3) -> bytes:
    alignment = metadata.get("general.alignment", 32)
    alignment = alignment if type(alignment) is int else 32
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(text(key) + value(item) for key, item in metadata.items())
    body = b""
    for name, (code, shape, data) in tensors.items():
        head += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += struct.pack("<IQ", code, len(body))
        body += data + bytes(-len(data) % alignment)
    return head + bytes(-len(head) % alignment) + body


def tensors(file: GgufFile) -> dict[str, tuple[int, tuple[int, ...], bytes]]:
    return {name: (CODES[entry.kind], entry.shape, data(file, name, entry)) for name, entry in file.entries.items()}


def data(file: GgufFile, name: str, entry: GgufEntry) -> bytes:
    found = file.read(name).numpy().tobytes()
    assert len(found) == entry.nbytes
    return found


def changed(source: Path, to: Path, *, drop: tuple[str, ...] = (), **metadata: Any) -> Path:
    """A copy of a file: keys with ``__`` for their dots are set, or left out where they are none; tensors dropped."""
    file = GgufFile(source)
    named = {key.replace("__", "."): item for key, item in metadata.items()}
    merged = {key: item for key, item in {**file.metadata, **named}.items() if item is not None}
    to.write_bytes(encode(merged, {name: held for name, held in tensors(file).items() if name not in drop}))
    return to
