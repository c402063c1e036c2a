"""Names to directories: the logic against a hub in memory, the client against a hub on a local port.

The second speaks as much of the hub's HTTP as huggingface_hub asks for, so its real exceptions are what is translated.
"""

import http.server
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import save_file

import qrun.hub
from qrun.checkpoint import Checkpoint
from qrun.errors import CheckpointError, DoesNotFitError, ModelNotFoundError, QrunError, UnsupportedModelError
from qrun.hub import HuggingFace, Resolved, explain, fetch
from qrun.models import describe
from qrun.outline import outlines
from qrun.recipe import Recipe

BF16 = Recipe.parse("bf16")
SHA = "0123456789" * 4
TINY = {
    "model_type": "llama", "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 64, "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}  # fmt: skip
HUGE = TINY | {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 500, "num_attention_heads": 128}


def repository(path: Path, config: Mapping[str, object] = TINY) -> dict[str, bytes]:
    """The files of a sharded repository with much that nobody needs."""
    path.mkdir()
    save_file({"a": torch.zeros(5000)}, path / "1.safetensors")
    save_file({"b": torch.zeros(6000)}, path / "2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    return {
        "config.json": json.dumps(config).encode(),
        "generation_config.json": b"{}",
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b"{}",
        "chat_template.jinja": b"x",
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model-1.safetensors": (path / "1.safetensors").read_bytes(),
        "model-2.safetensors": (path / "2.safetensors").read_bytes(),
        "consolidated.safetensors": b"twice",
        "pytorch_model.bin": b"pickle",
        "original/consolidated.00.pth": b"pickle",
        "original/model.safetensors": b"elsewhere",
        "README.md": b"text",
    }


WANTED = {
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors",
}  # fmt: skip


