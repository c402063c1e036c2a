"""Whole checkpoints quantized offline: what is read back, what resumes, what is refused, and that calibration pays."""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import make

import qrun
from qrun.checkpoint import Checkpoint
from qrun.cli.main import main
from qrun.errors import CheckpointError, QrunError, UsageError
from qrun.loader import is_tied
from qrun.models import describe
from qrun.quantize import layer as layers
from qrun.quantize.calibration import Calibration, calibration
from qrun.quantize.pipeline import Settings, quantize
from qrun.quantize.plan import Plan
from qrun.quantize.rounding import Method
from qrun.recipe import BF16, Recipe, WeightScheme
from qrun.tokenizer import Tokenizer

SPARK = Path(qrun.__file__).parent / "spark"
IDS = [(7 * i * i + 3 * i) % 89 for i in range(40)]


def ids(windows: int = 5, length: int = 24) -> Calibration:
    made = torch.randint(0, 90, (windows, length), generator=torch.Generator().manual_seed(3))
    return Calibration("random", made, windows - 1)


def run(
    source: Path, out: Path, quant: str, method: Method = "gptq", *, folds: bool = False, head: bool = False,
    text: Calibration | None = None, schemes: dict[str, WeightScheme] | None = None, progress: Any = None,
) -> dict[str, Any]:  # fmt: skip
    checkpoint = Checkpoint.open(source)
    config = describe(checkpoint.config)
    plan = Plan.uniform(config, Recipe.parse(quant), tied=is_tied(config, checkpoint), label=source.name)
    if schemes:
        every = {**plan.schemes, **schemes}
        plan = Plan(label="", config=config, tied=plan.tied, schemes=every, activations=plan.activations)
    settings = Settings(method=method, folds=folds, head=head)
    data = None if method == "rtn" else text or ids()
    return quantize(source, out, plan, settings, calibration=data, progress=progress)


def digests(directory: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(directory.iterdir())}


def weights(directory: Path, source: Path) -> dict[str, torch.Tensor]:
    """Every weight of a written directory, by the names of its source."""
    checkpoint, original = Checkpoint.open(directory), Checkpoint.open(source)
    return {name: checkpoint.weight(name, original.shape(name)).float() for name in original.names()}


@pytest.mark.parametrize(
    ("case", "quant"),
    [
        ("llama", "W4g32"), ("qwen3-bias", "W3g32"), ("ernie-odd", "W8g32"), ("ernie-odd", "w8a8"),
        ("ernie-moe-untied-bias", "W4g32"), ("ernie-moe-untied-bias", "w8a8"), ("qwen3-moe", "W4"),
    ],
)  # fmt: skip
def test_streams_are_the_models_own_activations(case: str, quant: str, tmp_path: Path) -> None:
    """What calibration runs is the decoder: the KL it measures is that of the directory, loaded."""
    make(case, tmp_path / "m", torch.bfloat16)
    text = ids()
    report = run(tmp_path / "m", tmp_path / "q", quant, "awq+gptq", folds=True, text=text)
    before = qrun.load(tmp_path / "m", "bf16", kv="fp32", threads=1)
    after = qrun.load(tmp_path / "q", kv="fp32", threads=1)
    total = 0.0
    for window in text.ids[text.train :].tolist():
        p, q = (torch.log_softmax(engine.logits(window), -1) for engine in (before, after))
        total += float((p.exp() * (p - q)).sum(-1).mean())
    assert report["kl"] == pytest.approx(total / (len(text.ids) - text.train), rel=0.1 if quant == "w8a8" else 0.02)
    assert report["kl"] > 1e-6
    assert [entry["layer"] for entry in report["layers"]] == list(range(len(report["layers"])))


