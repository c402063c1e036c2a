"""Choosing schemes within a size: the knapsack, what single units cost, and plans that beat uniform ones."""

import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import make

from qrun.checkpoint import Checkpoint
from qrun.cli.main import main
from qrun.cli.quantize_plan import parse_bits
from qrun.errors import DoesNotFitError, RecipeError, UsageError
from qrun.models import describe
from qrun.quantize import knapsack
from qrun.quantize.budget import Budget, parse_schemes, plan_for_budget
from qrun.quantize.calibration import Calibration
from qrun.quantize.knapsack import Option, choose
from qrun.quantize.pipeline import Settings, quantize
from qrun.quantize.plan import Plan
from qrun.quantize.probe import Probe
from qrun.quantize.rounding import written_format
from qrun.quantize.sensitivity import ACTIVATIONS, CACHE, Notes, measure
from qrun.quantize.units import Unit, units
from qrun.recipe import BF16, Recipe, WeightScheme
from qrun.tokenizer import Tokenizer

SPARK = Path(__file__).parents[1] / "qrun" / "spark"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are slower with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def brute(things: list[list[Option]], limit: int) -> float | None:
    sums = [
        sum(option.cost for option in chosen)
        for chosen in itertools.product(*things)
        if sum(option.size for option in chosen) <= limit
    ]
    return min(sums, default=None)


def things(rng: random.Random, count: int, unit: int) -> list[list[Option]]:
    return [[Option(unit * rng.randint(1, 60), rng.random()) for _ in range(rng.randint(1, 4))] for _ in range(count)]


def test_the_knapsack_is_exact() -> None:
    rng = random.Random(3)
    for i in range(60):
        every = things(rng, 5, 1 << (i % 20))
        limit = rng.randint(5, 200) << (i % 20)
        found = choose(every, limit)
        best = brute(every, limit)
        if found is None:
            assert best is None
            continue
        chosen = [options[j] for options, j in zip(every, found, strict=True)]
        assert sum(option.size for option in chosen) <= limit
        assert sum(option.cost for option in chosen) == pytest.approx(best)


def test_the_knapsack_on_a_coarse_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "CELLS", 64)
    rng = random.Random(4)
    for _ in range(40):
        every = things(rng, 5, 1)
        smallest = sum(min(option.size for option in options) for options in every)
        limit = smallest + rng.randint(0, 150)
        found = choose(every, limit)
        best = brute(every, limit)
        assert found is not None
        assert best is not None
        chosen = [options[j] for options, j in zip(every, found, strict=True)]
        assert sum(option.size for option in chosen) <= limit
        assert sum(option.cost for option in chosen) <= best + 0.5
        left = limit - sum(option.size for option in chosen)
        for options, option in zip(every, chosen, strict=True):  # nothing that fits would still save
            assert not any(o.cost < option.cost and o.size - option.size <= left for o in options)


def model(case: str, tmp_path: Path, **changes: Any) -> tuple[Checkpoint, Any]:
    theirs = make(case, tmp_path / case, dtype=torch.bfloat16, **changes)
    return Checkpoint.open(tmp_path / case), theirs


def windows(count: int = 2, size: int = 24) -> torch.Tensor:
    return torch.randint(3, 131, (count, size), generator=torch.Generator().manual_seed(1))


