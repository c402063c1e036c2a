from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
C = TypeVar("C", bound=type)

models: Any

def intrinsic(function: Callable[Concatenate[Any, P], Any]) -> Callable[P, Any]: ...
def register_model(kind: type) -> Callable[[C], C]: ...
