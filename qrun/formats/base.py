"""What a number format is: :class:`Format` turns a matrix into a :class:`QTensor` and back.

Layouts here are canonical: row-major, K last, the same on every device. It knows no kernels and no backends, which
repack for themselves, and no recipes: :func:`qrun.formats.format_of` chooses the format.
"""

import itertools
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Final, Self, TypeAlias

import torch
from torch import Tensor

Shape: TypeAlias = tuple[int, ...]
Layout: TypeAlias = dict[str, tuple[Shape, torch.dtype]]
"""Tensor name -> (shape, dtype), for the tensors that a format stores; names as the fields of :class:`QTensor`."""

_CHUNK: Final = 1 << 22  # elements expanded at a time
# On a CPU each thread quantizes chunks by itself, small enough for the cache: threads that share a chunk would wait for
# each other after every one of its hundred short operations, many times as long once the machine is busy.
_CHUNK_CPU: Final = 1 << 19


@dataclass(frozen=True, kw_only=True, eq=False)
class QTensor:
    """A quantized weight: codes with their scales, and the format that can read them.

    ``shape`` is the logical [..., N, K]; every tensor has the same leading dimensions. Indexing takes views.
    """

    format: "Format"
    shape: Shape
    codes: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None
    scale2: Tensor | None = None
    order: Tensor | None = None

    @classmethod
    def empty(cls, format: "Format", shape: Shape, device: torch.device | str = "cpu") -> Self:
        """Uninitialised storage for a weight of ``shape``, to be filled by :meth:`copy_`."""
        layout = format.layout(tuple(shape))
        parts = {name: torch.empty(size, dtype=dtype, device=device) for name, (size, dtype) in layout.items()}
        return cls(format=format, shape=tuple(shape), **parts)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that this format stores, by name: what goes to disk."""
        every = {
            "codes": self.codes,
            "scale": self.scale,
            "zero": self.zero,
            "scale2": self.scale2,
            "order": self.order,
        }
        return {name: tensor for name, tensor in every.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    def __getitem__(self, index: int | slice | tuple[int, ...]) -> Self:
        """A view of one or some of the leading dimensions, such as one expert.

        Raises:
            IndexError: there are fewer leading dimensions than indices.
        """
        lead = len(self.shape) - 2
        if lead < (len(index) if isinstance(index, tuple) else 1):
            raise IndexError(f"a weight of shape {self.shape} has {lead} leading dimensions")
        parts = {name: tensor[index] for name, tensor in self.tensors().items()}
        return replace(self, shape=(*parts["codes"].shape[:-2], *self.shape[-2:]), **parts)

    def copy_(self, index: int, other: "QTensor") -> None:
        """Write ``other`` at one leading index, as experts stream into their stack.

        Raises:
            ValueError: format or shape differ.
        """
        mine = self[index]
        if mine.format != other.format or mine.shape != other.shape:
            raise ValueError(f"cannot write {other.format} {other.shape} into {self.format} {mine.shape}")
        theirs = other.tensors()
        for name, tensor in mine.tensors().items():
            tensor.copy_(theirs[name])

    def to(self, device: torch.device | str) -> Self:
        """The same weight on another device; itself when already there."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The whole weight [..., N, K], expanded."""
        return self.format.dequantize(self, dtype)

    def rows(self, index: Tensor) -> Tensor:
        """Rows ``index`` [...] of a weight [N, K], as fp32 [..., K], without expanding the others."""
        return self.format.rows(self, index)

    def take_rows(self, index: Tensor) -> Self | None:
        """A weight [N, K] of rows ``index`` [M] in their codes; none where these share scales in other ways."""
        parts: dict[str, Tensor] = {}
        for name, tensor in self.tensors().items():
            some = self.format.take_rows(name, tensor, index)
            if some is None:
                return None
            parts[name] = some
        return replace(self, shape=(len(index), self.shape[-1]), **parts)


