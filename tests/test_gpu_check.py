"""The GPU's check as far as a machine without one goes: its models, its records, its tables and its refusals."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from gpu_doubles import DEVICE, DTYPES
from oracle import CASES, COMMON

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]
# The tools are no package, and the root is not on the path here: see conftest.
sys.modules.setdefault("tools", ModuleType("tools")).__path__ = [str(ROOT / "tools")]

from qrun.backends.base import Backend  # noqa: E402
from qrun.bench import Test, bytes_per_token, measure  # noqa: E402
from qrun.errors import CheckpointError  # noqa: E402
from qrun.kernels.gpu_gemv import Config  # noqa: E402
from qrun.kernels.gpu_packed import Packed  # noqa: E402
from qrun.memory import forecast  # noqa: E402
from qrun.models import describe  # noqa: E402
from qrun.recipe import Recipe  # noqa: E402
from tools import gpu_check, gpu_check_summary, gpu_check_tree  # noqa: E402
from tools.gpu_check_job import BrokenDeviceError, Job, read_records  # noqa: E402
from tools.gpu_check_kernels import items  # noqa: E402
from tools.gpu_check_machine import run_peer  # noqa: E402
from tools.gpu_check_models import Case, measure_models  # noqa: E402
from tools.gpu_check_ours import Bench  # noqa: E402
from tools.gpu_check_random import RandomCheckpoint, build, fill, history  # noqa: E402
from tools.gpu_check_timing import Work  # noqa: E402

DENSE: dict[str, Any] = COMMON | {"model_type": "ernie4_5", "head_dim": 32, "tie_word_embeddings": True}
SPARSE: dict[str, Any] = COMMON | CASES["ernie-moe"][1] | {"model_type": "ernie4_5_moe", "tie_word_embeddings": True}
UNTIED: dict[str, Any] = COMMON | {"model_type": "llama", "tie_word_embeddings": False}


@pytest.mark.parametrize("config", [DENSE, SPARSE, UNTIED], ids=["dense", "sparse", "untied"])
@pytest.mark.parametrize("quant", ["bf16", "wint4", "fp8"])
def test_a_random_model_is_a_whole_one(config: dict[str, Any], quant: str) -> None:
    recipe = Recipe.parse(quant)
    engine = build(RandomCheckpoint.of(config, "cpu"), recipe, Backend(), name="random", context=64)
    need = forecast(describe(config), recipe, 64)
    assert {line.role: line.bytes for line in engine.card.roles} == need.roles
    logits = engine.logits(list(range(40)))
    assert logits.shape == (40, config["vocab_size"]) and bool(torch.isfinite(logits).all())
    assert float(logits.std()) > 0.01


def test_no_two_weights_share_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose layers were one in memory would decode from the cache."""
    places: list[int] = []

    class Watching(Backend):
        def linear(self, weight: Any, *rest: Any, **options: Any) -> Any:
            places.append(weight.codes.data_ptr())
            return super().linear(weight, *rest, **options)

    for quant in ("bf16", "wint8"):
        places.clear()
        build(RandomCheckpoint.of(UNTIED, "cpu"), Recipe.parse(quant), Watching(), name="random", context=64)
        assert len(places) >= 4 * UNTIED["num_hidden_layers"] and len(set(places)) == len(places)


def test_a_random_checkpoint_has_what_its_config_says() -> None:
    checkpoint = RandomCheckpoint.of(SPARSE, "cpu")
    assert "lm_head.weight" not in checkpoint and "lm_head.weight" in RandomCheckpoint.of(UNTIED, "cpu")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert name in checkpoint.names()
    first = checkpoint.weight(name, (24, 64))
    assert first.dtype == torch.bfloat16 and float(first.float().std()) == pytest.approx(1 / 8, rel=0.2)
    for wrong in ((24, 65), (64, 24)):
        with pytest.raises(CheckpointError, match=name):
            checkpoint.weight(name, wrong)


