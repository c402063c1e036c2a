"""The kernels compiled ahead of time, and the report that holds them to their limits. Needs triton, but no GPU."""

import ast
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
# The tools are no package, and the root is not on the path here: see conftest.
sys.modules.setdefault("tools", ModuleType("tools")).__path__ = [str(ROOT / "tools")]

from tools.kernel_sass import dots, main_loop, ptx, sass  # noqa: E402

FILES = sorted((ROOT / "kernels").glob("gpu_*.py"))

KERNELS = """
import triton
import triton.language as tl
from qrun.kernels.gpu_aot import Variant


@triton.jit
def total(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    acc = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, n, BLOCK):
        acc += tl.load(x_ptr + i + tl.arange(0, BLOCK)).to(tl.float32)
    tl.store(y_ptr, tl.sum(acc))


@triton.jit
def product(x_ptr, w_ptr, y_ptr, K, SIZE: tl.constexpr):
    r = tl.arange(0, SIZE)
    acc = tl.zeros((SIZE, SIZE), tl.float32)
    for k in range(0, K, 32):
        a = tl.load(x_ptr + r[:, None] * K + k + tl.arange(0, 32)[None, :])
        b = tl.load(w_ptr + r[None, :] * K + k + tl.arange(0, 32)[:, None])
        acc = tl.dot(a, b, acc)
    tl.store(y_ptr + r[:, None] * SIZE + r[None, :], acc)


def variants():
    one = {"x_ptr": "*bf16", "y_ptr": "*fp32", "n": "i32"}
    two = {"x_ptr": "*fp16", "w_ptr": "*fp16", "y_ptr": "*fp32", "K": "i32"}

    def total_of(name, block=1024, **rest):
        return Variant(name=name, kernel=total, types=one, constants={"BLOCK": block}, multiples=("n",), **rest)

    def product_of(name, size, **rest):
        return Variant(name=name, kernel=product, types=two, constants={"SIZE": size}, multiples=("K",), **rest)

    return [
        total_of("fine total", weights=1024, limit=6.0),
        product_of("fine product", 64, weights=64 * 32),
        total_of("wide total", weights=1024, limit=0.5),
        total_of("newer total", least=120),
        total_of("odd total", block=1000),
        product_of("claims too much", 64, weights=999),
        product_of("spilling product", 256, warps=2),
    ]
"""


