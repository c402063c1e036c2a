"""The borders of the house: who may import whom, what `qrun --help` loads, and what the package lists."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the ground up. A module belongs to the longest name that begins its own; it imports from its layer or below.
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "qrun.errors",
        "qrun.kernels",
        "qrun.bench_compare",
        "qrun.spark",
        "qrun.paths",
        "qrun.aliases",
        "qrun.repetition",
        "qrun.resident",
        "qrun.free",
        "qrun.locks",
    ),
    ("qrun.doctor_check", "qrun.doctor_environment", "qrun.doctor_machine", "qrun.doctor_versions"),
    (
        "qrun.recipe",
        "qrun.tensorfile",
        "qrun.reasoning",
        "qrun.template",
        "qrun.template_worker",
        "qrun.tokenizer_files",
        "qrun.gguf_file",
        "qrun.gguf_names",
        "qrun.gguf_model",
    ),
    ("qrun.formats",),
    ("qrun.cache", "qrun.readers"),
    ("qrun.backends", "qrun.doctor_kernels", "qrun.doctor_tiers"),
    ("qrun.models",),
    (
        "qrun.checkpoint",
        "qrun.assign",
        "qrun.store",
        "qrun.memory",
        "qrun.names",
        "qrun.hub",
        "qrun.outline",
        "qrun.fit",
        "qrun.runcard",
        "qrun.bandwidth",
        "qrun.doctor_devices",
        "qrun.snapshot",
        "qrun.gguf_checkpoint",
    ),
    ("qrun.sampler", "qrun.logprobs", "qrun.tokenizer", "qrun.grammar", "qrun.transcript", "qrun.gguf_tokenizer"),
    ("qrun.loader",),
    ("qrun.engine", "qrun.generation", "qrun.batch", "qrun.quantize"),
    ("qrun.api", "qrun.contender"),
    (
        "qrun.reply",
        "qrun.recall",
        "qrun.question",
        "qrun.session",
        "qrun.bench",
        "qrun.eval",
        "qrun.plot",
        "qrun.doctor_model",
        "qrun.doctor",
    ),
    ("qrun",),
    ("qrun.cli",),
)
# A library and the only modules that may import it.
CONFINED = {
    "rich": "qrun.cli.console",
    "huggingface_hub": "qrun.hub",
    "numba": "qrun.kernels",
    "triton": "qrun.kernels",
    "typer": "qrun.cli",
    "prompt_toolkit": "qrun.cli",
    "llguidance": "qrun.grammar",
    "matplotlib": "qrun.plot",
    "gguf": "qrun.readers.gguf",
}
NEVER = ("click", "transformers", "tests", "tools", "benchmarks", "backends", "kernels")


def _modules() -> dict[str, Path]:
    """Every module of the package by its import name."""
    found: dict[str, Path] = {}
    for folder, package in (("qrun", "qrun"), ("backends", "qrun.backends"), ("kernels", "qrun.kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


MODULES = _modules()


def _is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def _imports(name: str, *, at_import: bool = False) -> Iterator[str]:
    """The modules that `name` imports; with `at_import`, only those that run when it is imported itself."""
    path = MODULES[name]
    stack: list[ast.AST] = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while stack:
        node = stack.pop()
        if at_import and (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _is_type_checking(node)):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
                base = ".".join((*package[: len(package) - node.level + 1], *([base] if base else [])))
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in MODULES else base
        stack.extend(ast.iter_child_nodes(node))


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def _layer(name: str) -> int:
    def depth(layer: int) -> int:
        return max((len(package) for package in LAYERS[layer] if _within(name, package)), default=-1)

    return max(range(len(LAYERS)), key=depth)


def test_every_module_has_a_layer() -> None:
    known = {name for layer in LAYERS for name in layer}
    assert {name for name in MODULES if name.count(".") <= 1} == known, "give a module its layer, as low as it can be"


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downward(name: str) -> None:
    for other in _imports(name):
        if not _within(other, "qrun"):
            continue
        assert other in MODULES, f"{name} imports {other}, which does not exist"
        assert _layer(other) <= _layer(name), f"{name} imports {other} from a layer above it"
        if _within(name, "qrun.kernels"):
            assert _within(other, "qrun.kernels"), f"{name} imports {other}: kernels know nothing of qrun"


def test_no_import_cycles() -> None:
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in _imports(name, at_import=True):
                if other in MODULES and other != name:
                    visit(other, (*trail, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


@pytest.mark.parametrize("name", MODULES)
def test_libraries_stay_in_their_place(name: str) -> None:
    for other in _imports(name):
        top = other.split(".")[0]
        assert top not in NEVER, f"{name} imports {other}"
        owner = CONFINED.get(top)
        assert owner is None or _within(name, owner), f"{name} imports {other}: only {owner} does"


def test_only_the_backends_package_names_its_devices() -> None:
    devices = {name for name in MODULES if _within(name, "qrun.backends")} - {"qrun.backends", "qrun.backends.base"}
    assert devices
    for name in MODULES:
        if not _within(name, "qrun.backends"):
            assert not devices & set(_imports(name)), f"{name} names a device module"
    assert not devices & set(_imports("qrun.backends", at_import=True)), "device modules must be imported when asked"


def test_every_package_is_listed() -> None:
    """A sub-package missing from pyproject.toml works in an editable install and is silently absent from the wheel."""
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packages = {name if path.stem == "__init__" else name.rpartition(".")[0] for name, path in MODULES.items()}
    assert sorted(setup["packages"]) == sorted(packages)
    for name, path in MODULES.items():
        assert name not in packages or path.stem == "__init__", f"{name} has no __init__.py"
    patterns = setup["package-data"]["qrun.spark"]
    for path in (ROOT / "qrun" / "spark").iterdir():
        if path.suffix != ".py" and path.is_file():
            assert any(path.match(pattern) for pattern in patterns), f"{path.name} is not packaged"


def test_tests_are_no_package() -> None:
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_typing_links() -> None:
    for name in ("backends", "kernels"):
        assert (ROOT / ".typings" / "qrun" / name).resolve() == ROOT / name


def test_kernels_refuse_another_name() -> None:
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import kernels"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "qrun.kernels" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["chat", "--help"]], ids=" ".join)
def test_help_does_not_import_torch(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        "from qrun.cli.main import run\n"
        f"sys.argv = ['qrun', *{arguments!r}]\n"
        "try:\n    run()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'numba', 'transformers', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
