"""The kernels one by one, from memory that no cache holds, beside what PyTorch and cuBLAS do: which rows there are."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from qrun.kernels.gpu_gemm_fp8 import TILES as TILES_FP8
from qrun.kernels.gpu_gemm_int8 import TILES as TILES_INT8
from qrun.recipe import CacheType
from tools.gpu_check_job import Job, Record
from tools.gpu_check_models import release
from tools.gpu_check_ours import SCHEMES, Bench, card, tuned
from tools.gpu_check_theirs import ATTENTION, FEW, MANY, cublas
from tools.gpu_check_timing import Work, seconds

SHAPES: Final = ((14336, 4096), (4096, 14336), (4096, 4096))
"""Rows by columns."""
FIRST: Final = ("int4 g64", "int8", "bf16", "fp8")
"""The formats that are looked at more closely."""
HEADS: Final = ((32, 8, 128), (20, 4, 128))
"""Query heads, kv heads and their width: Llama-3.1-8B's and ERNIE-4.5-21B-A3B's."""
LENGTHS: Final = (1024, 32768)
CACHES: Final[tuple[CacheType, ...]] = ("bf16", "int8", "int4", "fp8")
PREFILL: Final = 2048


@dataclass(frozen=True)
class Item:
    """One row of a table: ``what`` is the table, ``kernel`` and ``shape`` the row."""

    what: str
    kernel: str
    shape: str
    make: Callable[[], Work]

    @property
    def key(self) -> str:
        return f"{self.what}: {self.kernel}, {self.shape}"


def items(bench: Bench, *, quick: bool) -> Iterator[Item]:
    """Everything, the most important first."""
    for n, k in SHAPES[:1] if quick else SHAPES:
        shape = f"{n}x{k}"
        for name, theirs in FEW.items():
            yield Item("1 token", name, shape, lambda n=n, k=k, theirs=theirs: theirs(1, n, k))
        for name in FIRST if quick else SCHEMES:
            yield Item("1 token", name, shape, lambda n=n, k=k, name=name: bench.few(1, name, n, k))
    yield from _attention(bench, quick=quick)
    yield from _prefill(bench, quick=quick)
    if quick:
        return
    for down in (False, True):
        shape = "8 of 64 downs 2560x1536" if down else "8 of 64 gate_ups 3072x2560"
        for name in FIRST:
            yield Item(
                "experts", name, shape,
                lambda name=name, down=down: bench.experts(name, 2560, 1536, experts=64, slots=8, down=down),
            )  # fmt: skip
    for tokens in (8, 32):
        n, k = SHAPES[0]
        yield Item(f"{tokens} tokens", "cuBLAS bf16", f"{n}x{k}", lambda tokens=tokens: cublas(tokens, *SHAPES[0]))
        for name in FIRST:
            yield Item(
                f"{tokens} tokens", name, f"{n}x{k}",
                lambda tokens=tokens, name=name: bench.few(tokens, name, *SHAPES[0]),
            )  # fmt: skip


def _attention(bench: Bench, *, quick: bool) -> Iterator[Item]:
    for length in LENGTHS:
        for heads, kv_heads, dim in HEADS[:1] if quick else HEADS:
            shape = f"{heads}/{kv_heads}x{dim}"
            sizes = (heads, kv_heads, dim, length)
            for name, theirs in ATTENTION.items():
                yield Item(f"attention {length}", name, shape, lambda sizes=sizes, theirs=theirs: theirs(*sizes))
            for kv in CACHES:
                yield Item(f"attention {length}", kv, shape, lambda kv=kv, sizes=sizes: bench.attention(kv, *sizes))


def _prefill(bench: Bench, *, quick: bool) -> Iterator[Item]:
    what = f"{PREFILL} tokens"
    for n, k in SHAPES[:1] if quick else SHAPES[:2]:
        shape = f"{n}x{k}"
        for name, theirs in MANY.items():
            yield Item(what, name, shape, lambda n=n, k=k, theirs=theirs: theirs(PREFILL, n, k))
        yield Item(what, "int8 GEMM", shape, lambda n=n, k=k: bench.gemm_int8(PREFILL, n, k, None))
        yield Item(what, "fp8 GEMM", shape, lambda n=n, k=k: bench.gemm_fp8(PREFILL, n, k, None))
        for name, activations in (("int4 g64", "16"), ("int8", "int8"), ("fp8", "fp8")):
            yield Item(
                what, f"{name} A{activations.removeprefix('int')} whole", shape,
                lambda n=n, k=k, name=name, act=activations: bench.many(PREFILL, name, n, k, act),
            )  # fmt: skip
    if quick:
        return
    n, k = SHAPES[0]
    for tile in TILES_INT8:
        label = f"int8 GEMM {tile.rows}x{tile.columns}"
        yield Item(what, label, f"{n}x{k}", lambda tile=tile: bench.gemm_int8(PREFILL, *SHAPES[0], tile))
    for tile in TILES_FP8:
        label = f"fp8 GEMM {tile.rows}x{tile.columns}"
        yield Item(what, label, f"{n}x{k}", lambda tile=tile: bench.gemm_fp8(PREFILL, *SHAPES[0], tile))


def measure_kernels(job: Job) -> None:
    """A row for every item; then the program shapes that the backend's own tuning finds."""
    for item in items(card(), quick=job.quick):
        job.attempt(item.key, lambda item=item: time_item(item))
        release(job.device)
    n, k = SHAPES[0]
    for name in () if job.quick else FIRST:
        item = Item("1 token", f"{name} tuned", f"{n}x{k}", lambda name=name: _tuned(name, *SHAPES[0]))
        job.attempt(item.key, lambda item=item: time_item(item), least=40)
        release(job.device)


def time_item(item: Item) -> Record:
    """Seconds of one call, and what it has to read or compute."""
    work = item.make()
    row: Record = {"what": item.what, "kernel": item.kernel, "shape": item.shape}
    row |= {"bytes": work.bytes, "operations": work.operations, "copies": len(work.calls)}
    return row | {"seconds": seconds(work.calls)}


def _tuned(name: str, n: int, k: int) -> Work:
    bench, prepare = tuned()
    work = bench.few(1, name, n, k)
    prepare()
    return work
