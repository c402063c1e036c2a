"""The forecast against published sizes and against tensors that were really made; what a container has free."""

import math
from pathlib import Path

import psutil
import pytest
import torch

from qrun.aliases import ALIASES, family, known_names
from qrun.errors import DoesNotFitError, ModelNotFoundError
from qrun.formats import format_of, kv_format
from qrun.memory import OVERHEAD, available, check_fits, forecast, human, largest_context
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
                made[role] += format_of(scheme).quantize(torch.randn(weight.shape).bfloat16()).nbytes
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
    context = largest_context(ERNIE_21B, recipe, memory)
    assert context % 256 == 0
    assert forecast(ERNIE_21B, recipe, context).needed <= memory < forecast(ERNIE_21B, recipe, context + 256).needed
    assert largest_context(ERNIE_21B, recipe, 1 << 50) == ERNIE_21B.positions
    assert largest_context(ERNIE_21B, recipe, 1 << 30) == 0


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


def test_human() -> None:
    assert [human(n) for n in (0, 640_000_000, 999_600_000, 12_900_000_000)] == ["0 MB", "640 MB", "1.0 GB", "12.9 GB"]


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
