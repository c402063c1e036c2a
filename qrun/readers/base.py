"""What reads a weight that another tool has quantized: from its tensors on disk to the codes that they hold.

A reader knows one tool's names and layouts, and believes nothing: shapes and types are checked against the shape that
the model's config promises before anything is read. It knows no models and no recipes.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from qrun.errors import CheckpointError, UnsupportedModelError
from qrun.formats import Format, QTensor, Shape

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_T = TypeVar("_T")


class Tensors(Protocol):
    """The tensors of a checkpoint by name; a `qrun.checkpoint.Checkpoint` is one."""

    def names(self) -> Sequence[str]: ...
    def __contains__(self, name: str) -> bool: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def read(self, name: str) -> Tensor: ...
    def metadata(self, name: str) -> Mapping[str, str]: ...


class Reader(ABC):
    """How one tool writes weights [N, K]. ``module`` is the name of a linear layer, a tensor's name without its end."""

    def __init__(self, tensors: Tensors, config: Mapping[str, Any]) -> None:
        """``config`` is the checkpoint's quantization_config. Raises `UnsupportedModelError` for what is not read."""
        self.tensors = tensors
        self.config = config

    @abstractmethod
    def holds(self, module: str) -> bool:
        """Whether the module's weight is stored quantized, in this tool's way."""

    @abstractmethod
    def parts(self, module: str) -> tuple[str, ...]:
        """Names of the tensors on disk that belong to the module's weight."""

    @abstractmethod
    def format(self, module: str, shape: Shape) -> Format:
        """The format of a held weight of ``shape`` [N, K], from headers and small tensors.

        Raises `CheckpointError` unless the tensors are there, and are what a weight of that shape is stored in, and
        `UnsupportedModelError` where it is stored in a way that is not read.
        """

    @abstractmethod
    def read(self, module: str, shape: Shape) -> QTensor:
        """The weight in that format, on the CPU. Raises as `format`."""

    def shared(self, module: str) -> object:
        """What all rows of the weight have in common beside their format, to be compared between modules."""
        del module
        return None

    @property
    def method(self) -> str:
        """What wrote the weights, as users know it."""
        return str(self.config.get("quant_method"))

    @property
    def activations(self) -> str:
        """How the tool means activations to be rounded: 16, int8 or fp8."""
        return "16"

    @property
    def cache(self) -> str:
        """The type of cache that the tool asks for; empty if it does not."""
        return ""

    def spare(self, name: str) -> bool:
        """Whether a tensor may be left out: it changes nothing that qrun computes."""
        del name
        return False

    def expect(self, name: str, shape: Shape, *dtypes: torch.dtype) -> None:
        """Raises `CheckpointError` unless the tensor is there in that shape and one of the types."""
        if name not in self.tensors:
            raise CheckpointError(f"there is no tensor {name}, which a quantized weight needs: fetch the model again")
        found, dtype = self.tensors.shape(name), self.tensors.dtype(name)
        if found != tuple(shape) or (dtypes and dtype not in dtypes):
            raise CheckpointError(
                f"{name} is {_short(dtype)} {list(found)}, but its config.json makes it "
                f"{' or '.join(map(_short, dtypes)) or 'a tensor'} {list(shape)}: the files belong to different models"
            )

    def setting(self, key: str, kind: type[_T], default: _T | None = None) -> _T:
        """A value of the config. Raises `UnsupportedModelError` if it is missing or of another type."""
        return setting(self.config, key, kind, default)


def setting(config: Mapping[str, Any], key: str, kind: type[_T], default: _T | None = None) -> _T:
    """A value of a quantization config. Raises `UnsupportedModelError` if it is missing or of another type."""
    value = config.get(key, default)
    if value is None and default is not None:
        value = default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UnsupportedModelError(
            f"config.json: quantization_config has {key} {value!r}, which is no {kind.__name__}: fetch the model again"
        )
    return value


def refuse(what: str) -> UnsupportedModelError:
    """The error for a quantization that is not read."""
    return UnsupportedModelError(f"{what}, which qrun cannot read: give the unquantized checkpoint and --quant")


def mapping(value: object) -> Mapping[str, Any]:
    """A JSON object, or an empty one in the place of anything else."""
    return cast(Mapping[str, Any], value) if isinstance(value, dict) else {}


def strings(value: object) -> list[str]:
    """The strings of a JSON list, or none."""
    items = cast(list[object], value) if isinstance(value, list) else []
    return [item for item in items if isinstance(item, str)]


def matches(pattern: str, module: str) -> bool:
    """Whether an untrusted regular expression matches a module's name from its beginning."""
    if len(pattern) > 500 or re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 5:
        raise refuse(f"quantization_config with the pattern {pattern[:80]!r}")
    try:
        return re.match(pattern, module) is not None
    except (re.error, RecursionError, OverflowError):
        raise refuse(f"quantization_config with the pattern {pattern[:80]!r}") from None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
