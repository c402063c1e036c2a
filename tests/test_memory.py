"""The forecast against published sizes and against tensors that were really made; what a container has free, or a GPU;
what is left when memory runs out."""

import gc
import math
import platform
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from oracle import make

import qrun.api
import qrun.engine
from qrun import resident
from qrun.aliases import ALIASES, family, known_names
from qrun.backends.base import Backend, Feed, FfnWeights
from qrun.backends.cuda import CUDABackend
from qrun.backends.cuda_matrix import pack, pack_stack, packs
from qrun.backends.cuda_space import EXPANDED
from qrun.engine import Engine
from qrun.errors import DoesNotFitError, ModelNotFoundError
from qrun.formats import format_of, kv_format
from qrun.formats.widened import readable
from qrun.free import in_use, release
from qrun.memory import (
    GPU_CHUNK,
    GPU_EXPANDED,
    GPU_OVERHEAD,
    KERNELS,
    OVERHEAD,
    WORK,
    available,
    check_fits,
    forecast,
    human,
    packed_bytes,
)
from qrun.models import describe
from qrun.models.plan import plan
from qrun.names import resolve
from qrun.recipe import Recipe

BF16 = Recipe.parse("bf16")
ERNIE_21B = describe(ALIASES["ernie:21b"].config)
TINY = describe(
    {
        "model_type": "ernie4_5_moe", "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3,
        "num_attention_heads": 3, "num_key_value_heads": 1, "vocab_size": 77, "max_position_embeddings": 512,
        "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 80, "moe_num_shared_experts": 1,
        "tie_word_embeddings": False,
    }
)  # fmt: skip

