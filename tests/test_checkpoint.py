"""Reading a checkpoint: what it says, what is refused, that nothing stays resident. Oracle: the safetensors library."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qrun.checkpoint import Checkpoint, has_all_weights, read_config
from qrun.errors import CheckpointError, ModelNotFoundError, QrunError, UnsupportedModelError
from qrun.tensorfile import DTYPES, TensorFile, TensorWriter

CONFIG = {"model_type": "llama", "hidden_size": 4}


def tensors(*names: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(3, 4).to(torch.bfloat16) for name in names}


def single(path: Path, held: dict[str, torch.Tensor] | None = None, config: object = CONFIG) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    save_file(tensors("a", "b") if held is None else held, path / "model.safetensors")
    return path


def sharded(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors("a", "b"), path / "model-00001-of-00002.safetensors")
    save_file(tensors("c"), path / "model-00002-of-00002.safetensors")
    names = {"a": 1, "b": 1, "c": 2}
    index = {"metadata": {}, "weight_map": {n: f"model-0000{i}-of-00002.safetensors" for n, i in names.items()}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def edit_index(path: Path, **changes: object) -> None:
    index = path / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"] |= changes
    index.write_text(json.dumps(data))


def edit_header(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite a file's header, its data left as it is."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def refused(path: Path, kind: type[QrunError] = CheckpointError) -> str:
    with pytest.raises(QrunError) as caught:
        Checkpoint.open(path)
    assert type(caught.value) is kind
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_single_file(tmp_path: Path) -> None:
    held = tensors("a", "b")
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5}')
    checkpoint = Checkpoint.open(single(tmp_path, held))
    assert checkpoint.config == CONFIG
    assert checkpoint.generation_config == {"temperature": 0.5}
    assert list(checkpoint.names()) == ["a", "b"]
    assert "a" in checkpoint
    assert "c" not in checkpoint
    assert (checkpoint.shape("a"), checkpoint.dtype("a"), checkpoint.nbytes("a")) == ((3, 4), torch.bfloat16, 24)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in held.items())


def test_what_is_read_is_private(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(single(tmp_path))
    checkpoint.read("a").zero_()
    assert checkpoint.read("a").count_nonzero()


def test_sharded_through_links(tmp_path: Path) -> None:
    """A snapshot in the hub's cache is nothing but links."""
    real = sharded(tmp_path / "real")
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in real.iterdir():
        (linked / file.name).symlink_to(file)
    checkpoint = Checkpoint.open(linked)
    assert list(checkpoint.names()) == ["a", "b", "c"]
    assert torch.equal(checkpoint.read("c"), tensors("c")["c"])


