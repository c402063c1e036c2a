"""Threads that run small programs of kernels together.

A program is a table of rows (kernel, arguments). Threads take pieces of a row's work from a counter, and a row is
over when its pieces are done, whoever did them: there is no barrier, so a thread that the system takes off its core
delays the others by at most the piece in its hands, and a sleeping one not at all. The counters carry the number of
the job, so a thread that comes late finds nothing to take. A whole transformer block is thus one call from Python.
Idle threads spin for about a millisecond, long enough to meet the next block, and then sleep. Knows nothing of what
the kernels compute.
"""
# pyright: basic

import hashlib
import os
import threading
import weakref
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import platformdirs
from numba import cfunc, config, njit, types

from qrun.kernels.cpu_simd import (
    atomic_add,
    atomic_get,
    atomic_replace,
    atomic_set,
    call_kernel,
    get_f32,
    get_i64,
    pause,
    yield_core,
)

ARGS = 64  # int64 words of a row's arguments
FIRST = 16  # the kernel's own first word; before it, on two cache lines, what is taken and what is done
_DONE = 64
_JOB, _PROGRAM, _ROWS, _STOP, _ASLEEP = 0, 64, 72, 128, 192
_STATE_WORDS = 32
_IDLE_SPINS = 20_000
_WAIT_SPINS = 1_000
_I = types.int64
Array: TypeAlias = np.ndarray[Any, Any]


def _home() -> Path:
    """Where machine code is kept: in the user's cache, since site-packages may be read-only.

    Apart for every state of the sources, since Numba itself looks only at the file that a function stands in.
    """
    base = os.environ.get("QRUN_CACHE_DIR")
    root = Path(base).expanduser() if base else platformdirs.user_cache_path("qrun", appauthor=False)
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("cpu_*.py")):
        digest.update(path.read_bytes())
    return root / "kernels" / digest.hexdigest()[:16]


HOME = _home()


def _kept(decorate: Any) -> Any:
    """The decorator, with its functions' machine code in HOME, or where NUMBA_CACHE_DIR says."""

    def wrap(function):
        before = config.CACHE_DIR
        config.CACHE_DIR = before or str(HOME)
        try:
            return decorate(function)
        finally:
            config.CACHE_DIR = before

    return wrap


inline: Any = njit(forceinline=True, error_model="numpy")
kernel = _kept(cfunc(types.int64(_I, _I, _I), cache=True, error_model="numpy"))
"""A kernel (arguments, thread, job) -> how many pieces of work its row has."""


@inline
def arg(args, index):
    """Argument `index` of a row: an address or a number."""
    return get_i64(args + 8 * (FIRST + index))


@inline
def arg_f32(args, index):
    return get_f32(args + 8 * (FIRST + index))


@_kept(njit(_I(_I, _I, _I, _I), nogil=True, cache=True))
def take(args, job, count, step):
    """The next `step` pieces of a row's `count` begin here; `count` where none are left, or the job is over."""
    while True:
        word = atomic_get(args)
        n = word & 0xFFFFFFFF
        if word >> 32 != job or n >= count:
            return count
        if atomic_replace(args, word, word + step) == word:
            return n


@_kept(njit(_I(_I, _I, _I, _I, _I), nogil=True, cache=True))
def more(args, job, count, step, n):
    """As `take`, after the pieces from `n` on are done."""
    atomic_add(args + _DONE, min(step, count - n))
    return take(args, job, count, step)


@_kept(njit(types.void(_I, _I, _I, _I), nogil=True, cache=True))
def _run_rows(program, rows, thread, job):
    for i in range(rows):
        args = get_i64(program + 16 * i + 8)
        if atomic_get(args) >> 32 != job:
            return
        count = call_kernel(get_i64(program + 16 * i), args, thread, job)
        spins = 0
        while atomic_get(args + _DONE) < count:
            if atomic_get(args) >> 32 != job:
                return
            spins += 1
            if spins > _WAIT_SPINS:
                yield_core()
            else:
                pause()


@_kept(njit(_I(_I, _I, _I), nogil=True, cache=True))
def _serve(state, thread, seen):
    """Runs programs as they come; returns the last one's number when there has been none for a while."""
    spins = 0
    while atomic_get(state + _STOP) == 0:
        job = atomic_get(state + _JOB)
        if job != seen:
            program, rows = atomic_get(state + _PROGRAM), atomic_get(state + _ROWS)
            if atomic_get(state + _JOB) == job:
                _run_rows(program, rows, thread, job)
                seen = job
            spins = 0
        spins += 1
        if spins > _IDLE_SPINS:
            return seen
        pause()
    return seen


