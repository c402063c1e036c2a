"""What Intel's Triton does not take, or not on every card, looked for in every kernel that the XPU backend reaches."""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {
    "inline_asm_elementwise": "assembly is Nvidia's",
    "dot": "Arc A-series and Xe-LPG have no matrix engines in Triton",
    "dot_scaled": "Arc A-series and Xe-LPG have no matrix engines in Triton",
    "debug_barrier": "nothing that waits for another program's threads",
    "atomic_add": "sums would depend on the order",
    "float64": "Arc A-series and Xe-LPG have none",
    "float8e4nv": "converted by integer arithmetic",
    "float8e5": "converted by integer arithmetic",
}
LAUNCH = {"num_warps", "num_stages", "enable_fp_fusion"}
"""What a launch may ask of Intel's compiler."""
LEAST, MOST = 2.0**-126, (2.0 - 2.0**-23) * 2.0**127
"""Normal numbers of float32: Triton makes any other constant a float64."""


@dataclass
class Module:
    """A kernel file: its functions, its constants, and what it imports of the others."""

    functions: dict[str, ast.FunctionDef] = field(default_factory=dict)
    constants: dict[str, object] = field(default_factory=dict)
    imports: dict[str, tuple[str, str]] = field(default_factory=dict)


def parsed(source: str) -> Module:
    made = Module()
    for node in ast.parse(source).body:
        match node:
            case ast.FunctionDef():
                made.functions[node.name] = node
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=value)):
                made.constants[name] = value
            case ast.ImportFrom(module=str(module)) if module.startswith("qrun.kernels."):
                made.imports |= {a.asname or a.name: (module.split(".")[-1], a.name) for a in node.names}
            case _:
                pass
    return made


def kernels() -> dict[str, Module]:
    """Every module of Triton kernels."""
    files = [*(ROOT / "kernels").glob("gpu_*.py"), *(ROOT / "kernels").glob("xpu_*.py")]
    return {file.stem: parsed(file.read_text(encoding="utf-8")) for file in files}


def entries(modules: Mapping[str, Module]) -> set[tuple[str, str]]:
    """The functions of these modules that the XPU backend names."""
    found: set[tuple[str, str]] = set()
    for file in (ROOT / "backends").glob("xpu*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qrun.kernels"):
                of = (node.module or "").removeprefix("qrun.kernels").removeprefix(".")
                for name in (alias.name for alias in node.names):
                    if of in modules:
                        found.add((of, name))
                    elif name in modules:
                        found |= {
                            (name, use.attr)
                            for use in ast.walk(tree)
                            if isinstance(use, ast.Attribute)
                            and isinstance(use.value, ast.Name)
                            and use.value.id == name
                        }
    return {(module, name) for module, name in found if name in modules[module].functions}


class Walk:
    """From entry points along calls, branches left out that constants among the arguments close."""

    def __init__(self, modules: Mapping[str, Module]) -> None:
        self.modules = modules
        self.seen: set[object] = set()
        self.kernels: set[str] = set()
        self.wrong: list[str] = []

    def function(self, module: str, name: str, bound: Mapping[str, object]) -> None:
        key = (module, name, tuple(sorted(bound.items(), key=str)))
        if key in self.seen:
            return
        self.seen.add(key)
        tree = self.modules[module].functions[name]
        jitted = any("triton.jit" in ast.unparse(each) for each in tree.decorator_list)
        if jitted:
            self.kernels.add(f"{module}.{name}")
        for node in (each for statement in tree.body for each in _open(statement, bound)):
            if jitted:
                self.rules(f"{module}.{name}, line {node.lineno}" if isinstance(node, ast.expr) else "", node)
            if isinstance(node, ast.Call):
                launch = isinstance(node.func, ast.Subscript)
                target = node.func.value if isinstance(node.func, ast.Subscript) else node.func
                where = self.resolve(module, target)
                if where is None:
                    continue
                if launch:
                    self.launch(f"{module}.{name}, line {node.lineno}", module, where, node)
                self.function(*where, {} if launch else self.bind(where, node, bound))

    def resolve(self, module: str, target: ast.expr) -> tuple[str, str] | None:
        if not isinstance(target, ast.Name):
            return None
        of, name = self.modules[module].imports.get(target.id, (module, target.id))
        return (of, name) if of in self.modules and name in self.modules[of].functions else None

    def bind(self, where: tuple[str, str], call: ast.Call, bound: Mapping[str, object]) -> dict[str, object]:
        names = [argument.arg for argument in self.modules[where[0]].functions[where[1]].args.args]
        given = dict(zip(names, call.args, strict=False)) | {k.arg: k.value for k in call.keywords if k.arg}
        made: dict[str, object] = {}
        for name, value in given.items():
            if isinstance(value, ast.Constant):
                made[name] = value.value
            elif isinstance(value, ast.Name) and value.id in bound:
                made[name] = bound[value.id]
        return made

    def rules(self, at: str, node: ast.AST) -> None:
        match node:
            case ast.Attribute(value=ast.Name(id="tl"), attr=attr) if attr in FORBIDDEN:
                self.wrong.append(f"{at}: tl.{attr}: {FORBIDDEN[attr]}")
            case ast.Constant(value=float(value)) if value and not LEAST <= abs(value) <= MOST:
                self.wrong.append(f"{at}: {value} would be a float64")
            case _:
                pass

    def launch(self, at: str, module: str, where: tuple[str, str], call: ast.Call) -> None:
        parameters = {argument.arg for argument in self.modules[where[0]].functions[where[1]].args.args}
        given = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
        for name in given.keys() - parameters - LAUNCH:
            self.wrong.append(f"{at}: Intel's compiler is not asked for {name}")
        match given.get("num_warps"):
            case ast.Constant(value=int(warps)):
                pass
            case ast.Name(id=name) if isinstance(self.modules[module].constants.get(name), int):
                warps = self.modules[module].constants[name]
            case ast.Name(id="warps") if module == "gpu_norm":  # computed: test_warps_of_norms
                warps = 2
            case _:
                warps = 0
        if not isinstance(warps, int) or warps < 1 or warps & (warps - 1):
            self.wrong.append(f"{at}: num_warps must be a constant power of two")


