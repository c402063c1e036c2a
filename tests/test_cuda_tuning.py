"""What is measured once and kept, and which recording serves which length; the device's part is stood in for."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_doubles import DEVICE, card
from torch import Tensor

pytest.importorskip("triton")

from qrun.backends.cuda_matrix import pack
from qrun.backends.cuda_tuning import CANDIDATES, Tuner, candidates, key_of
from qrun.backends.graphs import FIRST_LIMIT, GraphStep
from qrun.cache import KVCache
from qrun.formats import format_of, kv_format
from qrun.kernels.gpu_gemv import Config, default_config
from qrun.kernels.gpu_packed import Packed
from qrun.recipe import WeightScheme


def weight(rows: int = 256, columns: int = 1024, bits: int = 4) -> Packed:
    scheme = WeightScheme("int", bits, 64, False) if bits < 8 else WeightScheme("int", 8, 0)
    found = pack(format_of(scheme).quantize(torch.randn(rows, columns)).to(DEVICE), torch.float16)
    assert found is not None
    return found


class Timed(Tuner):
    """A tuner whose clock likes many pieces, and counts."""

    turns = 0

    def _time(self, config: Config, weights: list[Packed]) -> float:
        self.turns += 1
        return 1 / config.split + config.stages / 100


def test_results_are_kept_for_the_next_start(tmp_path: Path) -> None:
    real = replace(card(), captures=True)
    told: list[str] = []
    tuner = Timed(real, told.append, folder=tmp_path)
    w, narrow = weight(), weight(columns=128)
    for one in (w, w, narrow):
        tuner.register(one)
    tuner.tune()
    assert len(told) == 2 and "1 of 2" in told[0]
    best = tuner.config(w, 8)
    assert best.split == max(config.split for config in candidates(w, real)) and best.stages == 3
    assert tuner.config(w, 16) == default_config(w, 16, real.processors), "only what single tokens run is tuned"
    again = Timed(real, told.append, folder=tmp_path)
    again.register(w)
    again.tune()
    assert again.turns == 0 and len(told) == 2 and again.config(w, 8) == best


@pytest.mark.parametrize("content", ["", "{", "[]", '{"int4": 3}', '{"int4": {"rows": "many"}}', '{"int4": {"x": 1}}'])
def test_a_damaged_file_is_measured_again(tmp_path: Path, content: str) -> None:
    real = replace(card(), captures=True)
    first = Timed(real, lambda what: None, folder=tmp_path)
    first.register(weight())
    first.tune()
    (kept,) = tmp_path.iterdir()
    kept.write_text(content)
    assert Timed(real, lambda what: None, folder=tmp_path).config(weight(), 8) == default_config(
        weight(), 8, real.processors
    )


def test_candidates_are_few_and_possible() -> None:
    for w in (weight(), weight(rows=128), weight(columns=128), weight(bits=8)):
        found = candidates(w, card())
        assert found[0] == default_config(w, 8, card().processors)
        assert 1 <= len(found) <= CANDIDATES and len(set(found)) == len(found)
        assert all(w.rows % config.rows == 0 and config.split <= w.width // w.tile for config in found)


def test_an_interpreter_is_not_tuned(tmp_path: Path) -> None:
    tuner = Timed(replace(card(), captures=False), lambda what: None, folder=tmp_path)
    tuner.register(weight())
    tuner.tune()
    assert tuner.turns == 0 and not list(tmp_path.iterdir())


def test_the_key_tells_apart_what_runs_apart() -> None:
    keys = {key_of(w) for w in (weight(), weight(columns=128), weight(rows=128), weight(bits=8))}
    assert len(keys) == 4


class Replayed(GraphStep):
    """Runs again what a graph would replay: into the same logits, from the same token and position."""

    recorded = 0

    def _record(self, limit: int) -> tuple[Any, Tensor]:
        self.recorded += 1
        logits = self._run(self._cache.length, limit)

        class Graph:
            @staticmethod
            def replay() -> None:
                logits.copy_(self._run(self._cache.length, limit))

        return Graph, logits


def test_a_recording_serves_every_length_below_its_limit() -> None:
    kind = kv_format("bf16")
    cache = KVCache(
        layers=1, kv_heads=1, head_dim=2, capacity=3 * FIRST_LIMIT, k=kind, v=kind, device=torch.device("cpu")
    )
    limits: list[int] = []

    def step(token: Tensor, position: Tensor, limit: int) -> Tensor:
        limits.append(limit)
        assert int(position) < limit
        cache.length += 1  # as a forward does
        return (token + 1000 * position).float()[None]

    graph = Replayed(step, cache, torch.device("cpu"))
    for length in (0, 1, FIRST_LIMIT - 1, FIRST_LIMIT, 2 * FIRST_LIMIT, 3 * FIRST_LIMIT - 1, 5):
        cache.length = length
        assert graph(torch.tensor([7])).item() == 7 + 1000 * length
        assert cache.length == length + 1
        assert limits[-1] >= length + 1
    assert graph.recorded == 3 and max(limits) == cache.capacity
