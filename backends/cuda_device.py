"""The NVIDIA card that is there, or in one line why there is none to be used. It knows no model and no kernel."""

from dataclasses import dataclass
from importlib.util import find_spec

import torch

from qrun.errors import BackendError

LEAST = (8, 0)
"""The compute capability the kernels are compiled for: Ampere, with bfloat16 tensor cores."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """A device and what follows from it. half: what its tensor cores multiply; captures: it records CUDA graphs."""

    device: torch.device
    name: str
    capability: tuple[int, int]
    processors: int
    memory: int
    half: torch.dtype = torch.bfloat16
    captures: bool = True

    @property
    def has_fp8(self) -> bool:
        """Whether its tensor cores multiply e4m3 (Ada, Hopper and later)."""
        return self.captures and self.capability >= (8, 9)

    @property
    def description(self) -> str:
        major, minor = self.capability
        return f"{self.name}, {self.memory / 1e9:.0f} GB, sm_{major}{minor}"


def find_card() -> Card:
    """The current CUDA device.

    Raises BackendError where there is none, it is too old, or a library is missing; the message says what to do.
    """
    if torch.version.cuda is None:
        raise BackendError(
            f"torch {torch.__version__} is built without CUDA: install the CUDA build from pytorch.org, or use --device cpu"
        )
    if not torch.cuda.is_available():
        raise BackendError(
            "no NVIDIA GPU can be used: its driver is missing or too old for CUDA "
            f"{torch.version.cuda} (see nvidia-smi); install one, or use --device cpu"
        )
    try:
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        torch.zeros(1, device="cuda")
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise BackendError(
            f"the NVIDIA GPU cannot be used now ({reason}): see nvidia-smi, or use --device cpu"
        ) from error
    if (found.major, found.minor) < LEAST:
        raise BackendError(
            f"{found.name} is sm_{found.major}{found.minor}; qrun's kernels need sm_80 or later (Ampere, 2020): "
            "use --device cpu"
        )
    if find_spec("triton") is None:
        raise BackendError(
            "the CUDA backend needs triton, which is not installed: pip install triton (a CUDA torch brings it along), "
            "or use --device cpu"
        )
    return Card(
        device=torch.device("cuda", torch.cuda.current_device()),
        name=found.name,
        capability=(found.major, found.minor),
        processors=found.multi_processor_count,
        memory=found.total_memory,
    )
