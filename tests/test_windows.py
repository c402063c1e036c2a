"""What Windows lacks is not asked of it: qrun's modules as they come up there, here, with what is Unix's taken away."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_structure import MODULES

from qrun import locks
from qrun.cli import quantize_cmd
from qrun.errors import UsageError

AS_WINDOWS = """
import _thread, importlib, os, pkgutil, signal, sys, types
import numba, numpy, prompt_toolkit, psutil, rich.console, torch, transformers, typer, jinja2, tokenizers
import qrun, huggingface_hub, llguidance, platformdirs
sys.platform = "win32"
for name in ("fcntl", "resource", "termios", "tty", "pwd", "grp", "triton"):
    sys.modules[name] = None
for name in ("SIGHUP", "SIGALRM", "SIGPIPE", "SIGUSR1", "SIGTSTP", "pthread_kill", "setitimer"):
    delattr(signal, name)
for name in ("sched_getaffinity", "O_CLOEXEC", "getuid"):
    delattr(os, name)
held = {}
def locking(handle, mode, count):
    key = os.fstat(handle).st_ino
    if held.setdefault(key, handle) != handle:
        raise PermissionError(13, "locked")
sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
for module in [name for name in sys.modules if name.startswith("qrun")]:
    del sys.modules[module]
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", AS_WINDOWS + script], capture_output=True, text=True, check=False)


def test_every_module_comes_up() -> None:
    names = [name for name in MODULES if ".gpu_" not in name and not name.endswith(("__main__", ".gguf"))]
    # What imports Triton is for NVIDIA GPUs, or imported when Triton is there; the twins of its kernels are for tests.
    beside = (
        "qrun.kernels.xpu_",
        "qrun.kernels.reference_",
        "qrun.backends.xpu_attention_triton",
        "qrun.backends.cuda",
    )
    names = [name for name in names if not name.startswith(beside)]
    assert {"qrun.cli.chat", "qrun.backends.xpu", "qrun.backends.cpu", "qrun.cli.generate"} <= set(names)
    done = run(
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "from qrun.cli import interrupt\n"
        "with interrupt.unseen_keys(), interrupt.seen_keys(), interrupt.ends_in_order(), interrupt.unbroken():\n"
        "    pass\n"
    )
    assert done.returncode == 0, done.stderr


def test_files_are_locked(tmp_path: Path) -> None:
    done = run(
        "from pathlib import Path\n"
        "from qrun import locks\n"
        f"path = Path({str(tmp_path / 'lock')!r})\n"
        "first = locks.take(path)\n"
        "assert first is not None and locks.take(path) is None\n"
        "held.clear()\n"
        "locks.let_go(path, first)\n"
        "assert not path.exists() and locks.take(path) is not None\n"
    )
    assert done.returncode == 0, done.stderr


def test_files_are_locked_here(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = locks.take(path)
    assert first is not None and locks.take(path) is None
    locks.let_go(path, first)
    assert not path.exists()
    again = locks.take(path)
    assert again is not None
    locks.let_go(path, again)
    with pytest.raises(FileNotFoundError):
        locks.take(tmp_path / "nowhere" / "lock")


def test_quantize_says_where_it_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(quantize_cmd, "sys", SimpleNamespace(platform="win32"))
    with pytest.raises(UsageError, match="on Windows, run it under WSL"):
        quantize_cmd.quantize("spark", tmp_path / "out", quantize_cmd.QuantizeOptions(quant="wint4"))