def divergence(expected: torch.Tensor, found: torch.Tensor) -> float:
    p, q = torch.log_softmax(expected, -1), torch.log_softmax(found, -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("case", ["ernie-moe", "llama", "qwen3-moe"])
def test_a_units_cost_is_what_transformers_makes_of_its_rounded_weights(case: str, tmp_path: Path) -> None:
    checkpoint, theirs = model(case, tmp_path)
    config = describe(checkpoint.config)
    ids = windows()
    probe = Probe(checkpoint, config, ids)
    with torch.inference_mode():
        expected = theirs(ids).logits
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    scheme = parse_schemes(["3g32"])[0]
    for unit in units(config, tied=probe.tied):
        changed = dict(state)
        for weight in unit.weights:
            for e, part in enumerate(weight.parts):
                rounded = [
                    written_format(scheme, source.shape[1])
                    .quantize(checkpoint.weight(source.name, source.shape))
                    .dequantize()
                    for source in part
                ]
                for source, values in zip(part, rounded, strict=True):
                    put(changed, source.name, e, values)
        if probe.tied:
            changed["lm_head.weight"] = changed["model.embed_tokens.weight"]
        theirs.load_state_dict(changed)
        with torch.inference_mode():
            found = divergence(expected, theirs(ids).logits)
        assert found > 1e-6
        assert probe.unit(unit, scheme) == pytest.approx(found, rel=0.02), unit.name
        assert probe.unit(unit, BF16) == 0


def put(state: dict[str, torch.Tensor], name: str, expert: int, values: torch.Tensor) -> None:
    """Set a tensor by its name on disk in a model that stacks its experts."""
    if name in state:
        state[name] = values
        return
    layer, _, kind = name.partition(".experts.")
    stack = "gate_up_proj" if "down" not in kind else "down_proj"
    held = state[f"{layer}.experts.{stack}"] = state[f"{layer}.experts.{stack}"].clone()
    half = values.shape[0]
    rows = slice(None) if stack == "down_proj" else slice(half) if "gate" in kind else slice(half, None)
    held[expert, rows] = values


def test_units_may_be_asked_in_any_order(tmp_path: Path) -> None:
    checkpoint, _ = model("ernie-moe", tmp_path)
    config = describe(checkpoint.config)
    scheme = parse_schemes(["2"])[0]
    probe = Probe(checkpoint, config, windows())
    every = units(config, tied=True)
    forward = [probe.unit(unit, scheme) for unit in every]
    backward = [probe.unit(unit, scheme) for unit in reversed(every)]
    assert forward == backward[::-1]
    assert len(set(forward)) == len(forward)


def test_a_plan_of_one_unit_costs_what_the_unit_does(tmp_path: Path) -> None:
    checkpoint, _ = model("llama", tmp_path)
    config = describe(checkpoint.config)
    probe = Probe(checkpoint, config, windows())
    every = units(config, tied=False)
    scheme = parse_schemes(["3"])[0]
    for unit in every:
        chosen = [(each, scheme if each == unit else BF16) for each in every]
        plan = Plan.of_units(config, chosen, Recipe.parse(), tied=False)
        assert probe.plan(plan) == pytest.approx(probe.unit(unit, scheme), rel=1e-6)
    assert probe.recipe(Recipe.parse()) == 0
    acts, cache = probe.recipe(Recipe.parse("mix:act=8")), probe.recipe(Recipe.parse("bf16", "int4"))
    assert acts > 0
    assert cache > probe.recipe(Recipe.parse("bf16", "int8")) > 0
    both = replace(Plan.uniform(config, Recipe.parse("mix:act=8"), tied=False), k="int8", v="int8")
    assert probe.plan(both) not in (acts, cache, 0)


@pytest.mark.parametrize("case", ["ernie-moe", "llama"])
def test_fitted_weights_are_those_of_the_pipeline(case: str, tmp_path: Path) -> None:
    """As far as a layer and a head see the same: what comes to the first layer, and of heads the original's."""
    checkpoint, _ = model(case, tmp_path, num_hidden_layers=1)
    config = describe(checkpoint.config)
    ids = windows(8)
    plan = Plan.uniform(config, Recipe.parse("mix:w3sym,lm_head=w16,embedding=w16"), tied=case != "llama")
    calibration = Calibration("text", torch.cat([ids[2:], ids[:2]]), 6)
    settings = Settings(method="gptq", folds=False, head=False)
    report = quantize(tmp_path / case, tmp_path / "out", plan, settings, calibration=calibration)
    fitted = Probe(checkpoint, config, ids[:2], fitted=ids[2:])
    assert fitted.plan(plan) == pytest.approx(report["kl"], rel=0.02)
    assert fitted.plan(plan) != pytest.approx(Probe(checkpoint, config, ids[:2]).plan(plan), rel=0.05)
    assert fitted.recipe(Recipe.parse()) == 0
    every = units(config, tied=fitted.tied)
    for unit in (unit for unit in every if unit.kind in ("lm_head", "mlp")):
        chosen = [(each, parse_schemes(["3"])[0] if each == unit else BF16) for each in every]
        alone = Plan.of_units(config, chosen, Recipe.parse(), tied=fitted.tied)
        assert fitted.plan(alone) == pytest.approx(fitted.unit(unit, parse_schemes(["3"])[0]), rel=0.2)


@dataclass
class Counted:
    """Measures nothing, and stops after so many."""

    most: int = 1 << 30
    asked: list[tuple[str, str]] = field(default_factory=list)

    def _count(self, name: str, term: str) -> float:
        if len(self.asked) == self.most:
            raise KeyboardInterrupt
        self.asked.append((name, term))
        return len(self.asked) / 8

    def unit(self, unit: Unit, scheme: WeightScheme) -> float:
        return self._count(unit.name, scheme.term)

    def recipe(self, recipe: Recipe) -> float:
        return self._count(recipe.activations, recipe.kv)


def notes(folder: Path, ids: torch.Tensor, device: str = "cpu") -> Notes:
    return Notes.open(folder, Checkpoint.open(SPARK), ids, device)


def test_an_interrupted_measurement_goes_on(tmp_path: Path) -> None:
    folder, ids = tmp_path / "notes", windows()
    some = units(describe(Checkpoint.open(SPARK).config), tied=True)[:3]
    schemes = parse_schemes(["2", "4", "16"])

    def run(probe: Counted, open_notes: Callable[[], Notes] = lambda: notes(folder, ids)) -> Any:
        return measure(
            probe, some, schemes, activations=("16", "int8"), kvs=("bf16", "int4"), notes=open_notes()
        )  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        run(Counted(most=4))
    rest = Counted()
    found = run(rest)
    assert len(rest.asked) == 3 * 2 - 4 + 2
    assert rest.asked[-2:] == [("int8", "bf16"), ("16", "int4")]
    assert found["lm_head"] == {"16": 0.0, "2": 1 / 8, "4": 2 / 8}
    assert found[ACTIVATIONS] == {"16": 0.0, "int8": 3 / 8}
    assert found[CACHE] == {"bf16": 0.0, "int4": 4 / 8}
    again = Counted()
    assert run(again) == found
    assert not again.asked
    for other in (ids + 1, ids[:1]):
        fresh = Counted()
        run(fresh, lambda other=other: notes(folder, other))
        assert len(fresh.asked) == 8
    assert [path.suffix for path in folder.iterdir()] == [".json"] * 3


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"key": 3}', "nan", "bool", "list"])
def test_damaged_notes_are_no_harm(damage: str, tmp_path: Path) -> None:
    ids = windows()
    held = notes(tmp_path, ids)
    held.add("lm_head", "4", 0.5)
    (path,) = tmp_path.iterdir()
    value = json.loads(path.read_text())
    value["kl"]["lm_head"]["4"] = {"nan": float("nan"), "bool": True, "list": [1]}.get(damage)
    path.write_text(json.dumps(value) if damage in ("nan", "bool", "list") else damage)
    assert notes(tmp_path, ids).get("lm_head", "4") is None
    held.add("lm_head", "4", 0.5)
    assert notes(tmp_path, ids).get("lm_head", "4") == 0.5
    assert notes(tmp_path, ids, "cuda").get("lm_head", "4") is None


