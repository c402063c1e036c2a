"""Shared fixtures: every test has cache and state directories of its own, and nothing reaches a network."""

import os
import sys
from pathlib import Path

import pytest
import torch

from qrun.kernels.cpu_pool import HOME

# Triton decides at import whether its kernels are compiled or interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# `python -m pytest` puts the root first on the path, where transformers would take kernels/ for another project.
sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != Path(__file__).parents[1]]


# Compiled kernels are the one thing that tests share, with the processes they start and with the next run.
os.environ.setdefault("NUMBA_CACHE_DIR", str(HOME))


@pytest.fixture(autouse=True)
def own_directories(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point the user's directories into the test's own folder."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("QRUN_CACHE_DIR", str(home / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "config"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("QRUN_CONFIG", raising=False)
    return home