@pytest.mark.parametrize("kv", ["bf16", "int8", "int4", "fp8"])
def test_a_filled_cache_is_where_the_measurement_goes_on(kv: str) -> None:
    """Nothing of the history is read again: the cache is as long as it should be, and holds numbers."""
    engine = build(RandomCheckpoint.of(DENSE, "cpu"), Recipe.parse("wint8"), Backend(), name="r", context=64)
    engine.set_kv(kv)
    test = Test("tg", 4, 30)
    fill(engine, test)
    assert list(engine.cached_ids) == history(engine, test) and engine.cache.length == 30
    for layer in engine.cache.layers:
        assert all(bool(torch.isfinite(store.read(0, 30)).all()) for store in (layer.k, layer.v))
    lengths: list[int] = []
    forward = engine.decoder.forward

    def counting(ids: Any, cache: Any, **options: Any) -> Any:
        lengths.append(len(ids))
        return forward(ids, cache, **options)

    engine.decoder.forward = counting  # type: ignore[method-assign]
    measure(engine, test)
    assert lengths == [1] * 5, "one token of prompt and four made"
    assert len(engine.cached_ids) == 35


def test_models_are_measured_and_recorded(tmp_path: Path) -> None:
    job = Job("models", tmp_path / "models.jsonl", 200, quick=True, device="cpu")
    chosen = [Case("bf16", Test("tg", 3, 16)), Case("int8", Test("tg", 3, 16)), Case("bf16", Test("pp", 16))]
    options: dict[str, Any] = {"models": {"Tiny": DENSE}, "backend": Backend, "wanted": lambda recipe: chosen}
    measure_models(job, **options)
    rows = {record["key"]: record for record in read_records(job.path) if record["kind"] == "row"}
    assert set(rows) == {
        f"Tiny {recipe}{rest}"
        for recipe in ("wint4", "bf16")
        for rest in (": load", ", kv bf16: tg3 @ d16", ", kv int8: tg3 @ d16", ", kv bf16: pp16")
    }
    for key, row in rows.items():
        if "load" not in key:
            assert len(row["samples"]) == 3 and row["tokens_per_second"] > 0
            assert ("bytes_per_token" in row) == (row["measures"] == "tg")
    engine = build(RandomCheckpoint.of(DENSE, "cpu"), Recipe.parse("wint4"), Backend(), name="r", context=64)
    assert rows["Tiny wint4, kv bf16: tg3 @ d16"]["bytes_per_token"] == bytes_per_token(engine, 17)
    before = job.path.read_text(encoding="utf-8")
    measure_models(Job("models", job.path, 200, quick=True, device="cpu"), **options)
    assert job.path.read_text(encoding="utf-8") == before, "what is done is not done again"


def test_a_failure_is_recorded_and_the_next_goes_on(tmp_path: Path) -> None:
    job = Job("kernels", tmp_path / "kernels.jsonl", 100, device="cpu")

    def fails() -> None:
        raise ValueError("no such\n  kernel")

    assert not job.attempt("first", fails)
    assert job.attempt("second", lambda: {"seconds": 1.0})
    assert not job.attempt("third", dict, least=1000)
    assert not job.attempt("second", fails), "done before"
    with job.path.open("a", encoding="utf-8") as file:
        file.write('{"section": "kernels", "kind": "begun", "key": "fourth"}\n{"section": "ker')
    kinds = [(record["kind"], record["key"]) for record in read_records(job.path) if record["kind"] != "begun"]
    assert kinds == [("error", "first"), ("row", "second"), ("skipped", "third")]
    report = gpu_check.Report("today", [], {}, [])
    report.take(read_records(job.path))
    assert [(error["key"], error["error"]) for error in report.errors] == [
        ("first", "ValueError: no such kernel"),
        ("fourth", "its process ended, or was out of time"),
    ]
    assert len(report.rows) == len(report.skipped) == 1
    again = Job("kernels", job.path, 100, device="cpu")
    assert again.done == {"first", "second", "fourth"}, "what killed its process is not tried again"