def report(*arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    """The tool in a process of its own, where kernels are compiled and not interpreted."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.kernel_report", "--jobs", "1", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True, check=False, timeout=240
    )


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kernels") / "aot_kernels.py"
    path.write_text(KERNELS, encoding="utf-8")
    return path


def test_what_is_right_passes(module: Path, tmp_path: Path) -> None:
    """Even where the environment asks for the interpreter, in which nothing would be compiled."""
    found = tmp_path / "found.json"
    done = report("--module", module, "--arch", "80,90", "--only", "fine", "--json", found, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(len(line) <= 120 for line in done.stdout.splitlines())
    rows: list[dict[str, Any]] = json.loads(found.read_text(encoding="utf-8"))
    assert [(row["name"], row["arch"]) for row in rows] == [
        (name, arch) for name in ("fine total", "fine product") for arch in (80, 90)
    ]
    for row in rows:
        assert row["error"] is None and row["stack"] == row["local"] == 0 and row["registers"] > 8
        # 8 elements a thread and pass, or 16: each is at least converted and added.
        assert row["loop"] > 16 and 1 < row["per_weight"] < 20
    assert rows[0]["mma"] == 0 and all(row["mma"] and row["dots"] == [64 * 32, 64 * 32] for row in rows[2:])


def test_what_is_wrong_is_named(module: Path) -> None:
    done = report("--module", module, "--arch", "90", "--only", "wide", "odd", "spilling", "claims")
    assert done.returncode == 1
    wide, odd, spilling = done.stderr.splitlines()
    assert wide.startswith("wide total, sm_90: ") and wide.endswith("instructions a weight, limit 0.5")
    assert odd.startswith("odd total, sm_90: does not compile") and "power of 2" in odd
    assert spilling.startswith("spilling product, sm_90: spills: ")
    assert "claims too much: says 999 weights a pass, its dots take 2048" in done.stdout


def test_a_variant_is_left_out_below_its_capability(module: Path) -> None:
    done = report("--module", module, "--arch", "90", "--only", "fine total", "newer")
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("newer total"))
    assert line.split() == ["newer", "total", "-"]


def test_a_module_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "wrong_kernels.py"
    path.write_text("def variants():\n    return nowhere\n", encoding="utf-8")
    done = report("--module", path)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"{path}: lists no variants: NameError: name 'nowhere' is not defined"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--arch", "77"], "80,86,89,90"),
        (["--arch", "ninety"], "80,86,89,90"),
        (["--only", "no such kernel"], "no such kernel"),
        (["--only", "newer", "--arch", "90"], "newer"),
    ],
)
def test_wrong_usage(module: Path, arguments: list[str], says: str) -> None:
    done = report("--module", module, *arguments)
    assert done.returncode == 2 and says in done.stderr.splitlines()[-1]


def test_the_real_kernels_on_hopper() -> None:
    """One variant of each file; .ci/run compiles all of them for every architecture."""
    first = [listed[0].name for path in FILES if (listed := _variants(path))]
    assert first
    done = report("--arch", "90", "--only", *first[:2])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_launched_kernel_is_listed(path: Path) -> None:
    """A kernel that no variant names is never compiled before somebody's GPU does it."""
    launched = {
        node.func.value.id
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and isinstance(node.func.value, ast.Name)
    }
    kernels = {
        node.name
        for file in FILES
        for node in _tree(file).body
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
    }
    named = {variant.kernel.__name__ for variant in _variants(path)}
    assert kernels & launched <= named, f"variants() in {path.name} leaves out {sorted(kernels & launched - named)}"


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _variants(path: Path) -> list[Any]:
    listed = getattr(import_module(f"qrun.kernels.{path.stem}"), "variants", None)
    return [] if listed is None else list(listed())


SASS = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/              @!P1 BRA `(.L_x_2) ;
.L_x_1:
        /*0030*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0040*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0050*/                   FADD R1, R1, R2 ;
        /*0060*/                   BRA.DIV UR4, `(.L_x_3) ;
        /*0070*/               @P0 BRA `(.L_x_1) ;
        /*0080*/                   NOP ;
        /*0090*/               @P2 BRA `(.L_x_0) ;
.L_x_2:
        /*00a0*/                   FADD R1, R1, R2 ;
        /*00b0*/                   FADD R1, R1, R2 ;
        /*00c0*/                   EXIT ;
.L_x_3:
        /*00d0*/                   STL [R1], R2 ;
        /*00e0*/                   BRA `(.L_x_1) ;
.L_x_4:
        /*00f0*/                   BRA `(.L_x_4) ;
"""


def test_the_main_loop_is_the_inner_one_with_what_it_moved_away() -> None:
    """The outer loop holds it; the rare block behind the end belongs to it; the last jump is to itself."""
    loop = [op.op.split(".")[0] for op in main_loop(*sass(SASS))]
    assert loop == ["HMMA", "IADD3", "FADD", "BRA", "BRA", "STL", "BRA"]


def test_a_jump_back_to_where_the_code_was_moved_from_is_no_loop() -> None:
    text = SASS.replace("@!P1 BRA `(.L_x_2)", "@!P1 BRA `(.L_x_3)")
    for jump in ("BRA.DIV UR4, `(.L_x_3)", "@P0 BRA `(.L_x_1)", "@P2 BRA `(.L_x_0)"):
        text = text.replace(jump, "NOP")
    assert main_loop(*sass(text)) == []


def test_ptx_has_the_same_loops() -> None:
    text = "$L__BB0_1:\n\tld.global.b32 %r1, [%rd1];\n\tadd.f32 %f1, %f2, %f3;\n\tmma.sync.m16n8k16 {%r1}, {%r2};\n"
    code = ptx("\tmov.u32 %r1, 0;\n" + text + "\tadd.s32 %r1, %r1, 1;\n\t@%p1 bra $L__BB0_1;\n\tret;\n")
    assert [op.op.split(".")[0] for op in main_loop(*code)] == ["ld", "add", "mma", "add", "bra"]


def test_dots_are_counted_in_their_own_loop() -> None:
    dot = "%a = tt.dot %x, %y, %z : tensor<64x32xf16, #a> * tensor<32x8xf16, #b> -> tensor<64x8xf32, #mma>"
    text = f"scf.for %i = %a to %b {{\n  scf.for %j = %a to %b {{\n    {dot}\n    {dot}\n  }}\n  {dot}\n}}\n{dot}\n"
    assert dots(text) == (2 * 64 * 32, 2 * 32 * 8)
