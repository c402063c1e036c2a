"""Snapshots of the cache: what comes back is to the bit what was kept, and nothing else comes in."""

import json
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import make

import qrun
import qrun.snapshot
from qrun.cache import KVCache
from qrun.engine import Engine
from qrun.errors import QrunError, SnapshotError
from qrun.tensorfile import TensorFile, TensorWriter

IDS = [(7 * i * i + 3 * i + 1) % 97 for i in range(30)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make("ernie", path)
    return path


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Engine:
    return qrun.load(folder, "wint8", context=64)


@pytest.fixture
def engine(loaded: Engine) -> Iterator[Engine]:
    loaded.set_kv("bf16")
    loaded.reset()
    yield loaded


def scored(engine: Engine, ids: list[int], count: int = 4) -> tuple[list[int], list[Any], int]:
    made = engine.generate(ids, max_tokens=count, temperature=0, logprobs=5, loop_guard=False)
    return list(made), made.logprobs, made.stats.reused_tokens


@pytest.mark.parametrize("kv", ["bf16", "fp32", "int8", "int4", "fp8", "k8v4"])
def test_a_restored_conversation_goes_on_as_the_one_that_was_kept(kv: str, engine: Engine, tmp_path: Path) -> None:
    engine.set_kv(kv)
    file = tmp_path / "one.kv"
    out, _, _ = scored(engine, IDS[:20])
    engine.snapshot(file)
    live = scored(engine, [*IDS[:20], *out, 5])
    engine.logits(IDS)  # another conversation in its place
    assert engine.restore(file) == 23 == engine.cache.length
    assert list(engine.cached_ids) == [*IDS[:20], *out[:3]]
    assert scored(engine, [*IDS[:20], *out, 5]) == live and live[2] == 23
    # A shorter prompt that shares a part of it keeps that part.
    engine.restore(file)
    assert scored(engine, [*IDS[:8], 5])[2] == 8


def test_it_may_be_restored_by_another_load(engine: Engine, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "one.kv"
    out, _, _ = scored(engine, IDS)
    engine.snapshot(file)
    live = scored(engine, [*IDS, *out, 5])
    other = qrun.load(folder, "wint8", context=48)
    other.restore(file)
    assert scored(other, [*IDS, *out, 5]) == live


@pytest.mark.parametrize(("kept", "kv"), [("bf16", "int8"), ("int8", "k8v4"), ("int4", "bf16")])
def test_one_in_other_formats_is_converted_as_the_live_cache_would_be(
    kept: str, kv: str, engine: Engine, tmp_path: Path
) -> None:
    engine.set_kv(kept)
    file = tmp_path / "one.kv"
    out, _, _ = scored(engine, IDS[:20])
    engine.snapshot(file)
    engine.set_kv(kv)
    live = scored(engine, [*IDS[:20], *out, 5])
    engine.reset()
    engine.restore(file)
    assert engine.card.kv == kv and scored(engine, [*IDS[:20], *out, 5]) == live


def test_an_empty_conversation_can_be_kept(engine: Engine, tmp_path: Path) -> None:
    engine.snapshot(tmp_path / "empty.kv")
    scored(engine, IDS)
    assert engine.restore(tmp_path / "empty.kv") == 0
    assert engine.cache.length == 0 and not engine.ids


def test_a_reply_under_way_is_kept_up_to_its_last_known_token(engine: Engine, tmp_path: Path) -> None:
    made = engine.generate(IDS[:10], temperature=0, loop_guard=False)
    first = [next(made), next(made)]
    engine.snapshot(tmp_path / "one.kv")
    assert [*first, next(made)] == scored(engine, IDS[:10], 3)[0]
    engine.restore(tmp_path / "one.kv")
    assert list(engine.cached_ids) == [*IDS[:10], first[0]]


def test_the_file_is_private_plain_safetensors_and_takes_the_place_at_once(engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "one.kv"
    file.write_text("before")
    file.chmod(0o644)
    scored(engine, IDS)
    engine.snapshot(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [place.name for place in tmp_path.iterdir()] == ["one.kv"]
    found = TensorFile(file)
    assert found.metadata["kind"] == "qrun-kv" and found.metadata["weights"] == "W8A16C16"
    assert found.metadata["qrun"] == qrun.__version__ and found.metadata["model"] == engine.identity
    assert found.read("layers.1.v.codes").dtype == torch.bfloat16
    assert found.entries["layers.0.k.codes"].shape == (2, 33, 32)
    from safetensors.torch import load_file

    assert load_file(file)["ids"].tolist() == list(engine.cached_ids)


@pytest.mark.parametrize("cause", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=str)
def test_writing_that_breaks_off_leaves_what_was_there(
    cause: BaseException, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "one.kv"
    file.write_text("before")
    scored(engine, IDS)
    add = TensorWriter.add

    def breaks(self: TensorWriter, name: str, tensor: torch.Tensor) -> None:
        if name.startswith("layers.1"):
            raise cause
        add(self, name, tensor)

    monkeypatch.setattr(TensorWriter, "add", breaks)
    with pytest.raises(SnapshotError if isinstance(cause, OSError) else KeyboardInterrupt, match=r"No space|^$"):
        engine.snapshot(file)
    assert file.read_text() == "before" and [place.name for place in tmp_path.iterdir()] == ["one.kv"]


def test_where_nothing_can_be_written(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match=r"no/where\.kv: cannot write the snapshot"):
        engine.snapshot(tmp_path / "no" / "where.kv")
    nameless = Engine(
        engine.decoder, engine.backend, config=engine.config, recipe=engine.recipe, card=engine.card,
        source=engine.source, generation_defaults={}, context=64,
    )  # fmt: skip
    for act in (nameless.snapshot, nameless.restore):
        with pytest.raises(SnapshotError, match="not loaded from a checkpoint"):
            act(tmp_path / "one.kv")


def edited(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    """A change to the header, the data left as they are."""

    def edit(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return edit


def metadata(**values: str) -> Callable[[bytes], bytes]:
    return edited(lambda header: header["__metadata__"].update(values))


def reshaped(name: str, shape: list[int]) -> Callable[[bytes], bytes]:
    return edited(lambda header: header[name].update(shape=shape))


DAMAGED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "nothing": (lambda data: b"", "no safetensors file, or cut short"),
    "text": (lambda data: b"hello, this is not a snapshot", "no safetensors file, or cut short"),
    "short": (lambda data: data[:-1], "no safetensors file, or cut short"),
    "long": (lambda data: data + b"x", "no safetensors file, or cut short"),
    "huge-header": (lambda data: (1 << 40).to_bytes(8, "little") + data[8:], "no safetensors file"),
    "large-header": (lambda data: (200_000).to_bytes(8, "little") + data[8:] + bytes(200_000), "no safetensors file"),
    "other-kind": (metadata(kind="pt"), "no snapshot of a cache"),
    "other-version": (metadata(version="2"), "version '2', this qrun reads 1"),
    "other-model": (metadata(model="org/else@1"), r"another model \('org/else@1', not 'sha256:"),
    "other-weights": (metadata(weights="W4A16C16"), "weights in 'W4A16C16', these are in W8A16C16: use that"),
    "rude": (metadata(weights="\x1b[2J\n" + "w" * 9000), r"weights in '\\x1b\[2J\\nw{43}', these"),
    "unknown-format": (metadata(k="int5"), "k in 'int5'"),
    "other-format": (metadata(v="int8"), "layers.0.v.codes is not what"),
    "no-ids": (edited(lambda h: h.update(idz=h.pop("ids"))), "ids is not what"),
    "long-ids": (reshaped("ids", [66]), "cut short"),
    "transposed": (reshaped("layers.1.k.codes", [33, 2, 32]), "layers.1.k.codes is not what"),
    "other-dtype": (edited(lambda h: h["layers.1.k.codes"].update(dtype="F16")), "layers.1.k.codes is not what"),
    "a-layer-more": (edited(lambda h: h.update({"layers.2.k.codes": h.pop("layers.1.k.codes")})), "layers.1.k.codes"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_what_does_not_fit_is_refused_before_the_cache_is_touched(case: str, engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "one.kv"
    scored(engine, IDS)
    engine.snapshot(file)
    change, message = DAMAGED[case]
    file.write_bytes(change(file.read_bytes()))
    live = scored(engine, IDS[:10])
    held = list(engine.cached_ids)
    with pytest.raises(SnapshotError, match=message):
        engine.restore(file)
    assert list(engine.cached_ids) == held and engine.cache.length == len(held)
    assert scored(engine, IDS[:10])[:2] == live[:2]


def test_one_longer_than_the_context_is_refused(engine: Engine, folder: Path, tmp_path: Path) -> None:
    scored(engine, IDS)
    engine.snapshot(tmp_path / "one.kv")
    small = qrun.load(folder, "wint8", context=32)
    with pytest.raises(SnapshotError, match=r"holds 33 tokens and the context 32: give a larger one with -c"):
        small.restore(tmp_path / "one.kv")


def test_another_model_or_recipe_is_refused(engine: Engine, folder: Path, tmp_path: Path) -> None:
    scored(engine, IDS)
    engine.snapshot(tmp_path / "one.kv")
    with pytest.raises(SnapshotError, match="weights in 'W8A16C16', these are in W16A16C16"):
        qrun.load(folder, "bf16", context=64).restore(tmp_path / "one.kv")
    make("ernie-moe", tmp_path / "other")
    with pytest.raises(SnapshotError, match="another model"):
        qrun.load(tmp_path / "other", "wint8", context=64).restore(tmp_path / "one.kv")


@pytest.mark.parametrize("name", ["ids", "layers.0.k.codes", "layers.1.v.codes"])
def test_a_flipped_bit_is_found(name: str, engine: Engine, tmp_path: Path) -> None:
    """It is known once all was read, and then nothing of it is left."""
    file = tmp_path / "one.kv"
    scored(engine, IDS)
    engine.snapshot(file)
    data = bytearray(file.read_bytes())
    data[TensorFile(file).entries[name].start] ^= 1
    file.write_bytes(data)
    engine.reset()
    live = scored(engine, IDS)
    with pytest.raises(SnapshotError, match="its contents are not those that were written"):
        engine.restore(file)
    assert engine.cache.length == len(engine.ids) == 0
    assert scored(engine, IDS)[:2] == live[:2]


def test_ids_outside_the_vocabulary_are_refused(engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "one.kv"
    scored(engine, IDS)
    engine.snapshot(file)
    data = bytearray(file.read_bytes())
    start = TensorFile(file).entries["ids"].start
    for wrong in ((131).to_bytes(8, "little"), (-1).to_bytes(8, "little", signed=True)):
        data[start : start + 8] = wrong
        file.write_bytes(data)
        with pytest.raises(SnapshotError, match=r"a token id is outside 0 … 130"):
            engine.restore(file)


def test_what_is_no_file_is_not_waited_for(engine: Engine, tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path, tmp_path / "missing"):
        with pytest.raises(SnapshotError, match=f"there is no snapshot {place}"):
            engine.restore(place)


def test_only_one_layers_part_is_held_beside_the_cache(engine: Engine, tmp_path: Path) -> None:
    """Neither the header's size nor a declared shape makes anything be allocated that the file does not have."""
    scored(engine, IDS)
    parts = qrun.snapshot._contents(engine.cache, engine.ids)
    assert next(parts)[0] == "ids"
    name, first = next(parts)
    assert name == "layers.0.k.codes" and first.is_contiguous() and first.shape == (2, 33, 32)


def test_many_layers_find_room_in_the_header(tmp_path: Path) -> None:
    from qrun.formats import kv_format

    cache = KVCache(
        layers=400, kv_heads=1, head_dim=2, capacity=4, k=kv_format("int8"), v=kv_format("int4"),
        device=torch.device("cpu"),
    )  # fmt: skip
    origin = qrun.snapshot.Origin("m" * 200, "mix:" + "w" * 200)
    qrun.snapshot.write(tmp_path / "deep.kv", cache, [1, 2], origin)
    found = qrun.snapshot.Snapshot(tmp_path / "deep.kv", cache, origin=origin, vocab=5)
    assert found.length == 2 and issubclass(SnapshotError, QrunError)
    found.fill(cache)
