"""The GGUF parser: what gguf-py writes is read, and no damage gets past it or makes it allocate."""

import array
import random
import resource
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_doubles import Tensors, changed, encode, text, value

from qrun.errors import CheckpointError, QrunError, UnsupportedModelError
from qrun.gguf_checkpoint import GgufCheckpoint
from qrun.gguf_file import GgufFile
from qrun.gguf_tokenizer import read_tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
TENSORS: Tensors = {"a": (0, (2, 3), bytes(24)), "b": (8, (2, 1, 32), bytes(68)), "c": (0, (1,), bytes(4))}


def refused(path: Path, data: bytes, kind: type[Exception] = CheckpointError) -> str:
    path.write_bytes(data)
    with pytest.raises(kind) as caught:
        GgufFile(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_what_gguf_py_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    metadata: dict[str, Any] = {
        "text": "żółć", "yes": True, "small": -3, "large": 1 << 40, "float": 0.5, "texts": ["a", ""], "ints": [1, -2]
    }  # fmt: skip
    writer.add_string("text", "żółć")
    writer.add_bool("yes", True)
    writer.add_int16("small", -3)
    writer.add_uint64("large", 1 << 40)
    writer.add_float64("float", 0.5)
    writer.add_array("texts", ["a", ""])
    writer.add_array("ints", [1, -2])
    values = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    writer.add_tensor("one", values)
    writer.add_tensor("two", values[0].astype(np.float16))
    writer.add_custom_alignment(64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(path)
    for key, expected in metadata.items():
        found = file.metadata[key]
        assert (list(found) if isinstance(found, array.array) else found) == expected, key
    entry = file.entries["one"]
    assert (entry.kind, entry.shape, entry.rows, entry.row_bytes) == ("F32", (2, 2, 3), 4, 12)
    assert entry.start % 64 == 0
    assert file.read("one").numpy().tobytes() == values.tobytes()
    assert file.read("one", 1, 2).numpy().tobytes() == values.reshape(4, 3)[1:3].tobytes()
    assert file.read("two").numpy().tobytes() == values[0].astype(np.float16).tobytes()


def test_version_2_is_read_and_others_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(encode({"k": 1}, TENSORS, version=2))
    assert list(GgufFile(path).entries) == ["a", "b", "c"]
    assert "version 1;" in refused(path, encode({}, TENSORS, version=1), UnsupportedModelError)
    big = encode({}, TENSORS)
    assert "big-endian" in refused(path, big[:4] + big[4:8][::-1] + big[8:], UnsupportedModelError)


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    whole = encode({"k": "v", "list": ["a", "b"]}, TENSORS)
    end = len(whole) - 28  # the last tensor's padding may be missing
    for length in range(end):
        refused(tmp_path / "m.gguf", whole[:length])
    (tmp_path / "m.gguf").write_bytes(whole[:end])
    assert len(GgufFile(tmp_path / "m.gguf").entries) == 3


def header(keys: bytes = b"", count: int = 0, infos: bytes = b"", tensors: int = 0) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, tensors, count) + keys + infos
    return head + bytes(-len(head) % 32 + 64)


def info(name: str, shape: tuple[int, ...], code: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape)) + struct.pack("<IQ", code, offset)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", "not a GGUF"),
        (b"GGML" + bytes(60), "not a GGUF"),
        (header(count=1 << 62), "claims 4611686018427387904 keys"),
        (header(tensors=1 << 62), "claims 4611686018427387904 tensors"),
        (header(struct.pack("<Q", 1 << 60), 1), "a key has"),
        (header(text("k") + struct.pack("<IQ", 8, 1 << 60), 1), "k has 1152921504606846976 bytes"),
        (header(text("k") + struct.pack("<IIQ", 9, 8, 1 << 40), 1), "k claims 1099511627776 strings"),
        (header(text("k") + struct.pack("<IIQ", 9, 4, 1 << 61), 1), "past the end"),
        (header(text("k") + struct.pack("<IIQ", 9, 9, 1), 1), "array of the type 9"),
        (header(text("k") + struct.pack("<I", 13), 1), "unknown type 13"),
        (header(text("k") + struct.pack("<IB", 7, 2), 1), "bool of 2"),
        (header(struct.pack("<Q", 1) + b"\xff" + value(1), 1), "not UTF-8"),
        (header(2 * (text("k") + value(1)), 2), "k is there twice"),
        (header(text("general.alignment") + value(0), 1), "general.alignment is 0"),
        (header(text("general.alignment") + value(33), 1), "general.alignment is 33"),
        (header(text("general.alignment") + value("32"), 1), "general.alignment is '32'"),
        (header(infos=info("a", (4,)) + info("a", (4,), offset=32), tensors=2), "a is there twice"),
        (header(infos=info("a", (4,)) + info("b", (4,), offset=16), tensors=2), "b overlaps"),
        (header(infos=info("a", (4,), offset=32), tensors=1), "leaves a gap"),
        (header(infos=info("a", (4,)) + info("b", (4,)), tensors=2), "overlaps"),
        (header(infos=info("a", ()), tensors=1), "0 dimensions"),
        (header(infos=info("a", (1,) * 5), tensors=1), "5 dimensions"),
        (header(infos=info("a", (0, 4)), tensors=1), r"shape [0, 4]"),
        (header(infos=info("a", (1 << 40, 1 << 40)), tensors=1), "shape [1099511627776"),
        (header(infos=info("a", (1 << 40,)), tensors=1), "cut short"),
        (header(infos=info("a", (33,), 2), tensors=1), "Q4_0 of the shape [33]"),
    ],
)
def test_lies_are_refused_by_name(data: bytes, named: str, tmp_path: Path) -> None:
    assert named in refused(tmp_path / "m.gguf", data)


