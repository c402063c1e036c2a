"""What kernels/ uses of numba, typed: a compiled function is called with the arguments of the one it was made from."""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, overload

P = ParamSpec("P")
R = TypeVar("R")

types: Any
config: Any

class CFunc:
    address: int
    ctypes: Any
    native_name: str

@overload
def njit(function: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def njit(*signatures: Any, **options: Any) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def cfunc(signature: Any, **options: Any) -> Callable[[Callable[..., Any]], CFunc]: ...