def test_shards_without_an_index(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    (path / "model.safetensors.index.json").unlink()
    save_file(tensors("a"), path / "consolidated.safetensors")  # the same weights once more, in another layout
    assert list(Checkpoint.open(path).names()) == ["a", "b", "c"]


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype_as_the_library_reads_it(tmp_path: Path, dtype: str) -> None:
    held = {"x": torch.arange(6).view(2, 3).to(DTYPES[dtype]), "scalar": torch.tensor(1).to(DTYPES[dtype])}
    held["empty"] = torch.zeros(0, 3).to(DTYPES[dtype])
    save_file(held, tmp_path / "library.safetensors")
    with TensorWriter(tmp_path / "ours.safetensors") as writer:
        for name, tensor in held.items():
            writer.add(name, tensor)
    ours = load_file(tmp_path / "ours.safetensors")
    for name, tensor in held.items():
        assert torch.equal(ours[name].view(torch.uint8) if tensor.ndim else ours[name],
                           tensor.view(torch.uint8) if tensor.ndim else tensor)  # fmt: skip
        for file in ("library", "ours"):
            read = TensorFile(tmp_path / f"{file}.safetensors").read(name)
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert read.flatten().view(torch.uint8).tolist() == tensor.flatten().view(torch.uint8).tolist()


def test_writer_takes_views_and_keeps_room(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    with TensorWriter(tmp_path / "x.safetensors") as writer:
        writer.add("t", base.T)
        assert writer.nbytes == 48
        assert writer.fits(100)
        assert not writer.fits(1000)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("t"), base.T)


BAD_CONFIGS = {
    "not JSON": ("{", "not valid JSON"),
    "not an object": ("[1]", "a JSON list, not an object"),
    "not text": (b"\xff\xfe\x00", "not valid JSON"),
    "nested too deep": ("[" * 100_000, "not valid JSON"),
    "too large": (" " * ((8 << 20) + 1), "larger than 8 MiB"),
    "a key twice": ('{"a": 1, "a": 2}', "names 'a' twice"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configs(tmp_path: Path, case: str) -> None:
    content, message = BAD_CONFIGS[case]
    single(tmp_path)
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    text = refused(tmp_path)
    assert message in text
    assert "config.json" in text


def test_quantized_checkpoints_are_named(tmp_path: Path) -> None:
    single(tmp_path, config=CONFIG | {"quantization_config": {"quant_method": "exl3"}})
    assert "exl3" in refused(tmp_path, UnsupportedModelError)
    single(tmp_path, config=CONFIG | {"quantization_config": None})
    assert read_config(tmp_path)["model_type"] == "llama"


def test_no_such_directory(tmp_path: Path) -> None:
    assert "qrun chat spark" in refused(tmp_path / "none", ModelNotFoundError)


def test_other_kinds_of_model(tmp_path: Path) -> None:
    assert "no config.json" in refused(tmp_path)
    (tmp_path / "m.gguf").touch()
    assert "GGUF" in refused(tmp_path)
    assert "GGUF" in refused(tmp_path / "m.gguf", UnsupportedModelError)
    (tmp_path / "m.gguf").unlink()
    (tmp_path / "config.json").write_text("{}")
    assert "no safetensors" in refused(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    text = refused(tmp_path)
    assert "pytorch_model.bin" in text
    assert "pickle can run code" in text
    assert "is a file" in refused(tmp_path / "pytorch_model.bin")


def test_bad_index(tmp_path: Path) -> None:
    sharded(tmp_path)
    assert has_all_weights(tmp_path)
    edit_index(tmp_path, d="model-00002-of-00002.safetensors")
    assert "index puts d in model-00002" in refused(tmp_path)
    for evil in ("../../etc/passwd", "/etc/passwd", "a/../b.safetensors", "..\\b.safetensors", 3, "config.json"):
        edit_index(tmp_path, d=evil)
        assert "refused" in refused(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert "no weight_map" in refused(tmp_path)


def test_missing_and_doubled_shards(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file(tensors("a", "c"), tmp_path / "model-00002-of-00002.safetensors")
    assert "a is both in" in refused(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert not has_all_weights(tmp_path)
    assert "fetch the missing shard" in refused(tmp_path)


def test_truncated_file(tmp_path: Path) -> None:
    file = single(tmp_path) / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 4, 20, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert "cut short" in refused(tmp_path)
    file.write_bytes(whole + b"\0")
    assert "longer than its header says" in refused(tmp_path)
    file.write_bytes(struct.pack("<Q", 1 << 60) + whole[8:])
    assert "not a safetensors file" in refused(tmp_path)


LIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "shape": (lambda h: h["a"].update(shape=[3, 5]), "takes 30 bytes"),
    "negative shape": (lambda h: h["a"].update(shape=[-3, -4]), "malformed"),
    "boolean shape": (lambda h: h["a"].update(shape=[True, 12]), "malformed"),
    "dtype": (lambda h: h["a"].update(dtype="F17"), "dtype 'F17'"),
    "no dtype": (lambda h: h["a"].pop("dtype"), "dtype None"),
    "overlap": (lambda h: h["b"].update(data_offsets=[0, 24]), "overlaps"),
    "outside": (lambda h: h["b"].update(data_offsets=[1 << 40, (1 << 40) + 24]), "leaves a gap"),
    "one offset": (lambda h: h["b"].update(data_offsets=[24]), "malformed"),
    "no object": (lambda h: h.update(b=7), "malformed"),
    "huge shape": (lambda h: h["a"].update(shape=[1 << 40, 1 << 40]), "takes"),
}


@pytest.mark.parametrize("case", LIES)
def test_header_lies(tmp_path: Path, case: str) -> None:
    edit, message = LIES[case]
    edit_header(single(tmp_path) / "model.safetensors", edit)
    assert message in refused(tmp_path)


def test_file_cut_after_it_was_opened(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(single(tmp_path))
    file = tmp_path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 30)
    with pytest.raises(CheckpointError, match="ended inside"):
        checkpoint.read("b")
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot read b"):
        checkpoint.read("b")


def test_weights_must_be_what_the_config_says(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(single(tmp_path, tensors("a") | {"i": torch.zeros(2, 2, dtype=torch.int8)}))
    assert checkpoint.weight("a", (3, 4)).shape == (3, 4)
    with pytest.raises(CheckpointError, match=r"shape \[3, 4\], its config.json says \[4, 3\]"):
        checkpoint.weight("a", (4, 3))
    with pytest.raises(CheckpointError, match="int8, not float32"):
        checkpoint.weight("i", (2, 2))
    with pytest.raises(CheckpointError, match="no tensor nothing"):
        checkpoint.read("nothing")


def test_identity_follows_content(tmp_path: Path) -> None:
    first = Checkpoint.open(single(tmp_path)).identity
    assert Checkpoint.open(tmp_path).identity == first
    os.utime(tmp_path / "model.safetensors", ns=(0, 1))
    assert Checkpoint.open(tmp_path).identity != first


def test_identity_of_a_snapshot_is_its_revision(tmp_path: Path) -> None:
    sha = "0123456789abcdef" * 2 + "01234567"
    path = tmp_path / "models--org--name" / "snapshots" / sha
    path.parent.mkdir(parents=True)
    first = Checkpoint.open(single(path)).identity
    os.utime(path / "model.safetensors", ns=(0, 1))
    assert Checkpoint.open(path).identity == first
    assert first.startswith(f"org/name@{sha}")


MEASURE = """
import sys
from pathlib import Path
from qrun.checkpoint import Checkpoint
from qrun.resident import peak
checkpoint = Checkpoint.open(Path(sys.argv[1]))
before = peak()
for name in checkpoint.names():
    assert checkpoint.read(name).numel()
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell the peak")
def test_reading_everything_keeps_one_tensor_resident(tmp_path: Path) -> None:
    """400 MB (a sparse file: reading fills memory all the same) in tensors of 40 MB: the peak grows by one, not ten."""
    count, each = 10, 40_000_000
    header = {
        f"t{i}": {"dtype": "U8", "shape": [each], "data_offsets": [i * each, (i + 1) * each]} for i in range(count)
    }
    text = json.dumps(header).encode()
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + count * each)
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    assert each * 0.9 < int(done.stdout) < each * 2