def test_folding_changes_nothing_of_a_model_that_is_not_rounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales taken off norms, values and gates come back in the columns: only rounding changes the function."""
    make("ernie-moe", tmp_path / "m", torch.bfloat16)
    before = qrun.load(tmp_path / "m", "bf16", kv="fp32", threads=1).logits(IDS)

    def uneven(x: torch.Tensor, *args: Any, exact: bool = False, repeat: int = 1, parts: int = 1) -> torch.Tensor:
        steps = torch.arange(x.shape[1] // repeat // parts) % 3 - 1.0
        scale = (steps if exact else 0.7 * steps).exp2()
        return scale.view(1, 1, -1).expand(parts, repeat, -1).reshape(-1)

    monkeypatch.setattr(layers, "best_scale", uneven)
    run(tmp_path / "m", tmp_path / "q", "W8", "awq", folds=True)
    after = qrun.load(tmp_path / "q", kv="fp32", threads=1).logits(IDS)
    assert float((after - before).norm() / before.norm()) < 0.1
    moved = weights(tmp_path / "q", tmp_path / "m")
    assert not torch.equal(
        moved["model.layers.0.input_layernorm.weight"],
        weights(tmp_path / "m", tmp_path / "m")["model.layers.0.input_layernorm.weight"],
    )


def test_a_plan_mixes_precisions_and_names_the_head(tmp_path: Path) -> None:
    make("llama", tmp_path / "m", torch.bfloat16)
    eight, sixteen = WeightScheme("int", 8, 0), WeightScheme("bf16", 16)
    schemes = dict.fromkeys((f"model.layers.0.self_attn.{n}_proj" for n in "qkv"), eight)
    schemes |= {"model.layers.1.mlp.down_proj": sixteen, "lm_head": eight}
    report = run(tmp_path / "m", tmp_path / "q", "W4g32", schemes=schemes, head=True)
    checkpoint, original = Checkpoint.open(tmp_path / "q"), Checkpoint.open(tmp_path / "m")
    formats = {
        name: str(checkpoint.format(name, original.shape(name)))
        for name in original.names()
        if name.endswith("_proj.weight")
    }
    assert formats["model.layers.0.self_attn.k_proj.weight"] == "int8 channel"
    assert formats["model.layers.1.self_attn.k_proj.weight"] == "int4 g32 sym"
    assert torch.equal(
        checkpoint.read("model.layers.1.mlp.down_proj.weight"), original.read("model.layers.1.mlp.down_proj.weight")
    )
    assert str(checkpoint.format("lm_head.weight", original.shape("lm_head.weight"))) == "int8 channel"
    assert report["head"]["output_error"] < 0.02


def test_an_fp8_cache_has_its_calibrated_scales(tmp_path: Path) -> None:
    make("ernie", tmp_path / "m", torch.bfloat16)
    text = ids()
    run(tmp_path / "m", tmp_path / "q", "W8A16Cfp8", text=text)
    checkpoint = Checkpoint.open(tmp_path / "q")
    assert (
        json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]["type"]
        == "float"
    )
    engine = qrun.load(tmp_path / "q", kv="fp32", threads=1)
    peaks = torch.zeros(2)
    for window in text.ids[: text.train].tolist():
        engine.logits(window)
        stored = engine.cache.layers[1].read(0, len(window))
        peaks = torch.maximum(peaks, torch.stack([each.abs().amax() for each in stored]))
    for n, peak in zip("kv", peaks, strict=True):
        scale = checkpoint.read(f"model.layers.1.self_attn.{n}_scale")
        assert scale.shape == (1,)
        assert float(scale) * 448 == pytest.approx(float(peak), rel=1e-3)
    with pytest.raises(UsageError, match="fp8 cache"):
        run(tmp_path / "m", tmp_path / "r", "W8A16Cfp8", "rtn")


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(method: Method, tmp_path: Path) -> None:
    make("ernie-moe-range", tmp_path / "m", torch.bfloat16)
    run(tmp_path / "m", tmp_path / "whole", "W4g32", method, folds=method != "rtn")
    seen: list[str] = []

    def stop(what: str, done: int, total: int) -> None:
        seen.append(what)
        if len({line.split(",")[0] for line in seen if line.startswith("layer")}) > 1:
            raise KeyboardInterrupt

    for finished in (1, 2, 3):
        seen.clear()
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "m", tmp_path / "q", "W4g32", method, folds=method != "rtn", progress=stop)
        assert not (tmp_path / "q").exists()
        partial = tmp_path / "q.partial"
        assert not list(partial.glob(".*")), "nothing half-written"
        assert len(json.loads((partial / "journal.json").read_text())["layers"]) == finished
    with pytest.raises(UsageError, match="other settings"):
        run(tmp_path / "m", tmp_path / "q", "W4g64", method, folds=method != "rtn")
    run(tmp_path / "m", tmp_path / "q", "W4g32", method, folds=method != "rtn")
    assert digests(tmp_path / "q") == digests(tmp_path / "whole")
    assert not (tmp_path / "q.partial").exists()


def test_killing_and_ctrl_c_from_outside(tmp_path: Path) -> None:
    """A process that is killed outright, one that is interrupted, and one that finishes make what one run makes."""
    command = [sys.executable, "-m", "qrun.cli", "quantize", "spark", "q", "--quant", "W4g64", "--tokens", "1024"]
    command += ["--threads", "1"]
    env = os.environ | {"TERM": "dumb"}
    done = subprocess.run(
        [*command[:5], "whole", *command[6:]], cwd=tmp_path, env=env, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"KL 0.0" in done.stderr and b"int4 g64 sym" in done.stderr and not done.stdout
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE)
        shard = tmp_path / "q.partial" / f"model-0000{1 if number == signal.SIGKILL else 2}-of-00005.safetensors"
        while not shard.exists():
            assert process.poll() is None, "it must not end by itself"
            time.sleep(0.01)
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode == code
        assert not (tmp_path / "q").exists()
    assert not list((tmp_path / "q.partial").glob(".*"))
    # As one that is killed between the journal and the removal of what it no longer names leaves it.
    (tmp_path / "q.partial" / "activations-0.safetensors").touch()
    (tmp_path / "q.partial" / ".model-00001-of-00005.safetensors.part").touch()
    assert subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, timeout=120).returncode == 0
    assert digests(tmp_path / "q") == digests(tmp_path / "whole")


def test_refusals_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "short.txt").write_text("few words")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    for words, code, said in (
        (["spark", "q"], 2, "--quant"),
        (["spark", "there", "--quant", "wint4"], 2, "there exists already"),
        (["spark", "q", "--quant", "wint9"], 2, "wint9"),
        (["spark", "q", "--quant", "nf4", "--method", "rtn"], 2, "nf4"),
        (["spark", "q", "--quant", "bf16"], 2, "nothing would be quantized"),
        (["spark", "q", "--quant", "wint4", "--calibration", "none.txt"], 2, "none.txt"),
        (["spark", "q", "--quant", "wint4", "--calibration", "short.txt"], 2, "short.txt has"),
        (["spark", "q", "--quant", "wint4", "--calibration", "bytes.txt"], 2, "bytes.txt"),
        (["spark", "q", "--quant", "wint4", "--plan", "p.toml"], 2, "--plan"),
        (["spark", "q", "--quant", "wint4", "--window", "1"], 2, "--window 1"),
        (["./nowhere", "q", "--quant", "wint4"], 3, "nowhere"),
    ):
        assert main(["quantize", *words]) == code, words
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and said in error, error
        assert not (tmp_path / "q").exists() and not (tmp_path / "q.partial").exists()


def test_a_full_disk_is_known_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("llama", tmp_path / "m", torch.bfloat16)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(QrunError, match="make room"):
        run(tmp_path / "m", tmp_path / "q", "W4g32", "rtn")
    assert not (tmp_path / "q.partial").exists()


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    make("llama", tmp_path / "m", torch.bfloat16)
    checkpoint = Checkpoint.open(tmp_path / "m")
    entry = next(iter(checkpoint.files.values())).entries["model.layers.1.mlp.up_proj.weight"]
    with (tmp_path / "m" / "model.safetensors").open("r+b") as file:
        file.seek(entry.start)
        file.write(b"\x80\x7f")  # infinity
    for method in ("rtn", "gptq"):
        with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.up_proj"):
            run(tmp_path / "m", tmp_path / "q", "W4g32", method)
        shutil.rmtree(tmp_path / "q.partial")


def test_the_built_in_text_is_no_part_of_the_held_out_one() -> None:
    held = (SPARK / "heldout.txt").read_text(encoding="utf-8")
    asked = {line for line in held.replace("<|", "\n").splitlines() if "User: " in line and line.count(" ") > 4}
    mine = (SPARK / "calibration.txt").read_text(encoding="utf-8").replace("<|", "\n").splitlines()
    assert len(asked) > 100
    assert len(asked & set(mine)) < 0.02 * len(asked)
    found = calibration(SPARK, 2048, 2048, label="spark", window=128, tokens=2048)
    assert found.ids.shape == (16, 128) and found.train == 14


class Held:
    """spark's logits on some of its held-out text."""

    def __init__(self) -> None:
        engine = qrun.load(None, "bf16", kv="fp32", threads=1)
        text = Tokenizer.from_dir(SPARK, vocab_size=engine.config.vocab).encode((SPARK / "heldout.txt").read_text())
        self.windows = [text[at : at + 512] for at in range(0, 1024, 512)]
        self.expected = [torch.log_softmax(engine.logits(window), -1) for window in self.windows]

    def kl(self, directory: Path) -> float:
        engine = qrun.load(directory, kv="fp32", threads=1)
        total = 0.0
        for window, p in zip(self.windows, self.expected, strict=True):
            total += float((p.exp() * (p - torch.log_softmax(engine.logits(window), -1))).sum(-1).mean())
        return total / len(self.windows)


