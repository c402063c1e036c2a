"""Whole models on the CUDA backend: transformers' logits, the CPU backend's tokens, and the launches of a step."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_doubles import DEVICE, SLACK, card, difference
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
pytest.importorskip("transformers")

from oracle import logits, make

import qrun
import qrun.api
from qrun.backends.cuda import CUDABackend
from qrun.batch import Batch, Request
from qrun.cache import KVCache
from qrun.engine import Engine
from qrun.sampler import Sampling

IDS = [(7 * i * i + 3 * i + 1) % 97 for i in range(20)]


@pytest.fixture
def on_card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`qrun.load` takes the CUDA backend, on the GPU or interpreted."""
    monkeypatch.setattr(qrun.api, "pick", lambda *names, **options: CUDABackend(card()))
    yield


def load(path: Path | None, *recipe: str, context: int = 64) -> Engine:
    return qrun.load(path, *recipe, context=context, cache=False)


@pytest.mark.parametrize(
    "case", ["ernie", "ernie-odd", "ernie-untied-bias", "ernie-moe", "ernie-moe-no-shared", "mistral-window", "qwen3"]
)
def test_logits_are_transformers(on_card: None, tmp_path: Path, case: str) -> None:
    """Prefill in one forward, then the last tokens one by one."""
    model = make(case, tmp_path, torch.bfloat16)
    engine = load(tmp_path, "bf16", "fp32")
    wanted = logits(model, IDS).to(DEVICE)
    assert difference(engine.logits(IDS), wanted) < 4e-3 * SLACK
    with torch.inference_mode():
        engine.reset()
        found = list(engine.prefill(IDS[:17]))[-1]
        for i in range(17, 20):
            assert difference(found[0], wanted[i - 1]) < 4e-3 * SLACK
            found = engine.step(torch.tensor([IDS[i]], device=DEVICE))
    assert difference(found[0], wanted[-1]) < 4e-3 * SLACK


@pytest.mark.parametrize("recipe", [("wint4", "int4"), ("wint8", "int8"), ("wfp8a16", "fp8"), ("nf4", "bf16")])
def test_spark_says_what_it_says_on_the_cpu(on_card: None, recipe: tuple[str, str]) -> None:
    """The whole decode step: the tokens of the CPU's own kernels, which share no line with these."""
    engine = load(None, *recipe, context=128)
    prompt = [(11 * i * i + 5) % 2000 for i in range(12)]
    found = list(engine.generate(prompt, max_tokens=4, temperature=0, loop_guard=False))
    assert all(not binding.fallback for binding in engine.card.bindings)
    from qrun.backends.cpu import CPUBackend

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qrun.api, "pick", lambda *names, **options: CPUBackend(threads=2))
        cpu = load(None, *recipe, context=128)
    if DEVICE == "cpu":  # in BF16 another token may be the likeliest
        assert found == list(cpu.generate(prompt, max_tokens=4, temperature=0, loop_guard=False))
    assert difference(engine.logits(prompt).cpu(), cpu.logits(prompt)) < 0.04 * SLACK


def test_sampling_on_the_device(on_card: None, tmp_path: Path) -> None:
    make("ernie", tmp_path, num_hidden_layers=1)
    engine = load(tmp_path, "bf16", "fp32")
    settings: dict[str, Any] = {"max_tokens": 5, "temperature": 1.0, "top_k": 20, "seed": 3, "loop_guard": False}
    first = list(engine.generate(IDS[:5], **settings))
    assert list(engine.generate(IDS[:5], **settings)) == first
    assert list(engine.generate(IDS[:5], **(settings | {"seed": 4}))) != first
    # A reply that is stopped has begun a step ahead: the cache forgets it.
    stopped = engine.generate(IDS[:5], **settings)
    next(stopped)
    stopped.close()
    assert engine.cache.length == len(engine.ids) == 5


@pytest.mark.parametrize(
    ("case", "recipe", "kv"), [("ernie-odd", "wint4", "int8"), ("ernie-moe-no-shared", "wint8", "fp32")]
)
def test_prompts_run_together(on_card: None, tmp_path: Path, case: str, recipe: str, kv: str) -> None:
    """The logits of a step of three conversations are those of each alone; and a batch comes to its ends."""
    make(case, tmp_path, torch.bfloat16, num_hidden_layers=1)
    engine = load(tmp_path, recipe, kv)
    prompts = [IDS[3:4], IDS[:9], IDS[:9] + IDS[11:14]]
    wanted: list[torch.Tensor] = []
    beside: list[KVCache] = []
    for ids in prompts:
        engine.logits(ids)
        wanted.append(engine.step(torch.tensor([5], device=DEVICE)).clone())
        engine.reset()
        other = engine.beside(kv)
        other.logits(ids)
        beside.append(other.cache)
    with torch.inference_mode():
        found = engine.decoder.forward_many(torch.tensor([5, 5, 5], device=DEVICE), beside)
    assert difference(found, torch.cat(wanted)) < 4e-3 * SLACK
    settings: dict[str, Any] = {"max_tokens": 2, "loop_guard": False, "sampling": Sampling(top_k=20, seed=3)}
    streams = list(Batch(engine, [Request(ids=ids, **settings) for ids in prompts], width=2).streams)
    made = [list(stream) for stream in streams]
    assert [len(ids) for ids in made] == [2, 2, 2]
    assert [stream.stats.reused_tokens for stream in streams] == [0, 0, 9]
    if DEVICE == "cpu":  # in BF16 another token may win
        assert made == [list(engine.generate(ids, **settings)) for ids in prompts]


class Counted(TorchDispatchMode):
    """Counts the launches that a step takes: Triton's, and torch's operators that are not views."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.triton: Counter[str] = Counter()
        self.torch: Counter[str] = Counter()
        from triton.runtime.interpreter import GridExecutor

        run = GridExecutor.__call__

        def counted(executor: Any, *arguments: Any, **named: Any) -> Any:
            self.triton[executor.fn.__name__] += 1
            with torch._C._DisableTorchDispatch():
                return run(executor, *arguments, **named)

        monkeypatch.setattr(GridExecutor, "__call__", counted)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns):
            self.torch[function.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(DEVICE != "cpu", reason="counted under the interpreter")
@pytest.mark.parametrize(
    ("case", "recipe", "launches"),
    [
        ("ernie", "wint4", 6),
        ("qwen3", "wint4", 6),
        ("ernie-moe", "wint4", 7),
        ("ernie-moe", "mix:experts=w4,dense=w8", 9),
    ],
)
def test_launches_a_layer(on_card: None, tmp_path: Path, case: str, recipe: str, launches: int) -> None:
    """Between models of two and of three layers lies what one layer takes."""
    # Whole groups, so that the shared experts fold in; heads of 32, whose sums attention leaves itself.
    sizes = {"moe_intermediate_size": 64, "hidden_size": 128} if case == "ernie-moe" else {}
    counts: list[Counted] = []
    for layers in (2, 3):
        path = tmp_path / str(layers)
        make(case, path, torch.bfloat16, num_hidden_layers=layers, **sizes)
        engine = load(path, recipe)
        with torch.inference_mode():
            engine.step(torch.tensor([5]))
            with pytest.MonkeyPatch.context() as patch, Counted(patch) as counted:
                engine.step(torch.tensor([7]))
        counts.append(counted)
    assert counts[1].triton.total() - counts[0].triton.total() == launches
    assert counts[1].torch == counts[0].torch, "a layer runs nothing but its own kernels"