def test_a_lost_device_ends_the_process_only_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Job, "usable", lambda self: False)
    job = Job("kernels", tmp_path / "kernels.jsonl", 100)
    assert job.attempt("fine", dict)
    with pytest.raises(BrokenDeviceError):
        job.attempt("bad", lambda: {"x": 1 / 0})
    assert [record["kind"] for record in read_records(job.path)] == ["begun", "row", "begun", "error"]


def test_a_section_is_started_again_behind_what_broke_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "breaking.py").write_text(
        "import os\n"
        "def work(job):\n"
        "    job.attempt('a', lambda: {'n': 1})\n"
        "    job.attempt('b', lambda: os._exit(9))\n"
        "    job.attempt('c', lambda: {'n': 3})\n",
        encoding="utf-8",
    )
    script = (
        "import sys, json\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]\n"
        "from pathlib import Path\n"
        "from tools import gpu_check\n"
        "records, went = gpu_check.run_section('kernels', 60, Path(sys.argv[1]), quick=True)\n"
        "print(json.dumps([[r['kind'] + r['key'] for r in records], went['ended']]))\n"
    )
    # Every process that starts here takes the section's work from another module.
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nsys.path.append({str(ROOT)!r})\nfrom tools import gpu_check\n"
        "gpu_check.WORK['kernels'] = ('breaking', 'work')\n",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [["beguna", "rowa", "begunb", "begunc", "rowc"], [9, 0]]


def test_a_section_that_hangs_is_ended(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = gpu_check.run_process(
        [sys.executable, "-u", "-c", "import time; print('here'); time.sleep(99)"], 2.0, log, cwd=tmp_path
    )
    assert code == "out of time" and log.read_text(encoding="utf-8") == "here\n"


def test_without_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = _run("--out", str(out), "--quick", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1 and not out.exists()
    assert done.stderr.splitlines()[-1].startswith("gpu_check: no GPU: torch")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["--only", "nothing"], ["--only", "tests,"], ["--minutes", "0"]])
def test_wrong_usage(arguments: list[str]) -> None:
    done = _run(*arguments)
    assert done.returncode == 2 and arguments[0] in done.stderr.splitlines()[-1]


def _run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tools.gpu_check", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=120
    )


def test_sections_that_fail_end_with_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here every section fails, for there is no GPU; each says so, and the file is written all the same."""
    if DEVICE == "cuda":
        pytest.skip("a GPU makes this a measurement")
    monkeypatch.setattr(gpu_check, "no_gpu", lambda: None)
    out = tmp_path / "out.json"
    assert gpu_check.main(["--only", "kernels,models", "--minutes", "1", "--quick", "--out", str(out)]) == 1
    report = json.loads(out.read_text(encoding="utf-8"))
    assert set(report["sections"]) == {"machine", "kernels", "models"}
    assert {error["section"] for error in report["errors"]} == {"machine", "kernels", "models"}
    said = capsys.readouterr().out
    assert said.count("nothing measured") == 3 and "0 rows" in said and "FAILED" in said


def test_the_links_are_the_package(tmp_path: Path) -> None:
    """What the device's tests import where nothing is installed, with -S for want of such a machine."""
    gpu_check_tree.link(tmp_path)
    site = str(Path(torch.__file__).parents[1])
    script = "import qrun, qrun.kernels.reference as r, qrun.backends.base as b; print(r.__file__, b.__file__)"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{site}"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(place.startswith(str(tmp_path / "qrun")) for place in done.stdout.split())


