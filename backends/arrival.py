"""A token on its way from a GPU to the host. It knows neither what made it nor what it is for."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Arrival:
    """Copies tokens behind what makes them and before what is launched next, which is not waited for."""

    def __init__(self, device: torch.device) -> None:
        self._token = torch.zeros(1, dtype=torch.long, pin_memory=True)
        module: Any = torch.get_device_module(device)
        self._event: Any = module.Event()

    def __call__(self, token: Tensor) -> Callable[[], int]:
        """What gives the value of a token [1] on the device, once it is there. One at a time is under way."""
        self._token.copy_(token, non_blocking=True)
        self._event.record()

        def value() -> int:
            self._event.synchronize()
            return int(self._token)

        return value
