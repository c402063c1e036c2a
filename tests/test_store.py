"""The store of quantized weights: what comes back, what is refused, and that trouble leaves nothing behind."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import qrun.store
from qrun.checkpoint import Checkpoint
from qrun.formats import QTensor, format_of
from qrun.recipe import Recipe
from qrun.store import WeightStore, store_key

WINT4 = Recipe.parse("wint4")
SHAPES = {"layers.0.qkv": (96, 64), "layers.0.experts.down": (3, 64, 32), "head": (70, 64)}
ROLES = {"layers.0.qkv": "dense", "layers.0.experts.down": "experts", "head": "lm_head"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    save_file({"a": torch.zeros(2)}, path / "model.safetensors")
    return Checkpoint.open(path)


@pytest.fixture
def store(tmp_path: Path) -> WeightStore:
    return WeightStore(tmp_path / "cache" / "weights")


def quantized(recipe: Recipe = WINT4) -> dict[str, QTensor]:
    torch.manual_seed(0)
    schemes = {str(role): scheme for role, scheme in recipe.schemes().items()}
    return {name: format_of(schemes[ROLES[name]]).quantize(torch.randn(shape)) for name, shape in SHAPES.items()}


def keep(store: WeightStore, checkpoint: Checkpoint, recipe: Recipe = WINT4) -> Path:
    with store.writer(checkpoint, recipe, label="org/name") as writer:
        for name, weight in quantized(recipe).items():
            writer.add(name, weight)
        writer.commit()
    return store.root / store_key(checkpoint.identity, recipe)


def held(store: WeightStore, checkpoint: Checkpoint, recipe: Recipe = WINT4) -> dict[str, QTensor | None]:
    stored = store.open(checkpoint, recipe)
    assert stored is not None
    return {name: stored.get(name, weight.format, weight.shape) for name, weight in quantized(recipe).items()}


def leftovers(store: WeightStore) -> list[str]:
    return [place.name for place in store.root.glob(".tmp-*")]


@pytest.mark.parametrize(
    "quant", ["wint4", "wint8", "W3", "fp8", "nf4", "mxfp4", "nvfp4", "trellis", "mix:experts=w4,dense=fp8"]
)
def test_every_format_comes_back(store: WeightStore, checkpoint: Checkpoint, quant: str) -> None:
    recipe = Recipe.parse(quant)
    assert store.open(checkpoint, recipe) is None
    keep(store, checkpoint, recipe)
    for name, weight in held(store, checkpoint, recipe).items():
        want = quantized(recipe)[name]
        if want.format.family == "bf16":
            assert weight is None  # the checkpoint has it
            continue
        assert weight is not None
        assert (weight.format, weight.shape) == (want.format, want.shape)
        assert weight.tensors().keys() == want.tensors().keys()
        for part, tensor in want.tensors().items():
            assert torch.equal(weight.tensors()[part].view(torch.uint8), tensor.view(torch.uint8))
    assert store.notes == []
    assert leftovers(store) == []


def test_key_is_what_decides_the_bytes(checkpoint: Checkpoint) -> None:
    key = store_key(checkpoint.identity, WINT4)
    assert len(key) == 64
    assert store_key(checkpoint.identity, Recipe.parse("W4A8C4")) == key
    assert store_key("other", WINT4) != key
    for quant in ("W4g32", "wint8", "mix:w4,embedding=w16", "nf4"):
        assert store_key(checkpoint.identity, Recipe.parse(quant)) != key


def test_shards_are_ordinary_and_bounded(
    store: WeightStore, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qrun.store, "SHARD_BYTES", 2000)
    place = keep(store, checkpoint)
    shards = sorted(place.glob("*.safetensors"))
    assert len(shards) == 3
    names: list[str] = []
    for shard in shards:
        with safe_open(shard, "pt") as file:
            names += file.keys()
    assert sorted(names) == sorted(f"{n}.{part}" for n, q in quantized().items() for part in q.tensors())
    assert all(held(store, checkpoint).values())


def test_ls_and_prune(store: WeightStore, checkpoint: Checkpoint) -> None:
    assert store.ls() == []
    assert store.prune(everything=True) == (0, 0)
    first, second = keep(store, checkpoint), keep(store, checkpoint, Recipe.parse("wint8"))
    third = keep(store, checkpoint, Recipe.parse("nf4"))
    for age, place in enumerate((first, third, second)):
        os.utime(place / "meta.json", (time.time() - 1000 * age,) * 2)
    entries = store.ls()
    assert [entry.key for entry in entries] == [first.name, third.name, second.name]
    assert (entries[0].model, entries[0].recipe) == ("org/name", WINT4.label)
    assert entries[0].bytes == sum(f.stat().st_size for f in first.glob("*.safetensors"))
    assert abs(entries[0].created - time.time()) < 60
    count, freed = store.prune(older_than=1500)
    assert (count, second.exists()) == (1, False)
    assert freed >= entries[2].bytes
    assert store.prune([third.name[:8]])[0] == 1
    assert store.prune([])[0] == 0
    assert first.exists()
    assert store.prune(everything=True)[0] == 1
    assert store.ls() == []


def test_opening_counts_as_use(store: WeightStore, checkpoint: Checkpoint) -> None:
    place = keep(store, checkpoint)
    os.utime(place / "meta.json", (5, 5))
    assert store.open(checkpoint, WINT4) is not None
    assert time.time() - store.ls()[0].used < 60


def shard_of(place: Path) -> Path:
    return next(place.glob("*.safetensors"))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut shard": lambda place: os.truncate(shard_of(place), 5000),
    "missing shard": lambda place: shard_of(place).unlink(),
    "another shard": lambda place: save_file({"x": torch.zeros(4)}, shard_of(place)),
    "no meta": lambda place: (place / "meta.json").unlink(),
    "meta is no JSON": lambda place: (place / "meta.json").write_text("{"),
    "meta without shards": lambda place: (place / "meta.json").write_text('{"version": 1}'),
    "another version": lambda place: (place / "meta.json").write_text(
        (place / "meta.json").read_text().replace('"version": 1', '"version": 0')
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_entries_are_removed_and_made_again(store: WeightStore, checkpoint: Checkpoint, case: str) -> None:
    place = keep(store, checkpoint)
    DAMAGE[case](place)
    assert store.open(checkpoint, WINT4) is None
    assert not place.exists()
    (note,) = store.notes
    assert "damaged" in note
    assert "\n" not in note
    keep(store, checkpoint)
    assert all(held(store, checkpoint).values())


def test_an_entry_that_holds_something_else_is_damaged(store: WeightStore, checkpoint: Checkpoint) -> None:
    place = keep(store, checkpoint)
    stored = store.open(checkpoint, WINT4)
    assert stored is not None
    fmt = quantized()["head"].format
    assert stored.get("head", fmt, (70, 64)) is not None
    assert stored.get("head", fmt, (71, 64)) is None
    assert stored.get("head", fmt, (70, 64)) is None  # nothing of it is believed any more
    assert not place.exists()
    assert len(store.notes) == 1


def test_an_entry_removed_while_it_is_read(store: WeightStore, checkpoint: Checkpoint) -> None:
    stored = store.open(checkpoint, WINT4) if keep(store, checkpoint) else None
    assert stored is not None
    store.prune(everything=True)
    assert stored.get("head", quantized()["head"].format, (70, 64)) is None
    assert "damaged" in store.notes[0]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_an_interrupted_load_leaves_nothing(
    store: WeightStore, checkpoint: Checkpoint, error: type[BaseException]
) -> None:
    with pytest.raises(error), store.writer(checkpoint, WINT4, label="x") as writer:
        writer.add("head", quantized()["head"])
        assert leftovers(store)
        raise error
    assert leftovers(store) == []
    assert store.open(checkpoint, WINT4) is None


def test_an_uncommitted_entry_is_none(store: WeightStore, checkpoint: Checkpoint) -> None:
    with store.writer(checkpoint, WINT4, label="x") as writer:
        writer.add("head", quantized()["head"])
    assert store.ls() == []
    assert leftovers(store) == []


def test_no_room_for_a_shard_is_a_note(
    store: WeightStore, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qrun.store, "RESERVE_BYTES", 1 << 60)
    keep(store, checkpoint)
    (note,) = store.notes
    assert "are not kept" in note
    assert "GB are free" in note
    assert store.ls() == []
    assert leftovers(store) == []


def test_a_disk_that_fills_up_is_a_note(store: WeightStore, checkpoint: Checkpoint) -> None:
    """A limit on the size of files makes writes fail half way, as a full disk does."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (68_000, old[1]))
        with store.writer(checkpoint, WINT4, label="x") as writer:
            for name, weight in quantized().items():
                writer.add(name, weight)
            writer.commit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert len(writer.notes) == 1
    assert "are not kept" in writer.notes[0]
    assert store.ls() == []
    assert leftovers(store) == []