def test_the_tree_is_used_where_nothing_is_installed() -> None:
    site = str(Path(torch.__file__).parents[1])
    script = (
        "from tools.gpu_check_tree import use; use(); import qrun.kernels.reference, qrun.backends.base; print('ok')"
    )
    environment = {**os.environ, "PYTHONPATH": site}
    done = subprocess.run(
        [sys.executable, "-S", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "ok\n", done.stderr


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = gpu_check_tree.version

    def some(name: str) -> str:
        if name in ("numba", "prompt-toolkit"):
            raise gpu_check_tree.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(gpu_check_tree, "version", some)
    found, missing = gpu_check_tree.versions()
    assert {"numba", "prompt-toolkit"} <= set(missing) and "torch" in found


@pytest.mark.parametrize("config", [DENSE, SPARSE | {"head_dim": 16, "moe_layer_start_index": 1}], ids=["dense", "moe"])
def test_the_peer_decodes(config: dict[str, Any]) -> None:
    options = ("--device", "cpu", "--no-compile", "--tokens", "2", "--depth", "20")
    row = run_peer(config, "bf16", limit=100, options=options)
    assert len(row["samples"]) == 3 and row["tokens_per_second"] > 0
    # BF16 weights that a token uses, norms aside, as qrun counts them, and the cache.
    engine = build(RandomCheckpoint.of(config, "cpu"), Recipe.parse("bf16"), Backend(), name="r", context=64)
    sizes = {line.role: line.bytes for line in engine.card.roles}
    kept = sizes["kept"]
    assert row["bytes_per_token"] == pytest.approx(bytes_per_token(engine, 21) - kept, rel=0.01)


BENCH_ITEMS: dict[str, Callable[[Bench], Work]] = {
    **{
        f"one token, {name}": lambda bench, name=name: bench.few(1, name, 256, 512)
        for name in ("int4 g64", "int8", "bf16", "nvfp4")
    },
    "three tokens": lambda bench: bench.few(3, "fp8", 128, 256),
    "gate_ups": lambda bench: bench.experts("int4 g64", 256, 128, experts=6, slots=2, down=False),
    "downs": lambda bench: bench.experts("int4 g64", 256, 128, experts=6, slots=2, down=True),
    "attention bf16": lambda bench: bench.attention("bf16", 4, 2, 64, 70),
    "attention int4": lambda bench: bench.attention("int4", 4, 2, 64, 70),
    "attention fp8": lambda bench: bench.attention("fp8", 4, 2, 64, 70),
    "gemm int8": lambda bench: bench.gemm_int8(20, 64, 128, None),
    "gemm fp8": lambda bench: bench.gemm_fp8(20, 64, 128, None, native=False),
    "many int8": lambda bench: bench.many(70, "int8", 128, 256, "int8"),
    "many int4": lambda bench: bench.many(70, "int4 g64", 128, 256),
}


@pytest.mark.parametrize("name", BENCH_ITEMS)
def test_our_kernels_are_launched_as_they_are_declared(name: str) -> None:
    """Each call runs, on a device of four processors, and takes turns with others on memory of their own."""
    bench = Bench(torch.device(DEVICE), DTYPES[0], 4)
    work = BENCH_ITEMS[name](bench)
    assert len(work.calls) >= 2 and work.bytes > 0
    for call in work.calls[:2]:
        call()


def test_tuning_meets_every_copy() -> None:
    met: list[Packed] = []
    bench = Bench(torch.device(DEVICE), DTYPES[0], 4, lambda w, columns, slots: Config(split=2), met.append)
    work = bench.few(1, "int4 g64", 256, 512)
    assert len({packed.codes.data_ptr() for packed in met}) == len(work.calls) == len(met)
    assert bench.shape_of(met[0], 8, 1) == Config(split=2)


def test_what_a_call_reads() -> None:
    bench = Bench(torch.device(DEVICE), DTYPES[0], 4)
    codes, scales, zeros = 256 * 512 // 2, 2 * 256 * 8, 256 * 8
    assert bench.few(1, "int4 g64", 256, 512).bytes == codes + scales + zeros
    assert bench.few(1, "bf16", 256, 512).bytes == 2 * 256 * 512
    assert bench.attention("int8", 4, 2, 64, 70).bytes == 2 * 2 * 70 * (64 + 2 * 2)
    assert bench.attention("bf16", 4, 2, 64, 70).bytes == 2 * 2 * 70 * 64 * 2
    assert bench.experts("bf16", 256, 128, experts=6, slots=2, down=True).bytes == 2 * 2 * 256 * 128


def test_no_row_of_the_kernels_is_there_twice() -> None:
    bench = Bench(torch.device(DEVICE), DTYPES[0], 4)
    for quick in (False, True):
        keys = [item.key for item in items(bench, quick=quick)]
        assert len(set(keys)) == len(keys) > 10
    assert {item.key for item in items(bench, quick=True)} < {item.key for item in items(bench, quick=False)}


def _report() -> dict[str, Any]:
    def row(section: str, key: str, **values: Any) -> dict[str, Any]:
        return {"section": section, "kind": "row", "key": key, **values}

    def tokens(section: str, recipe: str, speed: float, **more: Any) -> dict[str, Any]:
        values = {"model": "M", "recipe": recipe, "tokens_per_second": speed, "bytes_per_token": 1e9, **more}
        return row(section, f"M {recipe}", **values)

    near: dict[str, Any] = {"measures": "tg", "kv": "bf16", "test": "tg128 @ d1024"}
    gemv = {"what": "1 token", "shape": "4096x4096", "bytes": 4e9}
    return {
        "versions": {"triton": "3.6.0"},
        "sections": {"models": {"seconds": 1.5, "given": 9.0, "ended": [75, 0]}},
        "rows": [
            row("machine", "device", gpu="Card", capability="9.0"),
            row("machine", "bandwidth", read=4e12, copy=3e12, sum=4e12, dot=2e12, amax=1e12),
            row("tests", "pytest", ended=1, passed=7, failed=2),
            row("kernels", "a", kernel="cuBLAS bf16", seconds=4e-3, **gemv),
            row("kernels", "b", kernel="int4 g64", seconds=2e-3, **gemv),
            tokens("models", "wint4", 600.0, **near),
            tokens("models", "fp8", 300.0, **near),
            row("models", "M wint4: load", weight_bytes=5, seconds=2.0, fallbacks=["o in nf4"]),
            tokens("peers", "int4", 400.0),
            tokens("peers", "bf16", 200.0),
            row("profile", "p", model="M", kernels=[{"kernel": "gemv_kernel", "launches": 64.0, "us": 12.5}]),
        ],
        "errors": [{"section": "models", "key": "M w8a8", "error": "ValueError: no", "where": "a.py:7"}],
        "skipped": [{"section": "models", "key": "M wint8", "why": "no time left"}],
    }


def test_tables_set_against_bandwidth_and_peers() -> None:
    report = _report()
    text = {name: gpu_check_summary.section_text(name, report) for name in gpu_check.SHARES}
    assert "Card, sm_9.0" in text["machine"] and "read 4000" in text["machine"]
    assert "7 passed, 2 failed" in text["tests"]
    b = next(line for line in text["kernels"].splitlines() if line.startswith("int4 g64"))
    assert b.split()[2:] == ["4096x4096", "2000.0", "2000", "50%", "2.00x"]
    wint4 = next(line for line in text["models"].splitlines() if line.startswith("M wint4"))
    assert wint4.split()[-3:] == ["600.0", "15%", "1.50x"]
    fp8 = next(line for line in text["models"].splitlines() if line.startswith("M fp8"))
    assert fp8.split()[-1] == "1.50x", "against the peer's BF16"
    assert "FAILED M w8a8: ValueError: no (a.py:7)" in text["models"] and "skipped, no time: M wint8" in text["models"]
    assert "fallback for o in nf4" in text["models"] and "[75, 0]" in text["models"]
    assert text["peers"].splitlines()[3].split()[-2:] == ["600.0", "1.50x"]
    assert "gemv_kernel" in text["profile"] and "100%" in text["profile"]
    assert "10 rows" not in gpu_check_summary.ending(report, 3.0, "x.json")
    assert "no time for all of: models" in gpu_check_summary.ending(report, 3.0, "x.json")


def test_the_report_is_json(tmp_path: Path) -> None:
    report = gpu_check.Report("today", ["--quick"], {"torch": "2"}, ["numba"], rows=[{"key": "a", "path": Path("x")}])
    report.save(tmp_path / "deep" / "out.json")
    assert json.loads((tmp_path / "deep" / "out.json").read_text(encoding="utf-8"))["rows"] == [
        {"key": "a", "path": "x"}
    ]