@_kept(njit(types.void(_I, _I, _I), nogil=True, cache=True))
def _run(state, program, rows):
    """Runs a program with whichever threads are awake."""
    # An odd number announces a program that is not complete yet; its rows are open only for the even one that follows.
    job = (atomic_add(state + _JOB, 1) + 2) & 0x3FFFFFFF
    atomic_set(state + _PROGRAM, program)
    atomic_set(state + _ROWS, rows)
    for i in range(rows):
        args = get_i64(program + 16 * i + 8)
        atomic_set(args + _DONE, 0)
        atomic_set(args, job << 32)
    atomic_set(state + _JOB, job)
    _run_rows(program, rows, 0, job)
    for i in range(rows):
        atomic_set(get_i64(program + 16 * i + 8), -1)


@_kept(njit(_I(_I, _I), cache=True))
def atomic_count(address, change):
    return atomic_add(address, change)


def aligned(count: int, dtype: Any) -> Array:
    """Zeros, on a cache line of their own."""
    size = count * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype)


class Program:
    """Rows of kernels with their arguments: numbers, or arrays and tensors, which it keeps alive.

    Arguments may be changed between runs: `program.words[row, FIRST + index]`.
    """

    def __init__(self, size: int = 16) -> None:
        self.rows = 0
        self.words: Array = aligned(size * ARGS, np.int64).reshape(size, ARGS)
        self.table: Array = np.zeros((size, 2), np.int64)
        self.place: int = self.table.ctypes.data
        self._floats = self.words.view(np.float32)
        self._keep: list[object] = []

    def add(self, kernel: int, *values: object) -> int:
        """Append a row; the values' places are their indices. Returns the row."""
        row = self.rows
        if row == len(self.table):
            raise ValueError(f"a program of {row} rows is full")
        self.table[row] = kernel, self.words[row].ctypes.data
        for index, value in enumerate(values):
            self.put(row, index, value)
        self.rows += 1
        return row

    def put(self, row: int, index: int, value: object) -> None:
        """Set one argument; what owns memory is kept as long as the program."""
        if isinstance(value, float):
            self._floats[row, 2 * (FIRST + index)] = value
        elif value is None:
            self.words[row, FIRST + index] = 0
        elif isinstance(value, int):
            self.words[row, FIRST + index] = value
        else:
            self._keep.append(value)
            self.words[row, FIRST + index] = address(value)


def address(value: Any) -> int:
    """Where an array or tensor begins."""
    return value.ctypes.data if isinstance(value, np.ndarray) else value.data_ptr()


class Pool:
    """`threads` threads, the caller's included. One program runs at a time; callers wait for one another."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._memory = aligned(_STATE_WORDS, np.int64)
        self._state = self._memory.ctypes.data
        self._lock = threading.Lock()
        self._wake = [threading.Event() for _ in range(1, threads)]
        # A late thread may still read the rows of a program: none may vanish before the threads do.
        self._programs: set[Program] = set()
        workers: list[threading.Thread] = []
        for number, wake in enumerate(self._wake, 1):
            arguments = (self._memory, wake, number, self._programs)
            workers.append(threading.Thread(target=_worker, args=arguments, name=f"qrun-{number}", daemon=True))
            workers[-1].start()
        self._finalizer = weakref.finalize(self, _stop, self._memory, self._wake, workers)

    def run(self, program: Program) -> None:
        """Run every row of a program."""
        with self._lock:
            if self._memory[_ASLEEP // 8]:
                for wake in self._wake:
                    wake.set()
            self._programs.add(program)
            _run(self._state, program.place, program.rows)


def _worker(memory, wake, thread, programs):
    seen = 0
    state = memory.ctypes.data
    while memory[_STOP // 8] == 0:
        seen = _serve(state, thread, seen)
        wake.clear()
        atomic_count(state + _ASLEEP, 1)
        if memory[_STOP // 8] == 0:  # or the end came before the clearing, which took its call away
            wake.wait()
        atomic_count(state + _ASLEEP, -1)


def _stop(memory, wakes, workers):
    """Also at exit: an interpreter that ends under a thread in compiled code aborts."""
    memory[_STOP // 8] = 1
    for wake in wakes:
        wake.set()
    for worker in workers:
        if worker is not threading.current_thread():
            worker.join()
