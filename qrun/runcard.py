"""What was loaded and how it runs: plain data that ``info``, ``chat`` and ``bench`` print. It imports no torch."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qrun.backends.base import Binding


@dataclass(frozen=True)
class RoleLine:
    """The scheme really applied to one role: how many weights carry it, and what they take together."""

    role: str
    scheme: str
    tensors: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class RunCard:
    """Sizes in bytes, times in seconds. The peaks are of the load: resident memory, or the GPU's."""

    model: str
    family: str
    parameters: int
    active_parameters: int
    recipe: str
    roles: list[RoleLine]
    activations: str
    kv: str
    kv_bytes_per_token: int
    context: int
    backend: str
    device: str
    bindings: "list[Binding]"
    weight_bytes: int
    predicted_peak: int
    measured_peak: int
    load_seconds: float
    quantize_seconds: float
    from_store: bool
    notes: list[str] = field(default_factory=list[str])
