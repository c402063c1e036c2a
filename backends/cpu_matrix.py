"""Weights as the CPU's kernels take them: rows that a block's program is made of. Knows formats, not blocks."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from qrun.backends.cpu_codes import codes_of
from qrun.formats import PlainFormat, QTensor
from qrun.formats.widened import readable
from qrun.kernels import cpu_few, cpu_gemm, cpu_gemm_plain, cpu_gemv, cpu_moe, cpu_norm, cpu_plain, cpu_tile
from qrun.kernels.cpu_pool import FIRST, Array, Program, aligned

LIMITS = {"16": 32639, "32": 32639, "int8": 127}
"""Activations -> the largest magnitude of their integer codes: 32639 = 127·256 + 127 fills both byte planes."""

IN_PLACE = 26
"""Where the rows for many tokens have the arguments of `cpu_gemv`."""
ROWS = math.lcm(cpu_few.TOKENS, cpu_tile.TOKENS)
"""Activations have room for a multiple of it, for kernels take several tokens at once."""


def padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def row_of(width: int) -> Tensor:
    """[1, width] with room behind it, since kernels write whole vectors."""
    if width % 16 == 0:
        return torch.empty(1, width)
    return torch.empty(padded(width, 16))[:width].view(1, width)


class Workspace:
    """Memory that one block at a time uses, by name; grows to the largest request."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._parts: dict[str, Array] = {}

    def __call__(self, name: str, size: int) -> int:
        """The address of at least `size` bytes."""
        part = self._parts.get(name)
        if part is None or part.nbytes < size:
            part = self._parts[name] = aligned(size + size // 4, np.uint8)
        return int(part.ctypes.data)


class Matrix(ABC):
    """A weight [N, K] in a block's programs, for a token and for many. `feed` comes before `multiply`."""

    kernel: str

    def __init__(self, weight: QTensor, bias: Tensor | None, workspace: Workspace) -> None:
        self.weight = weight
        self.workspace = workspace
        self.rows, self.columns = weight.shape[-2:]
        self.bias = None if bias is None else bias.float().contiguous()
        self.zeros = weight.zero

    @abstractmethod
    def feed(self, program: Program, x: object, norm: Tensor | None = None, eps: float = 0.0) -> int:
        """Add the row that takes x [K] through RMSNorm (or not) into this weight's activations; x is its argument 0."""

    @abstractmethod
    def multiply(
        self, program: Program, out: object, *, residual: object = None, pairs: Array | None = None
    ) -> "Slots":
        """Add y = W x + bias (+ residual); with scratch for `pairs`, silu(first half) * second half instead."""

    @abstractmethod
    def multiply_experts(self, program: Program, kind: Callable[[int, int], int]) -> int:
        """Add a row of `cpu_moe` for a stack [E, N, K], its arguments up to 12 set. Returns the row."""

    @abstractmethod
    def feed_slots(self, program: Program, x: object, stride: int, count: int) -> tuple[int, int, int]:
        """As `feed` for `count` vectors, `stride` bytes apart; returns the bytes between their three buffers."""

    @abstractmethod
    def feed_many(self, program: Program, norm: Tensor | None = None, eps: float = 0.0) -> int:
        """As `feed`, for any number of tokens; `aim` completes it."""

    @abstractmethod
    def multiply_many(self, program: Program, *, pairs: bool = False) -> int:
        """As `multiply`, for any number of tokens; `aim` completes it."""

    @abstractmethod
    def aim(self, program: Program, feed: int, multiply: int, x: int, tokens: int, out: int, residual: int = 0) -> None:
        """Point both rows at this call's x [tokens, K], out [tokens, N or pairs] and residual: contiguous float32."""

    @abstractmethod
    def aim_experts(
        self, program: Program, feed: int, multiply: int, x: int, count: int, stride: int | None = None
    ) -> None:
        """Point a `feed_many` row at x [count, K], rows ``stride`` bytes apart, and a `multiply_experts` row at what
        becomes of it."""

    def choose(self, program: Program, multiply: int, expert: int) -> None:
        """Point a `multiply_many` row at one expert of a stack."""
        for index, tensor in ((0, self.weight.codes), (3, self.weight.scale), (4, self.zeros)):
            if tensor is not None:
                place = tensor.data_ptr() + expert * tensor.stride(0) * tensor.element_size()
                program.words[multiply, [FIRST + index, FIRST + IN_PLACE + index]] = place


class Slots:
    """Where a `multiply` row keeps the addresses that change from call to call."""

    def __init__(self, words: Array, out: int, residual: int) -> None:
        self._words = words
        self._out = FIRST + out
        self._residual = FIRST + residual

    def set(self, out: int, residual: int = 0) -> None:
        self._words[self._out] = out
        self._words[self._residual] = residual


class IntegerMatrix(Matrix):
    """Int2, int4, int8 and trellis codes against activations in byte planes."""

    def __init__(self, weight: QTensor, bias: Tensor | None, activations: str, workspace: Workspace) -> None:
        super().__init__(weight, bias, workspace)
        codes = codes_of(weight)
        assert codes is not None, "asked for after `takes`"
        self.codes, self.zeros = codes, codes.zeros
        self.per = codes.per
        self.limit = LIMITS[activations]
        self.row = weight.codes.shape[-1]
        self.blocks = -(-self.row // 64)
        self.kernel = f"numba {codes.name}×{'int8' if self.limit == 127 else 'int16'} dot"
        self.full = padded(self.blocks * 64 * self.per, cpu_gemv.SPAN)
        self.group = codes.group or self.full
        self.spans = self.full // cpu_gemv.SPAN
        self.sums = padded(max(codes.groups, self.full // self.group + 1), 16)
        planes = 1 if self.limit == 127 else 2
        self.many = cpu_gemm.affine(self.per, codes.scales, planes)
        self.few = cpu_few.grouped(self.per, codes.scales) if codes.group else cpu_few.affine(self.per, planes)
        self.up_to = cpu_few.FEW_GROUPED if codes.group else cpu_few.FEW
        self.run = 16 * codes.group // (64 * self.per)
        # Rows not a power of two apart, or all of a tile's tokens would fall into the same cache sets.
        self.stride = 2 * self.full + 128

    @staticmethod
    def takes(weight: QTensor, activations: str) -> bool:
        return activations in LIMITS and codes_of(weight) is not None

    def feed(self, program: Program, x: object, norm: Tensor | None = None, eps: float = 0.0) -> int:
        self._planes = aligned(2 * self.full, np.int8)
        self._scales = aligned(self.spans, np.float32)
        self._sums = aligned(self.sums, np.float32)
        return program.add(
            cpu_norm.quantize(), x, 0, 1, self.columns, norm, eps, self.per, self.group, self.limit,
            self._planes, 0, self._scales, 0, self._sums, 0, aligned(self.full, np.float32), 0, self.full,
        )  # fmt: skip

    def multiply(self, program: Program, out: object, *, residual: object = None, pairs: Array | None = None) -> Slots:
        codes, weight = self.codes, self.weight
        row = program.add(
            cpu_gemv.affine(self.per, codes.scales), weight.codes, self.row, self.blocks, weight.scale, codes.zeros,
            codes.zero, self._planes, self._scales, self._sums, codes.groups, codes.lanes, codes.flip, self.run,
            self.rows if pairs is None else self.rows // 2, out, self.bias, residual, pairs,
        )  # fmt: skip
        return Slots(program.words[row], 14, 16)

    def multiply_experts(self, program: Program, kind: Callable[[int, int], int]) -> int:
        codes, weight = self.codes, self.weight
        return program.add(
            kind(self.per, codes.scales), weight.codes, self.row, self.blocks, weight.scale, codes.zeros,
            codes.zero, self._planes, self._scales, self._sums, codes.groups, codes.lanes, codes.flip, self.run,
        )  # fmt: skip

    def feed_slots(self, program: Program, x: object, stride: int, count: int) -> tuple[int, int, int]:
        strides = 2 * self.full, 4 * self.spans, 4 * self.sums
        self._planes = aligned(count * strides[0], np.int8)
        self._scales = aligned(count * self.spans, np.float32)
        self._sums = aligned(count * self.sums, np.float32)
        scratch = aligned(self.full * self.workspace.threads, np.float32)
        program.add(
            cpu_norm.quantize(), x, stride, count, self.columns, None, 0.0, self.per, self.group, self.limit,
            self._planes, strides[0], self._scales, strides[1], self._sums, strides[2], scratch, 4 * self.full,
            self.full,
        )  # fmt: skip
        return strides

    def feed_many(self, program: Program, norm: Tensor | None = None, eps: float = 0.0) -> int:
        return program.add(
            cpu_norm.quantize(), None, 0, 0, self.columns, norm, eps, self.per, self.group, self.limit,
            0, self.stride, 0, 4 * self.spans, 0, 4 * self.sums, 0, 4 * self.full, self.full,
        )  # fmt: skip

    def multiply_many(self, program: Program, *, pairs: bool = False) -> int:
        codes, weight = self.codes, self.weight
        row = program.add(
            self.many, weight.codes, self.row, self.blocks, weight.scale, codes.zeros, codes.zero,
            0, self.stride, 0, 4 * self.spans, 0, 4 * self.sums, codes.groups, self.group, codes.flip,
            self.rows // 2 if pairs else self.rows, 0, 0, 0, self.bias, 0, int(pairs),
        )  # fmt: skip
        size = padded(cpu_gemm.scratch_size(self.blocks, self.per, codes.groups), 64)
        program.put(row, 22, self.workspace("tiles", self.workspace.threads * size))
        program.put(row, 23, size)
        program.put(row, 24, math.gcd(self.group, 64 * self.per))
        for index, value in {9: codes.groups, 10: codes.lanes, 11: codes.flip, 12: self.run}.items():
            program.put(row, IN_PLACE + index, value)
        for index in range(6):
            program.words[row, FIRST + IN_PLACE + index] = program.words[row, FIRST + index]
        return row

    def aim(self, program: Program, feed: int, multiply: int, x: int, tokens: int, out: int, residual: int = 0) -> None:
        program.table[multiply, 0] = self.few if tokens <= self.up_to else self.many
        words = program.words[multiply]
        words[[FIRST + 6, FIRST + 8, FIRST + 10]] = self._aim_feed(program.words[feed], x, tokens, 4 * self.columns)
        words[FIRST + 16 : FIRST + 19] = tokens, out, 4 * words[FIRST + 15]
        words[FIRST + 20] = residual
        words[FIRST + 22] = self.workspace("tiles", int(words[FIRST + 23]) * self.workspace.threads)

    def aim_experts(
        self, program: Program, feed: int, multiply: int, x: int, count: int, stride: int | None = None
    ) -> None:
        words = program.words[multiply]
        words[FIRST + 6 : FIRST + 9] = self._aim_feed(program.words[feed], x, count, stride or 4 * self.columns)
        words[FIRST + 24 : FIRST + 27] = self.stride, 4 * self.spans, 4 * self.sums

    def _aim_feed(self, words: Array, x: int, count: int, stride: int) -> tuple[int, int, int]:
        """Point a `feed_many` row; returns where it leaves planes, scales and sums."""
        space, rows = self.workspace, padded(count, ROWS)
        planes, scales = space("planes", rows * self.stride), space("scales", 4 * rows * self.spans)
        sums = space("sums", 4 * rows * self.sums)
        words[FIRST : FIRST + 3] = x, stride, count
        words[[FIRST + 9, FIRST + 11, FIRST + 13]] = planes, scales, sums
        words[FIRST + 15] = space("row", 4 * self.full * space.threads)
        return planes, scales, sums


class PlainMatrix(Matrix):
    """BF16 or FP32 rows against float32 activations."""

    def __init__(self, weight: QTensor, bias: Tensor | None, workspace: Workspace) -> None:
        super().__init__(weight, bias, workspace)
        self.bf16 = weight.codes.dtype == torch.bfloat16
        self.kernel = f"numba {'bf16' if self.bf16 else 'fp32'}×fp32 fma"
        self.x = aligned(padded(self.columns, 32), np.float32)
        self.stride = 4 * padded(self.columns, 16) + 64  # not a power of two apart
        self.few, self.many, self.up_to = cpu_few.plain(self.bf16), cpu_gemm_plain.plain(self.bf16), cpu_few.FEW

    @staticmethod
    def takes(weight: QTensor, activations: str) -> bool:
        form = weight.format
        return (
            isinstance(form, PlainFormat)
            and form.dtype in (torch.bfloat16, torch.float32)
            and activations in ("16", "32")
        )

    def feed(self, program: Program, x: object, norm: Tensor | None = None, eps: float = 0.0) -> int:
        return program.add(cpu_plain.norm(), x, 0, 1, self.columns, norm, eps, self.x, 0)

    def multiply(self, program: Program, out: object, *, residual: object = None, pairs: Array | None = None) -> Slots:
        rows = self.rows if pairs is None else self.rows // 2
        row = program.add(
            cpu_plain.plain(self.bf16), self.weight.codes, self.columns, self.x, rows, out, self.bias, residual, pairs
        )
        return Slots(program.words[row], 4, 6)

    def multiply_experts(self, program: Program, kind: Callable[[int, int], int]) -> int:
        size = cpu_moe.BF16 if self.bf16 else cpu_moe.FP32
        return program.add(kind(size, cpu_gemv.ROW), self.weight.codes, self.columns, self.x)

    def feed_slots(self, program: Program, x: object, stride: int, count: int) -> tuple[int, int, int]:
        wide = padded(self.columns, 32)
        self.x = aligned(count * wide, np.float32)
        program.add(cpu_plain.norm(), x, stride, count, self.columns, None, 0.0, self.x, 4 * wide)
        return 4 * wide, 0, 0

    def feed_many(self, program: Program, norm: Tensor | None = None, eps: float = 0.0) -> int:
        return program.add(cpu_plain.norm(), None, 0, 0, self.columns, norm, eps, 0, self.stride)

    def multiply_many(self, program: Program, *, pairs: bool = False) -> int:
        return program.add(
            self.many, self.weight.codes, self.columns, 0, self.stride,
            self.rows // 2 if pairs else self.rows, 0, 0, 0, self.bias, 0, int(pairs), 0,
            cpu_gemm_plain.scratch_size(self.columns),
        )  # fmt: skip

    def aim(self, program: Program, feed: int, multiply: int, x: int, tokens: int, out: int, residual: int = 0) -> None:
        program.table[multiply, 0] = self.few if tokens <= self.up_to else self.many
        words = program.words[multiply]
        words[FIRST + 2] = self._aim_feed(program.words[feed], x, tokens, 4 * self.columns)
        words[FIRST + 5 : FIRST + 8] = tokens, out, 4 * words[FIRST + 4]
        words[FIRST + 9] = residual
        words[FIRST + 11] = self.workspace("tiles", int(words[FIRST + 12]) * self.workspace.threads)

    def aim_experts(
        self, program: Program, feed: int, multiply: int, x: int, count: int, stride: int | None = None
    ) -> None:
        words = program.words[multiply]
        words[FIRST + 2] = self._aim_feed(program.words[feed], x, count, stride or 4 * self.columns)
        words[FIRST + 24] = self.stride

    def _aim_feed(self, words: Array, x: int, count: int, stride: int) -> int:
        """Point a `feed_many` row; returns where it leaves the rows."""
        words[FIRST : FIRST + 3] = x, stride, count
        words[FIRST + 6] = self.workspace("floats", padded(count, ROWS) * self.stride)
        return int(words[FIRST + 6])


def matrix(weight: QTensor, bias: Tensor | None, activations: str, workspace: Workspace) -> Matrix | None:
    """The weight on a decode kernel, or none where its format has none."""
    weight = readable(weight)
    if not all(tensor.is_contiguous() for tensor in weight.tensors().values()):
        return None
    if IntegerMatrix.takes(weight, activations):
        return IntegerMatrix(weight, bias, activations, workspace)
    if PlainMatrix.takes(weight, activations):
        return PlainMatrix(weight, bias, workspace)
    return None