@pytest.fixture(scope="module")
def held() -> Held:
    return Held()


@pytest.mark.parametrize("quant", ["W4g64", "W2g32"])
def test_calibrated_beats_data_free_on_spark(quant: str, held: Held, tmp_path: Path) -> None:
    config = describe(Checkpoint.open(SPARK).config)
    text = calibration(SPARK, config.vocab, config.positions, label="spark", tokens=4096)
    divergence: dict[str, float] = {}
    errors: dict[str, float] = {}
    for method in ("rtn", "awq", "gptq") if quant == "W2g32" else ("rtn", "gptq"):
        report = run(SPARK, tmp_path / method, quant, method, folds=method == "awq", text=text)
        divergence[method] = held.kl(tmp_path / method)
        outputs = [m["output_error"] for entry in report["layers"] for m in entry["modules"] if m["output_error"]]
        errors[method] = math.fsum(outputs) / len(outputs) if outputs else math.inf
    assert divergence["gptq"] < 0.75 * divergence["rtn"]
    if quant == "W2g32":
        assert divergence["awq"] < divergence["rtn"]
        assert errors["gptq"] < 0.75 * errors["awq"]


def test_what_is_quantized_already_is_rounded_again(tmp_path: Path) -> None:
    """From the values that another tool's codes stand for; a module that a plan leaves alone is written as numbers."""
    source = Path(__file__).parent / "fixtures" / "ct_w4a16_g32"
    config = describe(Checkpoint.open(source).config)
    plan = Plan.uniform(config, Recipe.parse("wint8"), tied=False, label="again")
    alone = "model.layers.0.mlp.down_proj"
    plan = replace(plan, schemes={**plan.schemes, alone: BF16})
    quantize(source, tmp_path / "out", plan, Settings(method="rtn", folds=False, head=False), calibration=None)
    made, before = Checkpoint.open(tmp_path / "out"), Checkpoint.open(source)
    assert made.format(f"{alone}.weight", (64, 96)) is None
    for name in (f"{alone}.weight", "model.layers.0.self_attn.q_proj.weight"):
        shape = (64, 96) if alone in name else (64, 64)
        found, wanted = made.weight(name, shape).float(), before.weight(name, shape)
        assert float((found - wanted).norm() / wanted.norm()) < 0.01