PUBLISHED = {  # billions of parameters, as the model cards count them
    "ernie:0.3b": 0.361, "ernie:21b": 21.83, "ernie:300b": 299.5, "llama3.2:1b": 1.236, "llama3.2:3b": 3.213,
    "llama3.1:8b": 8.030, "llama3.3:70b": 70.55, "mistral:7b": 7.248, "qwen2.5:0.5b": 0.494, "qwen2.5:1.5b": 1.544,
    "qwen2.5:3b": 3.086, "qwen2.5:7b": 7.616, "qwen2.5:14b": 14.77, "qwen2.5:32b": 32.76, "qwen2.5:72b": 72.71,
    "qwen3:0.6b": 0.596, "qwen3:1.7b": 1.721, "qwen3:4b": 4.022, "qwen3:8b": 8.191, "qwen3:14b": 14.77,
    "qwen3:32b": 32.76, "qwen3:30b-a3b": 30.53, "qwen3:235b-a22b": 235.1,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    assert forecast(describe(ALIASES[name].config), BF16).parameters / 1e9 == pytest.approx(PUBLISHED[name], rel=1e-3)


def test_ernie_as_published() -> None:
    need = forecast(ERNIE_21B, BF16, 1000)
    assert need.active / 1e9 == pytest.approx(3.35, rel=2e-3)
    assert need.kv_per_token == 56 << 10
    assert need.kv == 1000 * need.kv_per_token


@pytest.mark.parametrize(
    "quant", ["bf16", "fp32", "wint8", "wint4", "W2", "W4@channel", "fp8", "nf4", "mxfp4", "nvfp4"]
)
def test_weights_are_exact(quant: str) -> None:
    recipe = Recipe.parse(quant)
    made = dict.fromkeys((*recipe.schemes(), "kept"), 0)
    for weight in plan(TINY, tied=False):
        for role, scheme in recipe.schemes().items():
            if role == weight.role:
                made[role] += readable(format_of(scheme).quantize(torch.randn(weight.shape).bfloat16())).nbytes
        if weight.role == "kept":
            made["kept"] += torch.empty(weight.shape).nbytes
    need = forecast(TINY, recipe)
    assert need.roles == made
    assert need.weights == sum(made.values())


@pytest.mark.parametrize(("k", "v"), [("bf16", "bf16"), ("int8", "int4"), ("fp8", "fp32")])
def test_cache_is_exact(k: str, v: str) -> None:
    need = forecast(TINY, Recipe.parse("mix:w16,k=" + k + ",v=" + v))
    one = torch.randn(TINY.kv_heads, TINY.head_dim)
    made = [part for name in (k, v) for part in kv_format(name).encode(one) if part is not None]
    assert need.kv_per_token == TINY.layers * sum(part.nbytes for part in made)


def test_peak_is_the_stated_bound() -> None:
    need = forecast(ERNIE_21B, Recipe.parse("wint4"), 16)
    assert need.largest == 2 * 103424 * 2560
    assert need.peak_load == need.weights + 2 * need.largest + OVERHEAD
    assert forecast(ERNIE_21B, BF16, tied=False).weights - forecast(ERNIE_21B, BF16, tied=True).weights == need.largest


def test_largest_context_is_the_largest() -> None:
    recipe = Recipe.parse("wint4")
    memory = 14_000_000_000
    context = forecast(ERNIE_21B, recipe).room(memory, ERNIE_21B.positions)
    assert context % 256 == 0
    assert forecast(ERNIE_21B, recipe, context).needed <= memory < forecast(ERNIE_21B, recipe, context + 256).needed
    assert forecast(ERNIE_21B, recipe, 77).room(1 << 50, ERNIE_21B.positions) == ERNIE_21B.positions
    assert forecast(ERNIE_21B, recipe).room(1 << 30, ERNIE_21B.positions) == 0


@pytest.mark.parametrize(
    ("quant", "context", "memory", "advice"),
    [
        ("bf16", 4096, 24e9, "use --quant wint8 (23.5 GB)"),
        ("bf16", 4096, 14e9, "use --quant wint4 (13.7 GB)"),
        ("wint4", 131072, 14e9, "use --ctx-size 23040"),
        ("wint4", 131072, 18e9, "or --kv int8 (16.7 GB)"),
        ("bf16", 131072, 14e9, "use --quant wint4 --ctx-size 23040"),
        ("bf16", 4096, 8e9, "choose a smaller model, or talk to the embedded one: qrun chat spark"),
    ],
)
def test_what_would_fit_is_said(quant: str, context: int, memory: float, advice: str) -> None:
    with pytest.raises(DoesNotFitError) as caught:
        check_fits(ERNIE_21B, Recipe.parse(quant), context=context, memory=int(memory), name="ernie:21b")
    text = str(caught.value)
    assert advice in text
    assert f"{memory / 1e9:.1f} GB are free" in text
    assert "\n" not in text


def test_what_fits_passes() -> None:
    need = check_fits(ERNIE_21B, Recipe.parse("wint4"), context=4096, memory=14_000_000_000, name="ernie:21b")
    assert need.needed <= 14_000_000_000


@pytest.mark.parametrize("name", ["ernie:0.3b", "ernie:21b", "llama3.1:8b"])
def test_what_a_load_is_expected_to_take(name: str) -> None:
    config, base = describe(ALIASES[name].config), 340_000_000
    plain, quantized = (forecast(config, Recipe.parse(quant)) for quant in ("bf16", "wint4"))
    for need in (plain, quantized):
        assert need.expected_load(base, 2, kept=True) == base + KERNELS + need.weights
        assert base + KERNELS + need.weights < need.expected_load(base, 2) <= need.peak_load
    assert plain.expected_load(base, 64) == plain.expected_load(base, 1), "nothing is computed"
    assert quantized.expected_load(base, 4) == quantized.expected_load(base, 3) + WORK


def test_few_threads_work_on_little() -> None:
    need = forecast(TINY, Recipe.parse("wint4"))
    assert need.expected_load(0, 64) == need.expected_load(0, 1)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what was freed")
def test_what_was_freed_goes_back() -> None:
    parts = [torch.ones(1 << 14) for _ in range(2000)]
    full = in_use()
    del parts[:-1]  # the last one keeps the heap from shrinking
    release()
    assert in_use() < full - 100_000_000


def test_human() -> None:
    sizes = (0, 640_000_000, 999_600_000, 12_900_000_000, 141_000_000_000)
    assert [human(n) for n in sizes] == ["0 MB", "640 MB", "1.0 GB", "12.9 GB", "141 GB"]


@pytest.mark.parametrize(
    "quant",
    [
        "bf16", "fp32", "wint8", "w8g32", "wint4", "W2", "W3", "W4@channel", "W5", "W8g64asym", "fp8", "nf4", "mxfp4",
        "nvfp4",
    ],
)  # fmt: skip
def test_a_gpus_weights_are_exact(quant: str) -> None:
    """What its kernels read was really made, all but a codebook's table, for every weight that they have a kind for."""
    recipe = Recipe.parse(quant)
    some = 0
    for weight in plan(TINY, tied=False):
        if weight.role == "kept":
            continue
        form = format_of(recipe.schemes()[weight.role])
        made = form.quantize(torch.randn(weight.shape).bfloat16())
        paired = weight.name.endswith("gate_up")
        if not packs(made, paired=paired):
            continue
        if len(weight.shape) == 3:
            packed = pack_stack([made[e] for e in range(weight.shape[0])], torch.bfloat16, paired=paired)
        else:
            packed = pack(made, torch.bfloat16, paired=paired)
        some += 1
        table = 0 if packed.table is None else packed.table.nbytes
        assert packed_bytes(form, weight.shape) == packed.nbytes - table, weight.name
    assert some >= 5 or quant == "fp32"


def test_what_a_gpu_needs_beside() -> None:
    recipe = Recipe.parse("wint4")
    need, host = (forecast(ERNIE_21B, recipe, 4096, device=device) for device in ("cuda", "cpu"))
    assert host.weights <= need.weights < 1.02 * host.weights
    assert need.kv == host.kv
    assert need.peak_load == need.weights + 3 * need.largest + GPU_OVERHEAD
    assert need.expanded_per_token == 2 * ERNIE_21B.kv_heads * ERNIE_21B.head_dim * 2
    beside = need.total - need.weights - need.kv - 4096 * need.expanded_per_token
    assert GPU_OVERHEAD + GPU_EXPANDED < beside < GPU_OVERHEAD + GPU_EXPANDED + 1e9
    assert GPU_EXPANDED == 2 * EXPANDED and CUDABackend.chunk == GPU_CHUNK
    # Experts in 16 bits are copied a layer at a time, which is more than any tensor of theirs.
    layer = 64 * 3 * 2560 * 1536 * 2
    assert forecast(ERNIE_21B, BF16, device="cuda").loading > layer + need.largest + GPU_OVERHEAD


def test_a_window_bounds_what_is_expanded() -> None:
    config = describe(
        {
            "model_type": "mistral", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 4096,
            "sliding_window": 128, "tie_word_embeddings": False,
        }
    )  # fmt: skip
    need = forecast(config, BF16, device="cuda")
    assert config.window == 128 and need.expanded_per_token == 0


def test_largest_context_on_a_gpu_is_the_largest() -> None:
    recipe = Recipe.parse("wint4")
    context = forecast(ERNIE_21B, recipe, device="cuda").room(16_000_000_000, ERNIE_21B.positions)
    assert 0 < context < ERNIE_21B.positions
    assert forecast(ERNIE_21B, recipe, context, device="cuda").needed <= 16_000_000_000
    assert forecast(ERNIE_21B, recipe, context + 256, device="cuda").needed > 16_000_000_000
    assert forecast(ERNIE_21B, recipe, device="cuda").room(1 << 30, ERNIE_21B.positions) == 0


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """torch.cuda's answers of a card; the test may change them."""
    held = {"free": 3_100_000_000, "reserved": 700_000_000, "allocated": 700_000_000}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (held["free"], 141_000_000_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: held["reserved"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held["allocated"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    return held


def test_what_is_free_of_a_gpu(h200: dict[str, int]) -> None:
    assert available("cuda") == 3_100_000_000
    h200["allocated"] = 0
    assert available("cuda") == 3_800_000_000, "what torch holds without using it is free too"


@pytest.mark.parametrize(
    ("quant", "host", "says"),
    [
        ("wint4", 1 << 40, "3.1 GB are free of 141 GB; other programs hold 137 GB: use --device cpu"),
        ("wint4", 1 << 30, "3.1 GB are free of 141 GB; other programs hold 137 GB: choose a smaller model"),
    ],
)
def test_a_full_gpu_is_described(
    h200: dict[str, int], monkeypatch: pytest.MonkeyPatch, quant: str, host: int, says: str
) -> None:
    monkeypatch.setattr("qrun.memory.available", lambda: host)
    with pytest.raises(DoesNotFitError) as caught:
        check_fits(ERNIE_21B, Recipe.parse(quant), context=4096, memory=3_100_000_000, name="ernie:21b", device="cuda")
    text = str(caught.value)
    assert text.startswith("ernie:21b at wint4 with a context of 4096 needs 14.")
    assert f" on the NVIDIA H200, {says}" in text
    assert "\n" not in text


def test_an_empty_gpu_that_is_too_small(h200: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    h200["free"] = 139_800_000_000
    monkeypatch.setattr("qrun.memory.available", lambda: 1 << 42)
    big = describe(ALIASES["ernie:300b"].config)
    with pytest.raises(DoesNotFitError) as caught:
        check_fits(big, BF16, context=4096, memory=140_000_000_000, name="X", device="cuda")
    text = str(caught.value)
    assert "140 GB are free of 141 GB: " in text and "other programs" not in text
    assert text.endswith(("or --device cpu", "use --device cpu"))
    assert check_fits(ERNIE_21B, BF16, context=4096, memory=140_000_000_000, name="X", device="cuda").total > 40e9


@pytest.mark.parametrize(
    ("error", "place"),
    [
        (MemoryError(), "memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), "the GPU's memory"),
        (torch.AcceleratorError("CUDA error: out of memory\n"), "the GPU's memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "the GPU's memory"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "the GPU's memory"),
        (RuntimeError("shapes do not match"), None),
        (ValueError("bad"), None),
    ],
)
def test_which_errors_mean_that_memory_ran_out(error: Exception, place: str | None) -> None:
    assert resident.ran_out(error) == place
    try:
        try:
            raise error
        except Exception:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904
    except RuntimeError as outer:
        assert resident.ran_out(outer) == place


class Small(Backend):
    """Runs out of memory at the feed-forward block after ``room`` of them; remembers, weakly, what it was given."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.seen: list[weakref.ref[Any]] = []

    def ffn_block(self, eps: float, weights: FfnWeights, *, activations: str = "16") -> Feed:
        self.seen += [weakref.ref(weights.norm), weakref.ref(weights.gate_up.codes)]
        self.room -= 1
        if self.room < 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().ffn_block(eps, weights, activations=activations)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make("ernie", path, torch.bfloat16, num_hidden_layers=2)
    return path


def test_memory_runs_out_while_loading(folder: Path, h200: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it stays, even while the error is at hand; then a second attempt goes well."""
    backends = [Small(1), Small(9)]
    seen = backends[0].seen
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: h200.update(gone=all(ref() is None for ref in seen)))
    monkeypatch.setattr(qrun.api, "pick", lambda *names, **options: backends.pop(0))
    with pytest.raises(DoesNotFitError) as caught:
        qrun.api.load(folder, "wint8", context=64)
    assert caught.value.exit_code == 4
    assert str(caught.value).startswith(f"the GPU's memory ran out while loading {folder} at wint8: ")
    assert caught.value.__context__ is None
    assert len(seen) == 4 and h200["gone"], "what still lives cannot be returned"
    assert len(qrun.api.load(folder, "wint8", context=64).cached_ids) == 0


def test_what_is_no_lack_of_memory_is_raised_as_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*names: object, **options: object) -> Any:
        raise RuntimeError("something else")

    monkeypatch.setattr(qrun.api, "pick", fails)
    with pytest.raises(RuntimeError, match="something else"):
        qrun.api.load(folder, context=64)


def greedy(engine: Engine, ids: list[int], count: int = 4) -> list[int]:
    return list(engine.generate(ids, max_tokens=count, temperature=0.0, loop_guard=False))


@pytest.mark.parametrize("at", ["prefill", "step", "logits"])
def test_memory_runs_out_while_running(
    folder: Path, h200: dict[str, int], monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """One line, nothing held, and the engine goes on as if the attempt had not been."""
    monkeypatch.setattr(qrun.api, "pick", lambda *names, **options: Backend())
    engine = qrun.api.load(folder, context=64)
    ids = [(7 * i + 3) % 97 for i in range(20)]
    wanted = greedy(engine, ids)
    part = "head" if at == "logits" else "embed"
    whole: Callable[[torch.Tensor], torch.Tensor] = getattr(engine.decoder, part)
    held: list[weakref.ref[torch.Tensor]] = []

    def fails(x: torch.Tensor) -> torch.Tensor:
        y = whole(x)
        if len(x) == (1 if at == "step" else len(ids)):
            held.append(weakref.ref(y))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return y

    engine.reset()
    setattr(engine.decoder, part, fails)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: h200.update(gone=held[0]() is None))
    with pytest.raises(DoesNotFitError, match=r"^the GPU's memory ran out in a context of 64 tokens, .*--ctx-size"):
        engine.logits(ids) if at == "logits" else greedy(engine, ids)
    assert len(held) == 1 and h200["gone"]
    assert engine.cache.length == len(engine.ids) == (20 if at == "step" else 0)
    setattr(engine.decoder, part, whole)
    assert greedy(engine, ids) == wanted


def test_an_engine_goes_as_soon_as_it_is_dropped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is wanted for the next one, and a cycle would keep it until somebody collects."""
    monkeypatch.setattr(qrun.api, "pick", lambda *names, **options: Backend())
    engine = qrun.api.load(folder, context=64)
    greedy(engine, [5, 6, 7])
    cache, decoder = weakref.ref(engine.cache), weakref.ref(engine.decoder)
    gc.disable()
    try:
        del engine
        assert cache() is None and decoder() is None
    finally:
        gc.enable()


def test_peaks_of_a_gpu_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    count = {"peak": 7}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: count["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: count.update(peak=0))
    assert resident.peak("cuda") == 7
    resident.reset_peak("cuda")
    assert resident.peak("cuda") == 0 and resident.peak() > 1e6


def cgroup_v2(root: Path, proc: Path, *, limit: str) -> None:
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("0::/a/b\n")
    for group, most in ((root / "a", limit), (root / "a" / "b", "max")):
        group.mkdir(parents=True)
        (group / "memory.max").write_text(most + "\n")
        (group / "memory.current").write_text("3000\n")
        (group / "memory.stat").write_text("anon 5\ninactive_file 1000\n")


def test_control_groups_count_also_from_above(tmp_path: Path) -> None:
    cgroup_v2(tmp_path / "cg", tmp_path / "proc", limit="10000")
    assert available(cgroups=tmp_path / "cg", proc=tmp_path / "proc") == 8000


def test_no_limit_is_what_the_system_has(tmp_path: Path) -> None:
    cgroup_v2(tmp_path / "cg", tmp_path / "proc", limit="max")
    for proc in (tmp_path / "proc", tmp_path / "nothing"):
        free = available(cgroups=tmp_path / "cg", proc=proc)
        assert free == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_first_version_of_control_groups(tmp_path: Path) -> None:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text("5:cpu,memory:/job\n2:cpuset:/other\n")
    group = tmp_path / "cg" / "memory" / "job"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text("5000")
    (group / "memory.usage_in_bytes").write_text("6000")
    (group / "memory.stat").write_text("total_inactive_file 500\n")
    assert available(cgroups=tmp_path / "cg", proc=tmp_path / "proc") == 0


def test_aliases_are_consistent() -> None:
    assert set(PUBLISHED) | {"ernie:21b-thinking"} == set(ALIASES)
    for name in known_names():
        assert name in ALIASES or family(name)
    for alias in ALIASES.values():
        assert describe(alias.config).positions > 0
        assert alias.repo.count("/") == 1
        assert math.prod(len(part) for part in alias.name.split(":")) > 0


@pytest.mark.parametrize(
    ("name", "quant", "memory", "repo"),
    [
        ("ernie", "bf16", 1 << 50, "baidu/ERNIE-4.5-300B-A47B-PT"),
        ("ernie", "bf16", 60e9, "baidu/ERNIE-4.5-21B-A3B-PT"),
        ("ernie", "wint4", 16e9, "baidu/ERNIE-4.5-21B-A3B-PT"),
        ("ERNIE", "bf16", 16e9, "baidu/ERNIE-4.5-0.3B-PT"),
        ("llama3.2", "bf16", 5e9, "meta-llama/Llama-3.2-1B-Instruct"),
        ("llama", "bf16", 20e9, "meta-llama/Llama-3.1-8B-Instruct"),
        ("qwen3", "wint4", 20e9, "Qwen/Qwen3-30B-A3B"),
    ],
)
def test_a_bare_family_is_the_largest_that_fits(name: str, quant: str, memory: float, repo: str) -> None:
    named = resolve(name, Recipe.parse(quant), context=4096, memory=int(memory))[0]
    assert named.repo == repo
    assert named.note.startswith(f"{name} is ")
    assert f"{repo}), the largest that fits" in named.note


def test_the_context_counts_for_a_family() -> None:
    recipe = Recipe.parse("wint4")
    assert "21B" in resolve("ernie", recipe, context=4096, memory=14_000_000_000)[0].repo
    assert "0.3B" in resolve("ernie", recipe, context=-1, memory=14_000_000_000)[0].repo


def test_no_member_of_a_family_fits() -> None:
    with pytest.raises(DoesNotFitError, match=r"ernie:0.3b needs .* qrun chat spark"):
        resolve("ernie", BF16, context=4096, memory=1 << 20)


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("ernie:0.3B", "baidu/ERNIE-4.5-0.3B-PT", None),
        ("ernie:21b-thinking", "baidu/ERNIE-4.5-21B-A3B-Thinking", None),
        ("qwen3:4b@abc", "Qwen/Qwen3-4B", "abc"),
        ("org/name", "org/name", None),
        ("Org/na.me-1@refs/pr/3", "Org/na.me-1", "refs/pr/3"),
        ("baidu/ERNIE-4.5-0.3B-Paddle", "baidu/ERNIE-4.5-0.3B-PT", None),
        ("baidu/ERNIE-4.5-0.3B-Base", "baidu/ERNIE-4.5-0.3B-Base-PT", None),
        ("baidu/ERNIE-4.5-21B-A3B-Thinking", "baidu/ERNIE-4.5-21B-A3B-Thinking", None),
    ],
)
def test_names(text: str, repo: str, revision: str | None) -> None:
    (named,) = resolve(text, BF16, context=4096, memory=0)
    assert (named.repo, named.revision) == (repo, revision)
    assert named.label == (repo if revision is None else f"{repo}@{revision}")
    assert bool(named.note) == (repo.lower() != text.lower() and text.startswith("baidu"))


@pytest.mark.parametrize(
    ("text", "hint"),
    [("ernie:7b", "ernie:21b"), ("gpt-9", "qwen3:4b"), ("llama:9b", "llama3.2:1b"), ("a b/c", "org/name")],
)
def test_unknown_names_list_what_is_known(text: str, hint: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        resolve(text, BF16, context=4096, memory=1 << 50)
    assert hint in str(caught.value)
    assert "qrun chat spark" in str(caught.value)