def test_notes_that_cannot_be_written_are_no_harm(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    held = notes(tmp_path / "file", windows())
    held.add("lm_head", "4", 0.5)
    held.add("lm_head", "8", 0.25)
    assert held.found == {"lm_head": {"4": 0.5, "8": 0.25}}
    assert held.path is None


def test_budgets_are_read() -> None:
    assert [parse_bits(text) for text in ("3.5bpw", " 4 ", "2.25 BPW", "3bits")] == [3.5, 4.0, 2.25, 3.0]
    for text in ("", "x", "0", "-3", "3.5GiB", "33", "nan"):
        with pytest.raises(UsageError, match="--budget"):
            parse_bits(text)
    assert parse_schemes(["4", "4g64", "nf4"]) == parse_schemes(["4", "nf4"])
    with pytest.raises(RecipeError, match="9-bit"):
        parse_schemes(["4", "9"])


def spark_ids(count: int, size: int) -> torch.Tensor:
    """Windows of the held-out text, from both of its ends alike."""
    text = (SPARK / "heldout.txt").read_text()
    ids = Tokenizer.from_dir(SPARK, vocab_size=2048).encode(text)
    return torch.tensor(ids[: count * size]).view(count, size)


def test_a_mix_beats_the_uniform_recipe_of_its_size() -> None:
    """On windows on which nothing was measured."""
    checkpoint = Checkpoint.open(SPARK)
    config = describe(checkpoint.config)
    ids = spark_ids(16, 64)
    judge = Probe(checkpoint, config, ids[8:])
    said: list[str] = []
    uniform = Plan.uniform(config, Recipe.parse("mix:w2,lm_head=w2"), tied=True, label="spark")
    plan, report = plan_for_budget(
        checkpoint, config, ids[:8], Budget(bits=uniform.bits_per_weight + 1e-9), label="spark",
        candidates=("2g128", "2", "4sym"), progress=lambda what, done, total: said.append(what),
    )  # fmt: skip
    assert 0.97 * uniform.nbytes < plan.nbytes <= uniform.nbytes
    assert judge.plan(plan) < 0.5 * judge.plan(uniform)
    assert report.bits == plan.bits_per_weight
    assert sum(line.nbytes for line in report.lines) == plan.nbytes
    assert 0.5 < report.measured / report.predicted < 2
    assert {line.unit.name: line.scheme for line in report.lines}["lm_head"] == plan.schemes["model.embed_tokens"]
    assert any("layers.3.experts" in what for what in said)


def test_what_must_stay_plain_counts_and_stays(tmp_path: Path) -> None:
    checkpoint, _ = model("llama", tmp_path)
    config = describe(checkpoint.config)
    options: dict[str, Any] = {"candidates": ("2", "4", "8"), "plain": ("embedding", "lm_head")}
    plan, _ = plan_for_budget(checkpoint, config, windows(), Budget(bits=7), **options)
    assert plan.schemes["lm_head"] == plan.schemes["model.embed_tokens"] == BF16
    assert 5.5 < plan.bits_per_weight <= 7
    with pytest.raises(
        UsageError, match=r"^4 bits per weight are too few: the smallest plan of these schemes has 5\.\d"
    ):
        plan_for_budget(checkpoint, config, windows(), Budget(bits=4), **options)


def test_memory_chooses_the_cache_too(tmp_path: Path) -> None:
    checkpoint, _ = model("llama", tmp_path)
    config = describe(checkpoint.config)
    options: dict[str, Any] = {
        "candidates": ("2", "4", "8", "16"), "kvs": ("bf16", "int8", "int4"), "activations": ("16", "int8"),
        "notes": tmp_path / "notes",
    }  # fmt: skip
    context = 100_000
    found: dict[str, Plan] = {}
    for name, memory in (("much", 640_000_000), ("little", 618_000_000)):
        plan, report = plan_for_budget(
            checkpoint, config, windows(), Budget(memory=memory, context=context), **options
        )  # fmt: skip
        found[name] = plan
        assert report.predicted >= report.kv[plan.kv]
        assert set(report.kv) == {"bf16", "int8", "int4"}
    assert (found["much"].kv, found["much"].bits_per_weight) == ("bf16", 16)
    assert found["much"].activations == "16"  # beside weights that cost nothing, they would
    assert found["little"].kv == "int4"
    with pytest.raises(
        DoesNotFitError, match=r"^no plan fits into 607 MB with a context of 100000.*cache in int4, needs"
    ):
        plan_for_budget(
            checkpoint, config, windows(), Budget(memory=607_000_000, context=context), **options
        )  # fmt: skip


def test_int8_activations_are_chosen_where_they_cost_little(tmp_path: Path) -> None:
    checkpoint, _ = model("llama", tmp_path)
    config = describe(checkpoint.config)
    options: dict[str, Any] = {"candidates": ("2", "8"), "activations": ("16", "int8")}
    coarse, _ = plan_for_budget(checkpoint, config, windows(), Budget(bits=3), **options)
    fine, report = plan_for_budget(checkpoint, config, windows(), Budget(bits=9), **options)
    assert (coarse.activations, fine.activations) == ("int8", "16")
    assert report.predicted < report.activations["int8"] * 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "x"], "--budget 'x' is no size"),
        (["--budget", "3", "--fit", "1GB"], "--budget and --fit each say what the weights become"),
        (["--budget", "3", "--quant", "w4"], "--quant and --budget each say what the weights become"),
        ([], "say how to quantize: --quant wint4, for example, --budget 3.5bpw, or --plan FILE"),
        (["--fit", "24XB"], "--fit '24XB' is not a size"),
        (["--fit", "1GB", "-c", "x"], "--ctx-size 'x' is not a size"),
        (["--budget", "3", "--kv", "int3"], "kv 'int3' is unknown"),
        (["--budget", "3", "--among", "4,9"], "9-bit weights"),
        (["--budget", "3", "--save-plan", "none/plan.toml"], "there is no directory for --save-plan"),
        (["--plan", "none.toml"], "there is no file none.toml"),
        (["--plan", "x.toml", "--kv", "int8"], "leave --kv out"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["quantize", "spark", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_a_chosen_plan_is_shown_saved_and_used_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    make("llama", tmp_path / "model", dtype=torch.bfloat16, vocab_size=2048)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((SPARK / name).read_bytes())
    plan = tmp_path / "plan.toml"
    common = ["quantize", str(tmp_path / "model")]
    small = ["--method", "rtn", "--tokens", "128", "--window", "32"]
    chosen = ["--budget", "11bpw", "--among", "4, 8,16", "--act", "auto", "--save-plan", str(plan)]
    assert main([*common, str(tmp_path / "one"), *small, *chosen]) == 0
    said = capsys.readouterr().err
    assert "plan for 11 bits per weight" in said
    assert "| embedding " in said
    config = describe(Checkpoint.open(tmp_path / "model").config)
    found = Plan.read(plan, config, tied=False)
    assert 9 < found.bits_per_weight <= 11
    assert found.schemes["model.embed_tokens"] == BF16  # as it is in the directory
    assert {scheme.bits for scheme in found.schemes.values()} <= {4, 8, 16}
    assert main([*common, str(tmp_path / "two"), *small, "--plan", str(plan)]) == 0
    assert "plan for" not in capsys.readouterr().err
    shards = sorted(path.name for path in (tmp_path / "one").glob("*.safetensors"))
    assert shards
    for name in shards:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
