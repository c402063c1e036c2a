"""qrun straight from its source tree: nothing installed, and clear words about the packages that are missing.

The tree keeps `qrun.backends` and `qrun.kernels` beside `qrun`, where only an installation maps them. In this process a
second entry in the package's search path does the same; for others there is a folder of links. It knows nothing of
what is then run.
"""

import re
import sys
import tomllib
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]


def use() -> None:
    """Make `qrun`, `qrun.backends` and `qrun.kernels` importable here."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    qrun = import_module("qrun")
    if find_spec("qrun.kernels") is None:
        qrun.__path__.append(str(ROOT))


def link(folder: Path) -> None:
    """Make a package `qrun` of links in a folder, for PYTHONPATH."""
    package = folder / "qrun"
    package.mkdir()
    for path in [*(ROOT / "qrun").iterdir(), ROOT / "backends", ROOT / "kernels"]:
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)


def versions() -> tuple[dict[str, str], list[str]]:
    """The versions of what qrun depends on, and which of it is not there."""
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: dict[str, str] = {}
    missing: list[str] = []
    for wanted in [*setup["dependencies"], "triton", "pytest", "pytest-timeout", "pytest-xdist"]:
        name = re.split(r"[<>=!~;\[ ]", wanted)[0]
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            missing.append(name)
    return found, missing