def test_an_unknown_tensor_type_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    for code in (4, 36, 24, 1 << 31):
        message = refused(tmp_path / "m.gguf", header(infos=info("a", (32,), code), tensors=1), UnsupportedModelError)
        assert f"type {code}" in message
        assert "Q4_K" in message


def test_a_file_that_shrinks_after_it_was_opened_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(encode({}, TENSORS))
    file = GgufFile(path)
    path.write_bytes(path.read_bytes()[:-80])
    with pytest.raises(CheckpointError, match="ended inside b"):
        file.read("b")
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot read b"):
        file.read("b")
    with pytest.raises(CheckpointError, match="cannot read"):
        GgufFile(path)


@pytest.mark.parametrize("name", ["llama", "ernie_moe"])
def test_a_mutated_file_is_an_error_of_ours_or_reads_fine(name: str, tmp_path: Path) -> None:
    """Bytes of the header changed at random: nothing but a QrunError, and no memory for what is not there."""
    small = changed(
        FIXTURES / f"gguf_{name}" / "model.gguf", tmp_path / "small.gguf", tokenizer__ggml__tokens=["a", "b", "ab"],
        tokenizer__ggml__merges=["a b"], tokenizer__ggml__scores=array.array("f", [0, 0, 1]),
        tokenizer__ggml__token_type=array.array("i", [1, 1, 1]), tokenizer__chat_template="x",
    )  # fmt: skip
    whole = small.read_bytes()
    head = min(entry.start for entry in GgufFile(small).entries.values())
    path = tmp_path / "m.gguf"
    chance = random.Random(5)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = {"read": 0, "refused": 0}
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 1, 2, 5))):
            at = chance.randrange(head)
            width = chance.choice((1, 1, 4, 8))
            special = (0, 1, 0x7F, 0xFF, chance.randrange(256))
            data[at : at + width] = bytes(chance.choice(special) for _ in range(width))
        if chance.random() < 0.1:
            del data[chance.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            checkpoint = GgufCheckpoint.open(path)
            for tensor in checkpoint.names():
                checkpoint.read(tensor)
            read_tokenizer(checkpoint.file)
            outcomes["read"] += 1
        except QrunError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 20, outcomes
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200_000, f"{grown} KiB more than before"