def join_rows(weights: Sequence[QTensor]) -> QTensor | None:
    """Weights [·, K] one under another in their codes; none where formats, or what their rows share, differ."""
    first = weights[0]
    if any(other.format != first.format or other.shape[-1] != first.shape[-1] for other in weights):
        return None
    parts: dict[str, Tensor] = {}
    for name in first.tensors():
        tensors = [weight.tensors()[name] for weight in weights]
        joined = first.format.join_rows(name, tensors, [weight.shape[-2] for weight in weights])
        if joined is None:
            return None
        parts[name] = joined
    return replace(first, shape=(sum(weight.shape[-2] for weight in weights), first.shape[-1]), **parts)


class Format(ABC):
    """One way to store numbers. Formats are frozen dataclasses: equal when they read the same bytes the same way.

    A new format implements ``layout``, ``_encode`` and ``_decode``, all on rows of one matrix; walking leading
    dimensions, bounding the temporaries, checking the input and gathering rows are done here, once.
    """

    family: ClassVar[str]
    """What backends bind their kernels to."""

    @property
    def row_align(self) -> int:
        """Rows are encoded in runs that begin at multiples of this, so that blocks of rows stay whole."""
        return 1

    @abstractmethod
    def layout(self, shape: Shape) -> Layout:
        """Exactly the tensors that a weight of logical ``shape`` [..., N, K] is stored in."""

    @abstractmethod
    def _encode(self, w: Tensor, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors for some rows ``w`` [n, K] in their own dtype, the first row at a multiple of ``row_align``."""

    @abstractmethod
    def _decode(self, parts: Mapping[str, Tensor], k: int) -> Tensor:
        """fp32 [n, k] from parts that each have one row per row of the weight."""

    @abstractmethod
    def __str__(self) -> str:
        """As the run card prints it, such as ``int4 g64``."""

    def _shared(self, amax: Tensor) -> dict[str, Tensor]:
        """Tensors [1, ·] that all rows of a matrix share, from its largest magnitude (a scalar tensor)."""
        del amax
        return {}

    def _rows_per(self, name: str) -> int:
        """How many rows of the weight one row of the tensor ``name`` serves; sys.maxsize is all."""
        del name
        return 1

    def take_rows(self, name: str, tensor: Tensor, index: Tensor) -> Tensor | None:
        """A stored tensor of a weight whose rows ``index`` [M] were taken; none where blocks of rows would break up."""
        per = self._rows_per(name)
        if per == sys.maxsize:
            return tensor
        if per == 1:
            return tensor.index_select(0, index)
        blocks = index.div(per, rounding_mode="floor")
        starts = blocks[::per]
        if not torch.equal(starts.repeat_interleave(per)[: len(blocks)], blocks):
            return None
        return tensor.index_select(0, starts)

    def join_rows(self, name: str, tensors: Sequence[Tensor], rows: Sequence[int]) -> Tensor | None:
        """A stored tensor of weights put one under another; none where their blocks do not meet at the seams."""
        per = self._rows_per(name)
        if per == sys.maxsize:
            return tensors[0] if all(torch.equal(tensors[0], other) for other in tensors) else None
        return torch.cat(list(tensors)) if all(count % per == 0 for count in rows[:-1]) else None

    @property
    def independent(self) -> "Format | None":
        """A format of the same values in which rows share nothing, if there is one and this is not it."""
        return None

    def apart(self, q: QTensor) -> QTensor:
        """The weight [N, K] in the format `independent`; itself where there is none."""
        return q

    def quantize(self, w: Tensor) -> QTensor:
        """The nearest weight this format finds; deterministic, on ``w``'s device.

        Args:
            w: [..., N, K], floating point; N and K at least 1.

        Raises:
            TypeError: ``w`` is not floating point.
            ValueError: ``w`` has fewer than two dimensions, an empty one, or non-finite values.
        """
        if not w.dtype.is_floating_point:
            raise TypeError(f"cannot quantize {w.dtype}: weights must be floating point")
        if w.ndim < 2 or 0 in w.shape:
            raise ValueError(f"cannot quantize shape {tuple(w.shape)}: it must be [..., N, K], nothing empty")
        out = QTensor.empty(self, tuple(w.shape), w.device)
        w = w.detach()
        if w.device.type != "cpu":
            for part in self._parts(w, out, _CHUNK):
                part()
            return out
        threads = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                for done in [pool.submit(part) for part in self._parts(w, out, _CHUNK_CPU)]:
                    done.result()
        finally:
            torch.set_num_threads(threads)  # the workers' setting is also what threads begin with from then on
        return out

    def _parts(self, w: Tensor, out: QTensor, elements: int) -> Iterator[Callable[[], None]]:
        """The independent pieces of work that fill ``out``."""
        for index in _matrices(out.shape):
            store = (out[index] if index else out).tensors()
            shared = self._shared(_finite_amax(w[index]))
            for name, tensor in shared.items():
                store[name].copy_(tensor)
            for start, stop in self._chunks(out.shape, elements):
                yield partial(self._fill, store, w[index][start:stop], start, shared)

    def _fill(self, store: Mapping[str, Tensor], w: Tensor, start: int, shared: Mapping[str, Tensor]) -> None:
        for name, tensor in self._encode(w.bfloat16() if w.dtype.itemsize == 1 else w, shared).items():
            first = start // self._rows_per(name)
            store[name][first : first + tensor.shape[0]].copy_(tensor)

    def dequantize(self, q: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values that ``q`` stands for, [..., N, K], each rounded once to ``dtype``."""
        out = torch.empty(q.shape, dtype=dtype, device=q.device)
        for index in _matrices(q.shape):
            part = q[index] if index else q
            for start, stop in self._chunks(q.shape, _CHUNK):
                out[index][start:stop] = self.rows(part, torch.arange(start, stop, device=q.device))
        return out

    def rows(self, q: QTensor, index: Tensor) -> Tensor:
        """Some rows of a weight [N, K]: fp32 [*index.shape, K].

        Raises:
            ValueError: ``q`` has leading dimensions.
        """
        if len(q.shape) != 2:
            raise ValueError(f"rows are gathered from [N, K], not from {q.shape}")
        flat = index.reshape(-1)
        parts: dict[str, Tensor] = {}
        for name, tensor in q.tensors().items():
            per = self._rows_per(name)
            parts[name] = tensor if per == sys.maxsize else tensor.index_select(0, flat // per)
        return self._decode(parts, q.shape[-1]).reshape(*index.shape, q.shape[-1])

    def bits_per_weight(self, shape: Shape) -> float:
        """Stored bits per logical weight, scales and padding included."""
        stored = sum(math.prod(size) * dtype.itemsize for size, dtype in self.layout(tuple(shape)).values())
        return 8 * stored / math.prod(shape)

    def _chunks(self, shape: Shape, elements: int) -> Iterator[tuple[int, int]]:
        rows, columns = shape[-2:]
        step = max(1, elements // columns // self.row_align) * self.row_align
        return ((start, min(start + step, rows)) for start in range(0, rows, step))


def pad_columns(w: Tensor, multiple: int) -> Tensor:
    """``w`` [n, K] with zero columns up to a multiple; may be ``w`` itself."""
    missing = -w.shape[-1] % multiple
    return torch.nn.functional.pad(w, (0, missing)) if missing else w


def columns_of_groups(w: Tensor, group: int) -> Tensor:
    """A copy of ``w`` [n, K], zero-padded and cut into groups, one per column: fp32 [group, n·G], row by row."""
    return pad_columns(w, group).reshape(-1, group).t().clone(memory_format=torch.contiguous_format).float()


def _finite_amax(w: Tensor) -> Tensor:
    low, high = torch.aminmax(w if w.dtype.itemsize > 1 else w.float())
    amax = torch.maximum(-low, high).float()
    if not bool(torch.isfinite(amax)):
        raise ValueError(f"non-finite weights: the values range from {low.item()} to {high.item()}")
    return amax


def _matrices(shape: Shape) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(size) for size in shape[:-2]))