@dataclass
class MemoryHub:
    """A hub client over dictionaries. ``online`` false is a network that is down; ``asked`` is what was fetched."""

    root: Path
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict[str, dict[str, bytes]])
    online: bool = True
    asked: list[str] = field(default_factory=list[str])
    fail_at: str = ""

    def file(
        self, repo: str, name: str, revision: str, *, offline: bool = False, update: Callable[[int], None] | None = None
    ) -> Path:
        path = self.root / repo / SHA / name
        if path.exists():
            return path
        if offline or not self.online or repo not in self.repos or name == self.fail_at:
            raise ModelNotFoundError(f"{repo} {name} cannot be had, or talk to the embedded model: qrun chat spark")
        self.asked.append(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        data = self.repos[repo][name]
        path.write_bytes(data)
        for half in (len(data) // 2, len(data) - len(data) // 2):
            if update:
                update(half)
        return path

    def sizes(self, repo: str, revision: str) -> Mapping[str, int]:
        if not self.online or repo not in self.repos:
            raise ModelNotFoundError(f"{repo} cannot be had, or talk to the embedded model: qrun chat spark")
        return {name: len(data) for name, data in self.repos[repo].items()}

    def header(self, repo: str, name: str, revision: str) -> Mapping[str, str]:
        self.asked.append(f"header of {name}")
        return {"a": "F32"}

    def cache_dir(self) -> Path:
        return self.root / "not" / "made" / "yet"


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo for this file what keeps all others off the network; everything here is in memory or on a local port."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture
def hub(tmp_path: Path) -> MemoryHub:
    return MemoryHub(tmp_path / "hub", {"org/name": repository(tmp_path / "made")})


def test_the_embedded_model() -> None:
    for name in (None, "spark"):
        found = fetch(name, recipe=BF16)
        assert found.label == "spark"
        assert found.path == Path(qrun.hub.__file__).parent / "spark"


def test_a_directory(tmp_path: Path, hub: MemoryHub, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    assert fetch(tmp_path / "model", recipe=BF16, client=hub) == Resolved(tmp_path / "model", "model")
    monkeypatch.chdir(tmp_path)
    assert fetch("./model", recipe=BF16, client=hub).path == Path("model")
    for missing in ("./none", "/no/where", "~/none", "a/b/c", "", "..\\x"):
        with pytest.raises(ModelNotFoundError, match="qrun chat spark"):
            fetch(missing, recipe=BF16, client=hub)


def test_a_directory_called_like_a_short_name(tmp_path: Path, hub: MemoryHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mistral").mkdir()
    with pytest.raises(ModelNotFoundError, match="mistralai/"):
        fetch("mistral", recipe=BF16, client=hub, memory=1 << 50)
    (tmp_path / "mistral" / "config.json").touch()
    assert fetch("mistral", recipe=BF16, client=hub).path == Path("mistral")


def test_download(hub: MemoryHub) -> None:
    seen: list[tuple[str, int, int]] = []
    found = fetch("org/name", recipe=BF16, client=hub, progress=lambda *step: seen.append(step))
    assert set(hub.asked) == WANTED
    assert (found.label, found.note) == ("org/name", "")
    assert list(Checkpoint.open(found.path).names()) == ["a", "b"]
    total = sum(len(hub.repos["org/name"][name]) for name in WANTED - {"config.json"})
    assert seen[0][1] < total
    assert seen[-1] == ("fetching org/name", total, total)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_a_second_start_asks_for_nothing(hub: MemoryHub) -> None:
    first = fetch("org/name", recipe=BF16, client=hub)
    hub.asked.clear()
    assert fetch("org/name", recipe=BF16, client=hub) == first
    assert fetch("org/name", recipe=BF16, client=hub, offline=True) == first
    hub.online = False
    again = fetch("org/name", recipe=BF16, client=hub)
    assert again.path == first.path
    assert again.note == "org/name cannot be had; the cached copy is used"
    assert fetch(f"org/name@{SHA}", recipe=BF16, client=hub).note == ""
    assert hub.asked == []


def test_an_interrupted_download_goes_on(hub: MemoryHub) -> None:
    hub.fail_at = "model-2.safetensors"
    with pytest.raises(ModelNotFoundError):
        fetch("org/name", recipe=BF16, client=hub)
    with pytest.raises(ModelNotFoundError, match="only partly in the hub cache"):
        fetch("org/name", recipe=BF16, client=hub, offline=True)
    hub.fail_at = ""
    hub.asked.clear()
    fetch("org/name", recipe=BF16, client=hub)
    assert hub.asked == ["model-2.safetensors"]


def test_offline_by_environment(hub: MemoryHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFoundError):
        fetch("org/name", recipe=BF16, client=hub)
    assert hub.asked == []


def test_nothing_large_is_fetched_before_it_fits(tmp_path: Path, hub: MemoryHub) -> None:
    hub.repos["org/huge"] = repository(tmp_path / "huge", HUGE)
    with pytest.raises(DoesNotFitError, match="org/huge at bf16"):
        fetch("org/huge", recipe=BF16, client=hub, memory=1 << 34)
    with pytest.raises(DoesNotFitError):
        fetch("org/name", recipe=BF16, client=hub, memory=600_010_000)
    assert set(hub.asked) == {"config.json"}
    assert fetch("org/name", recipe=BF16, client=hub, memory=700_000_000, context=-1)


def test_what_is_quantized_counts_as_its_files_do(tmp_path: Path, hub: MemoryHub) -> None:
    wide = TINY | {"hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 40, "num_attention_heads": 32}
    settings = {"quant_method": "awq", "bits": 4, "group_size": 128}
    hub.repos["org/awq"] = repository(tmp_path / "awq", wide | {"quantization_config": settings})
    with pytest.raises(DoesNotFitError, match="org/awq at bf16"):
        fetch("org/awq", recipe=BF16, client=hub, memory=1 << 32)
    assert hub.asked == ["config.json"]
    assert fetch("org/awq", recipe=Recipe.parse("auto"), client=hub, memory=1 << 32)
    outline = outlines("org/awq", client=hub)[0]
    assert outline.quantized
    assert outline.files == sum(len(hub.repos["org/awq"][f"model-{n}.safetensors"]) for n in (1, 2))


@pytest.mark.parametrize(
    ("config", "error"),
    [
        (TINY | {"model_type": "ernie4_5_moe_vl"}, UnsupportedModelError),
        (TINY | {"quantization_config": {"quant_method": "exl3"}}, UnsupportedModelError),
        ({"model_type": "llama"}, UnsupportedModelError),
    ],
)
def test_what_cannot_run_is_not_fetched(hub: MemoryHub, config: dict[str, object], error: type[QrunError]) -> None:
    hub.repos["org/name"]["config.json"] = json.dumps(config).encode()
    with pytest.raises(error):
        fetch("org/name", recipe=BF16, client=hub)
    assert hub.asked == ["config.json"]


def test_no_safetensors(hub: MemoryHub) -> None:
    files = hub.repos["org/name"]
    for name in [name for name in files if name.startswith("model")]:
        del files[name]
    with pytest.raises(CheckpointError, match="no safetensors weights"):
        fetch("org/name", recipe=BF16, client=hub)


def test_no_room_on_the_disk(hub: MemoryHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qrun.hub, "RESERVE_BYTES", 1 << 60)
    with pytest.raises(ModelNotFoundError, match="HF_HOME"):
        fetch("org/name", recipe=BF16, client=hub)
    assert hub.asked == ["config.json"]


def test_an_alias_and_its_note(tmp_path: Path, hub: MemoryHub) -> None:
    hub.repos["baidu/ERNIE-4.5-0.3B-PT"] = repository(tmp_path / "ernie")
    found = fetch("ernie", recipe=BF16, client=hub, memory=2_000_000_000)
    assert found.label == "baidu/ERNIE-4.5-0.3B-PT"
    assert "the largest that fits 2.0 GB at bf16" in found.note
    assert fetch("ernie:0.3b", recipe=BF16, client=hub).note == ""


def test_offline_a_family_is_the_largest_that_is_here(tmp_path: Path, hub: MemoryHub) -> None:
    hub.repos["baidu/ERNIE-4.5-0.3B-PT"] = repository(tmp_path / "ernie")
    with pytest.raises(ModelNotFoundError, match="300B"):
        fetch("ernie", recipe=BF16, client=hub, memory=1 << 50, offline=True)
    here = fetch("ernie:0.3b", recipe=BF16, client=hub)
    found = fetch("ernie", recipe=BF16, client=hub, memory=1 << 50, offline=True)
    assert found.path == here.path
    assert found.note.endswith("at bf16 and is in the hub cache")


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves ``org/name`` from ``files``; other repositories fail as the hub makes them fail."""

    files: Mapping[str, bytes]
    ranges: list[str]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/org/name/resolve/") and path.split("/")[4] in ("main", "v1", SHA):
            name = path.split("/", 5)[5]
            asked = self.headers["Range"]
            if name in self.files and asked:
                self.ranges.append(f"{name} {asked}")
                first, last = map(int, asked.removeprefix("bytes=").split("-"))
                return self.answer(206, self.files[name][first : last + 1])
            if name in self.files:
                return self.answer(200, self.files[name], ETag=f'"{len(self.files[name]):040d}"')
            return self.answer(404, b"", **{"X-Error-Code": "EntryNotFound"})
        if path.startswith("/api/models/org/gated/"):
            return self.answer(200, b'{"id": "org/gated", "siblings": [{"rfilename": "config.json", "size": 1}]}')
        if path == "/api/models/org/name/revision/v2":
            return self.answer(404, b"", **{"X-Error-Code": "RevisionNotFound"})
        if path.startswith("/api/models/org/down/"):
            return self.answer(418, b"")
        if path.startswith("/api/models/org/name/"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.files.items()]
            return self.answer(200, json.dumps({"id": "org/name", "sha": SHA, "siblings": siblings}).encode())
        if path.startswith("/org/gated/"):
            return self.answer(403, b"", **{"X-Error-Code": "GatedRepo"})
        return self.answer(404, b"", **{"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"X-Repo-Commit": SHA, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    Hub.ranges = []
    handler = type("Served", (Hub,), {"files": repository(tmp_path_factory.mktemp("hub") / "r")})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def client(port: str, tmp_path: Path) -> HuggingFace:
    return HuggingFace(endpoint=port, cache=tmp_path / "cache")


def test_the_real_client_downloads(client: HuggingFace) -> None:
    seen: list[int] = []
    found = fetch(
        "org/name@v1", recipe=BF16, client=client, progress=lambda what, done, total: seen.append(total - done)
    )
    assert found.label == "org/name@v1"
    assert {file.name for file in found.path.iterdir()} == WANTED
    assert found.path.name == SHA
    assert seen[-1] == 0
    assert seen[0] > 40_000
    checkpoint = Checkpoint.open(found.path)
    assert checkpoint.read("b").shape == (6000,)
    assert checkpoint.identity.startswith(f"org/name@{SHA}")
    assert fetch("org/name@v1", recipe=BF16, client=client, offline=True).path == found.path


def test_the_cache_serves_when_the_hub_is_away(client: HuggingFace, tmp_path: Path) -> None:
    found = fetch("org/name", recipe=BF16, client=client)
    away = HuggingFace(endpoint="http://127.0.0.1:9", cache=tmp_path / "cache")
    assert fetch("org/name", recipe=BF16, client=away).path == found.path
    assert "the hub cannot be reached" in fetch("org/name", recipe=BF16, client=away).note
    (found.path / "model-2.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="qrun chat spark"):
        fetch("org/name", recipe=BF16, client=away)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/none", "the hub has no org/none"),
        ("org/gated", "accept its licence on huggingface.co/org/gated, set HF_TOKEN"),
        ("org/down", "the hub answered 418 for org/down"),
        ("org/name@v2", "no revision 'v2'"),
        ("org/-x--y", "not a valid repository name"),
    ],
)
def test_what_the_hub_refuses(client: HuggingFace, name: str, message: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        fetch(name, recipe=BF16, client=client)
    text = str(caught.value)
    assert message in text
    assert text.endswith(", or talk to the embedded model: qrun chat spark")
    assert "\n" not in text
    assert caught.value.exit_code == 3


def test_a_file_that_is_not_there(client: HuggingFace) -> None:
    with pytest.raises(ModelNotFoundError, match="not a transformers-style checkpoint"):
        client.file("org/name", "other.json", "main")


def test_an_outline_reads_a_config_and_a_header(client: HuggingFace, tmp_path: Path) -> None:
    """The files are in 32 bits, and no weights are fetched."""
    Hub.ranges.clear()
    (found,) = outlines("org/name@v1", client=client)
    assert (found.name, found.config, found.tied, found.itemsize) == ("org/name@v1", describe(TINY), True, 4)
    assert [line.split()[0] for line in Hub.ranges] == ["model-1.safetensors"]
    kept = {file.name for file in (tmp_path / "cache").rglob("snapshots/*/*")}
    assert kept == {"config.json", "model.safetensors.index.json"}
    assert outlines("org/name@v1", client=client, offline=True)[0].config == found.config


def test_an_outline_from_the_cache_when_the_hub_is_away(client: HuggingFace, tmp_path: Path) -> None:
    fetch("org/name", recipe=BF16, client=client)
    away = HuggingFace(endpoint="http://127.0.0.1:9", cache=tmp_path / "cache")
    (found,) = outlines("org/name", client=away)
    assert found.itemsize == 4 and "the hub cannot be reached" in found.note
    with pytest.raises(ModelNotFoundError, match="the hub cannot be reached"):
        outlines("org/other", client=away)


def test_the_tensors_tell_of_the_head(hub: MemoryHub) -> None:
    """Where the config does not: here the index names no lm_head, there it does."""
    files = hub.repos["org/name"]
    files["config.json"] = json.dumps({key: TINY[key] for key in TINY if key != "tie_word_embeddings"}).encode()
    assert outlines("org/name", client=hub)[0].tied is True
    assert hub.asked == ["config.json", "model.safetensors.index.json", "header of model-1.safetensors"]
    index = {"weight_map": {"a": "model-1.safetensors", "lm_head.weight": "model-2.safetensors"}}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    shutil.rmtree(hub.root)
    assert outlines("org/name", client=hub)[0].tied is False


def test_an_outline_of_what_cannot_run(hub: MemoryHub) -> None:
    for name in [name for name in hub.repos["org/name"] if name.endswith(".safetensors")]:
        del hub.repos["org/name"][name]
    with pytest.raises(CheckpointError, match="no safetensors weights"):
        outlines("org/name", client=hub)
    hub.repos["org/name"]["config.json"] = json.dumps(TINY | {"model_type": "gpt9"}).encode()
    shutil.rmtree(hub.root)
    with pytest.raises(UnsupportedModelError, match="gpt9"):
        outlines("org/name", client=hub)
    del hub.repos["org/name"]["config.json"]
    with pytest.raises(CheckpointError, match="no config"):
        outlines("org/name", client=hub)


def test_outlines_without_a_network(hub: MemoryHub) -> None:
    hub.online = False
    assert [found.name for found in outlines("ernie", client=hub)] == ["ernie:0.3b", "ernie:21b", "ernie:300b"]
    assert len(outlines("", client=hub)) > 20
    assert outlines("Ernie:0.3B", client=hub)[0].config.layers == 18
    assert outlines("spark", client=hub)[0].tied is not None
    assert hub.asked == []


def test_not_in_the_cache(client: HuggingFace) -> None:
    with pytest.raises(ModelNotFoundError, match="start once without --offline"):
        fetch("org/name", recipe=BF16, client=client, offline=True)


def test_nobody_answers(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="the hub cannot be reached"):
        fetch("org/name", recipe=BF16, client=HuggingFace(endpoint="http://127.0.0.1:9", cache=tmp_path))


def test_a_connection_that_breaks(port: str, tmp_path: Path) -> None:
    text = explain(ConnectionResetError("reset\nby peer"), "org/name", "main", "model-1.safetensors", offline=False)
    assert text.startswith("the connection broke while fetching model-1.safetensors of org/name")
    assert "\n" not in text


def test_a_full_or_forbidden_cache(port: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelNotFoundError, match="qrun chat spark"):
        fetch("org/name", recipe=BF16, client=HuggingFace(endpoint=port, cache=tmp_path / "file"))
    if shutil.which("true") and Path("/dev/full").exists():
        with pytest.raises(OSError, match="No space left") as full, Path("/dev/full").open("w") as file:
            file.write("x" * 100_000)
        text = explain(full.value, "org/name", "main", "model.safetensors", offline=False)
        assert "the disk is full" in text
