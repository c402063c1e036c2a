"""qrun turns the language model you have into the one that fits your machine, and talks to it.

    engine = qrun.load("path/or/org/name", quant="W4A16C8", device="cpu")
    for text in qrun.Session(engine).chat("Hello"):
        print(text, end="")

Importing this package is cheap: torch is imported with the first name that needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qrun.errors import QrunError
from qrun.recipe import Recipe

if TYPE_CHECKING:
    from qrun.api import load
    from qrun.engine import Engine
    from qrun.sampler import Sampling
    from qrun.session import Session

__all__ = ["Engine", "QrunError", "Recipe", "Sampling", "Session", "__version__", "load"]
__version__ = "0.1.0"

_LATE = {"load": "qrun.api", "Engine": "qrun.engine", "Sampling": "qrun.sampler", "Session": "qrun.session"}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module 'qrun' has no attribute {name!r}")
    return getattr(import_module(_LATE[name]), name)