def test_a_place_that_cannot_be_written_is_a_note(tmp_path: Path, checkpoint: Checkpoint) -> None:
    (tmp_path / "file").touch()
    store = WeightStore(tmp_path / "file" / "weights")
    assert store.open(checkpoint, WINT4) is None
    keep(store, checkpoint)
    assert "are not kept" in store.notes[0]
    assert store.ls() == []
    assert store.prune(everything=True) == (0, 0)


def test_two_writers_at_once(store: WeightStore, checkpoint: Checkpoint) -> None:
    """Both finish their load; one entry stays, whole, and the loser's files go."""
    barrier = threading.Barrier(2)
    stores = [WeightStore(store.root), WeightStore(store.root)]

    def work(own: WeightStore) -> None:
        with own.writer(checkpoint, WINT4, label="x") as writer:
            for name, weight in quantized().items():
                writer.add(name, weight)
            barrier.wait(30)
            writer.commit()

    threads = [threading.Thread(target=work, args=(own,)) for own in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [own.notes for own in stores] == [[], []]
    assert len(store.ls()) == 1
    assert leftovers(store) == []
    assert all(held(store, checkpoint).values())


def test_what_dead_processes_left_goes(store: WeightStore, checkpoint: Checkpoint) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert not psutil.pid_exists(process.pid)
    with store.writer(checkpoint, WINT4, label="x"):
        (mine,) = leftovers(store)
        host = mine.removeprefix(".tmp-").rsplit("-", 2)[0]
        dead, far, old = (store.root / f".tmp-{name}" for name in (f"{host}-{process.pid}-1", "far-1-1", "far-2-1"))
        for place in (dead, far, old):
            shutil.copytree(store.root / mine, place)
        os.utime(old, (5, 5))
        store.open(checkpoint, WINT4)
        assert sorted(leftovers(store)) == sorted([mine, far.name])


def test_strange_directories_are_left_alone(store: WeightStore, checkpoint: Checkpoint) -> None:
    place = keep(store, checkpoint)
    (store.root / "notes").mkdir()
    meta = json.loads((place / "meta.json").read_text())
    meta["shards"] = {"../../../model/model.safetensors": 1}
    (place / "meta.json").write_text(json.dumps(meta))
    assert store.open(checkpoint, WINT4) is None
    assert checkpoint.path.exists()
    assert (store.root / "notes").exists()


def test_default_place_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QRUN_CACHE_DIR", str(tmp_path / "mine"))
    assert WeightStore.default().root == tmp_path / "mine" / "weights"
    monkeypatch.delenv("QRUN_CACHE_DIR")
    assert WeightStore.default().root.parts[-2:] == ("qrun", "weights")