def _open(node: ast.AST, bound: Mapping[str, object]) -> Iterator[ast.AST]:
    """The node and all below it that is not behind a test of a constant that fails."""
    yield node
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id in bound:
        below: list[ast.AST] = list(node.body if bound[node.test.id] else node.orelse)
    else:
        below = list(ast.iter_child_nodes(node))
    for each in below:
        yield from _open(each, bound)


def violations(modules: Mapping[str, Module], starts: set[tuple[str, str]]) -> Walk:
    walk = Walk(modules)
    for module, name in sorted(starts):
        walk.function(module, name, {})
    return walk


def test_no_kernel_asks_for_what_intel_has_not() -> None:
    modules = kernels()
    walk = violations(modules, entries(modules))
    assert not walk.wrong, "\n".join(walk.wrong)
    assert walk.kernels >= {
        "xpu_gemv_core.gemv_kernel", "xpu_gemv_core.decode", "xpu_attention.decode_kernel",
        "xpu_attention.merge_kernel", "gpu_append.append_kernel", "gpu_append.hadamard32",
        "gpu_norm.operand_rows", "gpu_kv.read", "gpu_kv.field",
    }  # fmt: skip


def test_the_walk_finds_what_cuda_kernels_do() -> None:
    """Where the CUDA backend's attention starts, there are dots, assembly and barriers."""
    found = "\n".join(violations(kernels(), {("gpu_attention", "decode_attention")}).wrong)
    for what in ("tl.dot:", "tl.inline_asm_elementwise:", "tl.debug_barrier:", "tl.atomic_add:"):
        assert what in found
    assert "gpu_kv.field" in found, "reached through two modules"


HOST = """
from qrun.kernels.other import helper
WARPS = 6

@triton.jit
def kernel(x, ASM: tl.constexpr):
    helper(x, ASM)

def call(x):
    kernel[(1,)](x, ASM=x.is_cuda, num_warps={warps}{more})
"""
OTHER = """
@triton.jit
def helper(x, ASM: tl.constexpr):
    if ASM:
        tl.inline_asm_elementwise("", "", [x])
    tl.store(x, {value})
"""


@pytest.mark.parametrize(
    ("host", "other", "wanted"),
    [
        ({}, {}, ["tl.inline_asm_elementwise"]),
        ({"warps": "3"}, {}, ["num_warps", "inline_asm"]),
        ({"warps": "WARPS"}, {}, ["num_warps", "inline_asm"]),
        ({"more": ", launch_pdl=True"}, {}, ["launch_pdl", "inline_asm"]),
        ({}, {"value": "2.9e-39"}, ["inline_asm", "2.9e-39 would be a float64"]),
        ({}, {"value": "x.to(tl.float64)"}, ["inline_asm", "tl.float64"]),
    ],
)
def test_the_walk_finds(host: dict[str, str], other: dict[str, str], wanted: list[str]) -> None:
    modules = {
        "host": parsed(HOST.format(**({"warps": "4", "more": ""} | host))),
        "other": parsed(OTHER.format(**({"value": "1.0"} | other))),
    }
    found = violations(modules, {("host", "call")}).wrong
    assert len(found) == len(wanted) and all(a in b for a, b in zip(wanted, found, strict=True)), found
    # A flag that is False where the helper is called closes what it guards.
    modules["host"] = parsed(HOST.replace("helper(x, ASM)", "helper(x, False)").format(warps="4", more=""))
    found = violations(modules, {("host", "call")}).wrong
    assert not any("inline_asm" in line for line in found)


def test_warps_of_norms() -> None:
    pytest.importorskip("triton")
    from qrun.kernels.gpu_norm import _block

    for width in range(128, 32769, 128):
        warps = _block(width)[1]
        assert warps > 0 and warps & (warps - 1) == 0
