"""Plans: what their rules mean, that nothing is lost in a file, and what is refused by name."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from qrun.checkpoint import read_config
from qrun.errors import QrunError, RecipeError, UsageError
from qrun.models import describe
from qrun.models.config import ModelConfig
from qrun.models.plan import plan as weights_of
from qrun.quantize.fastdeploy import plan_of, read_plan
from qrun.quantize.plan import Plan
from qrun.quantize.rounding import written_format
from qrun.quantize.units import units
from qrun.recipe import BF16, Recipe, WeightScheme

SPARK = describe(read_config(Path(__file__).parents[1] / "qrun" / "spark"))
DENSE = describe(
    {
        "model_type": "qwen3", "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 12, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 131,
        "max_position_embeddings": 512, "head_dim": 16, "tie_word_embeddings": False,
    }
)  # fmt: skip
MODELS = [(SPARK, True), (DENSE, False)]


def scheme(term: str) -> WeightScheme:
    return Recipe.parse(f"mix:dense={term}").dense


def spark_plan(tmp_path: Path, rules: str, *, more: str = "") -> Plan:
    """A plan of spark from the text of its rules."""
    return Plan.read(spark_file(tmp_path, f"{more}\nrules = [{rules}]"), SPARK, tied=True)


def spark_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "plan.toml"
    facts = 'label = "spark"\nfamily = "ernie4_5_moe"\nlayers = 4\nhidden = 256\nexperts = 10\ntied = true\n'
    path.write_text(f"{text}\n[model]\n{facts}")
    return path


def test_units_are_blocks_head_and_embedding() -> None:
    names = [unit.name for unit in units(SPARK, tied=True)]
    assert names[:6] == [
        "lm_head", "layers.0.attention", "layers.0.mlp", "layers.1.attention", "layers.1.experts",
        "layers.1.shared_experts",
    ]  # fmt: skip
    assert len(names) == 1 + 2 + 3 * 3
    found = units(DENSE, tied=False)
    assert [unit.name for unit in found][:1] + [unit.name for unit in found][-1:] == ["embedding", "lm_head"]
    assert sum(unit.numbers for unit in found) == 2 * 131 * 64 + 12 * (64 * 64 * 2 + 2 * 32 * 64 + 3 * 96 * 64)
    experts = next(unit for unit in units(SPARK, tied=True) if unit.kind == "experts")
    assert len(list(experts.modules())) == 30


@pytest.mark.parametrize(("config", "tied"), MODELS, ids=["spark", "dense"])
def test_uniform_is_the_recipe(config: ModelConfig, tied: bool) -> None:
    recipe = Recipe.parse("mix:w4g32sym,experts=w2,lm_head=w8,act=8,kv=k8v4")
    plan = Plan.uniform(config, recipe, tied=tied)
    size = numbers = 0
    for weight in weights_of(config, tied=tied):
        if weight.role != "kept":
            form = written_format(recipe.schemes()[weight.role], weight.shape[-1])
            assert plan.scheme(weight) == recipe.schemes()[weight.role]
            count = 1
            for dimension in weight.shape:
                count *= dimension
            size += round(form.bits_per_weight(weight.shape) * count / 8)
            numbers += count
    assert (plan.activations, plan.k, plan.v, plan.kv) == ("int8", "int8", "int4", "k8v4")
    assert plan.nbytes == size
    assert plan.bits_per_weight == pytest.approx(8 * size / numbers)


@pytest.mark.parametrize(("config", "tied"), MODELS, ids=["spark", "dense"])
def test_a_file_loses_nothing(config: ModelConfig, tied: bool, tmp_path: Path) -> None:
    terms = ["2", "2g128", "3g32sym", "4", "4@channel", "8", "8g64", "fp8", "nf4", "mxfp4", "16", "32"]
    rng = random.Random(5)
    path = tmp_path / "plan.toml"
    for i in range(20):
        few = rng.sample(terms, 1 + i % 4)
        schemes: dict[str, WeightScheme] = {}
        for unit in units(config, tied=tied):
            for weight in unit.weights:  # second matrices differ from the first now and then
                chosen = scheme(rng.choice(few))
                for part in weight.parts:
                    schemes |= {source.name.removesuffix(".weight"): chosen for source in part}
        plan = Plan(
            label='a "b" \\ \x7f ü \n', config=config, tied=tied, schemes=schemes,
            activations=rng.choice(["16", "int8", "fp8"]), k="int8", v=rng.choice(["int8", "int4", "bf16"]),
        )  # fmt: skip
        plan.write(path)
        assert Plan.read(path, config, tied=tied) == plan
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_short(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    Plan.uniform(SPARK, Recipe.parse("wint4"), tied=True).write(path)
    rules = [line for line in path.read_text().splitlines() if line.startswith("  { ")]
    assert len(rules) == 5  # one a kind
    plan = Plan.uniform(DENSE, Recipe.parse("wint4"), tied=False)
    changed = {m: scheme("8") if "mlp" in m and m.split(".")[2] in "02349" else s for m, s in plan.schemes.items()}
    replace(plan, schemes=changed).write(path)
    assert '{ weights = "mlp", layers = "0, 2-4, 9", scheme = "8" }' in path.read_text()


def test_the_last_rule_counts(tmp_path: Path) -> None:
    plan = spark_plan(
        tmp_path,
        '{ weights = "down_proj", scheme = "8" }, { weights = "experts", scheme = "4" },'
        '{ weights = "experts.*.down_proj", layers = "2-3", scheme = "2" },'
        '{ weights = "model.layers.1.self_attn.o_proj", scheme = "nf4" }, { weights = "lm_head", scheme = "8" }',
        more='kv = "int8"',
    )
    at = plan.schemes
    assert at["model.layers.0.mlp.down_proj"] == scheme("8")
    assert at["model.layers.1.mlp.shared_experts.down_proj"] == scheme("8")
    assert at["model.layers.1.mlp.experts.3.down_proj"] == scheme("4")
    assert at["model.layers.2.mlp.experts.3.down_proj"] == scheme("2")
    assert at["model.layers.2.mlp.experts.3.up_proj"] == scheme("4")
    assert at["model.layers.1.self_attn.o_proj"] == scheme("nf4")
    assert at["model.layers.2.self_attn.o_proj"] == BF16  # no rule
    assert at["model.embed_tokens"] == scheme("8")  # the tied table is the head
    assert (plan.k, plan.v, plan.activations) == ("int8", "int8", "16")


@pytest.mark.parametrize(
    ("rules", "more", "message"),
    [
        ('{ weights = "mlp" }', "", "rules[0].scheme is missing"),
        ('{ scheme = "4" }', "", "rules[0].weights is missing"),
        ('{ weights = "mlp", scheme = 4 }', "", "rules[0].scheme is 4: it must be a text"),
        ('{ weights = "mlp", scheme = "4", bits = 4 }', "", "rules[0].bits is unknown; possible: weights, layers"),
        ('{ weights = "mpl", scheme = "4" }', "", "rules[0]: 'mpl' matches no weight"),
        ('{ weights = "lm_head", layers = "0", scheme = "4" }', "", "rules[0]: 'lm_head' matches no weight"),
        ('{ weights = "mlp", layers = "0-9", scheme = "4" }', "", "rules[0].layers is '0-9', but the model's layers"),
        ('{ weights = "mlp", layers = "3-0", scheme = "4" }', "", "rules[0].layers is '3-0'"),
        ('{ weights = "mlp", layers = [0], scheme = "4" }', "", "rules[0].layers is [0]: write layers as"),
        ('{ weights = "mlp", scheme = "4a8" }', "", "rules[0].scheme: weight type '4a8'"),
        ('{ weights = "mlp", scheme = "4,experts=2" }', "", "rules[0].scheme '4,experts=2' is no scheme"),
        ('{ weights = "mlp", scheme = "9" }', "", "9-bit weights"),
        ('{ weights = "q_proj", scheme = "4" }', "", "self_attn.k_proj is 16, but they are one matrix here"),
        ('{ weights = "experts.3.up_proj", scheme = "4" }', "", "mlp.experts.3.up_proj is 4, but they are one matrix"),
        ('"mlp"', "", "rules[0] must be a table"),
        ("", "quants = 3", "quants is unknown; possible: activations, kv, rules, model"),
        ("", 'kv = "int3"', "kv 'int3' is unknown"),
        ("", "kv = 8", "kv is 8: it must be a text"),
        ("", 'activations = "8,kv=4"', "activations is '8,kv=4': write 16, int8 or fp8"),
        ("", 'activations = "7"', "is unknown; possible: 16, 32, 8, fp8"),
        ("", "kv = ", "is no plan: Invalid value"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(rules: str, more: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        spark_plan(tmp_path, rules, more=more)
    assert message in str(caught.value)
    assert str(tmp_path / "plan.toml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_of_another_model(tmp_path: Path) -> None:
    path = spark_file(tmp_path, "rules = []")
    with pytest.raises(UsageError, match=r"model\.family is 'ernie4_5_moe', but this model's is 'qwen3'.*'spark'"):
        Plan.read(path, DENSE, tied=False)
    with pytest.raises(UsageError, match=r"model\.tied is True, but this model's is False"):
        Plan.read(path, SPARK, tied=False)
    path.write_text(path.read_text().replace("layers = 4", "layers = 4.0"))
    with pytest.raises(UsageError, match=r"model\.layers is 4\.0"):
        Plan.read(path, SPARK, tied=True)
    path.write_text(path.read_text() + "width = 3\n")
    with pytest.raises(UsageError, match=r"model\.width is unknown"):
        Plan.read(path, SPARK, tied=True)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read the plan .*No such file"):
        Plan.read(tmp_path / "none.toml", SPARK, tied=True)
    long = tmp_path / "long.toml"
    long.write_text("#" * (1 << 20) + "\n")
    with pytest.raises(UsageError, match="has more than 1048576 bytes"):
        Plan.read(long, SPARK, tied=True)
    nested = tmp_path / "nested.toml"
    nested.write_text("rules = " + "[" * 100_000)
    with pytest.raises(UsageError, match="is no plan"):
        Plan.read(nested, SPARK, tied=True)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="is no plan"):
        Plan.read(binary, SPARK, tied=True)
    plan = Plan.uniform(SPARK, Recipe.parse("wint4"), tied=True)
    with pytest.raises(UsageError, match="cannot write the plan"):
        plan.write(tmp_path / "missing" / "plan.toml")
    (tmp_path / "taken").mkdir()
    with pytest.raises(UsageError, match="cannot write the plan"):
        plan.write(tmp_path / "taken")
    assert not list(tmp_path.glob(".*"))


MIX = {"quantization": "mix_quant", "dense_quant_type": "wint8", "moe_quant_type": "wint4"}
W4W2 = {
    "quantization": "wint2", "dense_quant_type": "wint8", "moe_quant_type": "w4w2",
    "moe_quant_config": {
        "moe_w4_quant_config": {
            "quant_type": "wint4", "quant_granularity": "per_channel", "quant_start_layer": 0, "quant_end_layer": 1,
        },
        "moe_w2_quant_config": {
            "quant_type": "wint2", "quant_granularity": "pp_acc", "quant_group_size": 128, "quant_start_layer": 2,
            "quant_end_layer": 3,
        },
    },
}  # fmt: skip


def fastdeploy(value: dict[str, object]) -> Plan:
    return plan_of(value, SPARK, tied=True, where="config.json")


def kinds(plan: Plan) -> dict[str, str]:
    """Unit -> the term of its scheme."""
    return {unit.name: plan.scheme(unit.weights[0]).term for unit in units(plan.config, tied=plan.tied)}


def test_fastdeploys_mix() -> None:
    plan = fastdeploy(MIX | {"kv_cache_quant_type": "int8", "is_permuted": True})
    found = kinds(plan)
    assert (found["lm_head"], found["layers.0.mlp"], found["layers.1.shared_experts"]) == ("16", "8", "8")
    assert (found["layers.0.attention"], found["layers.3.experts"]) == ("8", "4@channel")
    assert (plan.activations, plan.kv) == ("16", "int8")
    assert fastdeploy({"quantization": "wint4"}).schemes == plan.schemes  # as theirs does on ERNIE


def test_fastdeploys_activations() -> None:
    both = {"quantization": "mix_quant", "dense_quant_type": "w8a8", "moe_quant_type": "w4a8"}
    assert fastdeploy(both).activations == "int8"
    assert fastdeploy(MIX | {"moe_quant_type": "w4a8"}).activations == "16"  # dense layers have 16 there
    fp8 = fastdeploy({"quantization": "block_wise_fp8", "kv_cache_quant_type": "float8_e4m3fn"})
    assert (fp8.activations, fp8.kv, kinds(fp8)["layers.1.experts"]) == ("fp8", "fp8", "fp8")
    dense = plan_of(MIX | {"moe_quant_type": "w4a8", "dense_quant_type": "w8a8"}, DENSE, tied=False, where="x")
    assert dense.activations == "int8"


def test_fastdeploys_two_bits() -> None:
    found = kinds(fastdeploy(W4W2))
    experts = [found[f"layers.{i}.experts"] for i in (1, 2, 3)]
    assert experts == ["4@channel", "2g128", "2g128"]
    assert found["layers.2.attention"] == "8"


def test_fastdeploys_exceptions() -> None:
    plan = fastdeploy(MIX | {"modules_to_not_convert": ["*.layers.0.*", "*.mlp.experts.*"]})
    found = kinds(plan)
    assert (found["layers.0.attention"], found["layers.2.experts"], found["layers.2.attention"]) == ("16", "16", "8")
    with pytest.raises(RecipeError, match=r"^config\.json: .*are one matrix here"):
        fastdeploy(MIX | {"modules_to_not_convert": ["*.q_proj"]})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "quantization is missing"),
        ({"quantization": 3}, "quantization is 3"),
        ({"quantization": "ccq"}, "quantization 'ccq' is unknown; possible: wint8"),
        (MIX | {"dense_quant_type": "w3"}, "dense_quant_type 'w3' is unknown; possible: wint8"),
        ({"quantization": "mix_quant", "dense_quant_type": "wint8"}, "moe_quant_type is missing"),
        (MIX | {"kv_cache_quant_type": "int2"}, "kv_cache_quant_type 'int2' is unknown; possible: int8"),
        (MIX | {"kv_cache_quant_type": []}, "kv_cache_quant_type [] is unknown"),
        (MIX | {"bits": 3}, "bits is unknown; possible: quantization"),
        (MIX | {"modules_to_not_convert": "mlp"}, "modules_to_not_convert must be a list of texts"),
        (W4W2 | {"moe_quant_config": []}, "moe_quant_config must hold objects"),
        (W4W2 | {"moe_quant_config": {"moe_w4_quant_config": {"quant_end_layer": True}}}, "quant_end_layer is True"),
    ],
)
def test_fastdeploys_mistakes(value: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        fastdeploy(value)
    assert message in str(caught.value)
    assert str(caught.value).startswith("config.json: ")


def test_fastdeploys_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for content in (MIX, {"hidden_size": 256, "quantization_config": MIX}):
        path.write_text(json.dumps(content))
        assert read_plan(path, SPARK, tied=True) == fastdeploy(MIX)
    for text in ("[]", "{", "[" * 100_000, json.dumps({"quantization_config": 3})):
        path.write_text(text)
        with pytest.raises(QrunError, match=r"config\.json"):
            read_plan(path, SPARK, tied=True)
    with pytest.raises(UsageError, match="cannot read"):
        read_plan(tmp_path / "none.json", SPARK, tied=True)
