"""The decode step as a GPU's graphs: recorded once per range of lengths, replayed per token. It knows only that a step
is a function of a token and a position that does the same launches whatever their values."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qrun.cache import KVCache

FIRST_LIMIT = 1024
"""The lengths of the first graph; each further one reaches twice as far, so attention's grid fits its length."""


class GraphStep:
    """A token [1] -> the next logits [1, V], appended to the cache. The logits lie where the next call puts its own."""

    def __init__(self, step: Callable[[Tensor, Tensor, int], Tensor], cache: KVCache, device: torch.device) -> None:
        self._step, self._cache = step, cache
        self._token = torch.zeros(1, dtype=torch.long, device=device)
        self._position = torch.zeros(1, dtype=torch.long, device=device)
        self._graphs: dict[int, tuple[Any, Tensor]] = {}
        self._pool: Any = None
        # CUDA's and Intel's modules have the same names in torch, but for the graph itself.
        self._module: Any = torch.get_device_module(device)
        self._graph: Any = torch.xpu.XPUGraph if device.type == "xpu" else torch.cuda.CUDAGraph

    def __call__(self, token: Tensor) -> Tensor:
        length = self._cache.length
        limit = min(FIRST_LIMIT << max(0, (length // FIRST_LIMIT).bit_length()), self._cache.capacity)
        self._token.copy_(token)
        self._position.fill_(length)
        if limit not in self._graphs:
            self._graphs[limit] = self._record(limit)
        graph, logits = self._graphs[limit]
        graph.replay()
        self._cache.length = length + 1
        return logits

    def _record(self, limit: int) -> tuple[Any, Tensor]:
        """Run the step as it is, for what it compiles and allocates, then record it. Both write the same position."""
        length, module = self._cache.length, self._module
        aside = module.Stream()
        aside.wait_stream(module.current_stream())
        with module.stream(aside):
            for _ in range(2):
                self._run(length, limit)
        module.current_stream().wait_stream(aside)
        graph = self._graph()
        with module.graph(graph, pool=self._pool):
            logits = self._run(length, limit)
        self._pool = self._pool or graph.pool()
        return graph, logits

    def _run(self, length: int, limit: int) -> Tensor:
        self._cache.length = length
        logits = self._step(self._token, self._position, limit)
        self._cache.length = length
        return logits
