"""Many tokens through a weight of floats: BF16 or FP32 rows, unpacked 64 at a time, against float32 activations."""
# pyright: basic

from functools import cache

from qrun.kernels.cpu_gemm import BATCH, finish, source_row
from qrun.kernels.cpu_plain import load_plain, load_plain_first
from qrun.kernels.cpu_pool import arg, inline, kernel, more, take
from qrun.kernels.cpu_simd import prefetch, store_f32
from qrun.kernels.cpu_tile import TOKENS, WIDTH, tile_fma, tile_load, tile_store, transpose, zero_floats

DEPTH = 256  # columns of a tile's weights that stay in the first-level caches while all tokens pass


def scratch_size(columns: int) -> int:
    """Bytes of scratch a thread needs, a multiple of 64."""
    return 4 * WIDTH * (-(-columns // 16) * 16 + BATCH) + 1024


@inline
def _unpack(bf16, a, first, packed, temp):
    columns, count, pairs = arg(a, 1), arg(a, 4), arg(a, 10)
    size = 2 if bf16 else 4
    for corner in range(0, WIDTH, 16):
        for k in range(0, columns, 16):
            for c in range(16):
                at = arg(a, 0) + size * (source_row(corner + c, first, count, pairs) * columns + k)
                prefetch(at + 16 * size * columns)
                if columns - k >= 16:
                    store_f32(temp + 64 * c, load_plain(bf16, at))
                else:
                    store_f32(temp + 64 * c, load_plain_first(bf16, at, columns - k))
            transpose(temp, 64, packed + 4 * (k * WIDTH + corner), 4 * WIDTH)


@inline
def _batch(a, tokens, x, packed, sums):
    columns, stride = arg(a, 1), arg(a, 3)
    for start in range(0, columns, DEPTH):
        for i in range(0, tokens, TOKENS):
            tile = zero_floats()
            if start > 0:
                tile = tile_load(sums + 4 * WIDTH * i)
            for k in range(start, min(start + DEPTH, columns)):
                tile = tile_fma(tile, packed + 4 * WIDTH * k, x + i * stride + 4 * k, stride)
            tile_store(sums + 4 * WIDTH * i, tile)


@cache
def plain(bf16: bool) -> int:
    """The kernel's address.

    Arguments: 0 weight, 1 K, 2 x (rows up to a multiple of 6), 3 its stride in bytes, 4 outputs (or pairs), 5 tokens,
    6 out, 7 its stride, 8 bias or none, 9 residual (out's stride) or none, 10 whether pairs, 11 scratch, 12 its bytes
    a thread.
    """

    @kernel
    def run(a, thread, job):
        packed = arg(a, 11) + thread * arg(a, 12)
        sums = packed + 4 * WIDTH * ((arg(a, 1) + 15) // 16 * 16)
        temp = sums + 4 * BATCH * WIDTH
        count, total, pairs, stride = arg(a, 4), arg(a, 5), arg(a, 10), arg(a, 7)
        step = WIDTH // 2 if pairs != 0 else WIDTH
        first = take(a, job, count, step)
        while first < count:
            _unpack(bf16, a, first, packed, temp)
            for s0 in range(0, total, BATCH):
                tokens = min(BATCH, total - s0)
                _batch(a, tokens, arg(a, 2) + s0 * arg(a, 3), packed, sums)
                residual = arg(a, 9) + s0 * stride if arg(a, 9) != 0 else 0
                finish(sums, tokens, first, count, arg(a, 6) + s0 * stride, stride, arg(a, 8), residual, pairs)
            first = more(a, job, count, step, first)
        return count

    return run.address
