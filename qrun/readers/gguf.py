"""GGUF's blocks: each holds the codes of 32 or 256 weights of a row with their scales; here they are laid out by kind.

What is laid out keeps every bit. Types whose codes are entries of a lattice (IQ1, IQ2, IQ3, TQ) are not: they expand
through gguf-py, which only this file imports.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias, cast

import torch
from torch import Tensor

from qrun.errors import UnsupportedModelError
from qrun.formats import AffineFormat, CodebookFormat, Format, MxFp4Format, QTensor, Shape
from qrun.formats.packing import pack
from qrun.formats.superblock import SuperBlockFormat
from qrun.gguf_file import CODES
from qrun.gguf_names import Piece
from qrun.readers.base import Reader, Tensors

IQ4: Final = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
"""The values of IQ4_NL and IQ4_XS, in code order."""
PLAIN: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK: Final = 1 << 20  # weights laid out at a time

Parts: TypeAlias = dict[str, Tensor]


class GgufReader(Reader):
    """See the module. ``pieces``: where each tensor lies, by its Hugging Face name."""

    def __init__(self, tensors: Tensors, pieces: Mapping[str, Piece]) -> None:
        super().__init__(tensors, {})
        self.pieces = pieces

    @property
    def method(self) -> str:
        return "GGUF"

    def holds(self, module: str) -> bool:
        piece = self.pieces.get(module + ".weight")
        return piece is not None and piece.kind in _LAYOUTS and len(piece.shape) == 2

    def parts(self, module: str) -> tuple[str, ...]:
        return (module + ".weight",)

    def format(self, module: str, shape: Shape) -> Format:
        return _LAYOUTS[self._checked(module, shape).kind][0]

    def read(self, module: str, shape: Shape) -> QTensor:
        piece = self._checked(module, shape)
        out = _laid_out(piece)
        order = piece.order()
        taken = out if order is None else out.take_rows(order)
        assert taken is not None, "rows of these formats share nothing"
        return taken

    def _checked(self, module: str, shape: Shape) -> Piece:
        piece = self.pieces[module + ".weight"]
        piece.require(module + ".weight", shape)
        return piece


def expand(name: str, piece: Piece) -> Tensor:
    """A tensor's values: in its own dtype where it has a plain one, else FP32.

    Raises `UnsupportedModelError` where gguf-py is needed and missing.
    """
    if piece.kind in PLAIN:
        values = piece.file.read(piece.tensor, piece.first, piece.rows).view(PLAIN[piece.kind])
    elif piece.kind in _LAYOUTS:
        values = _laid_out(piece).dequantize()
    else:
        values = _lattice(name, piece)
    values, order = values.view(piece.shape), piece.order()
    return values if order is None else values.index_select(0, order)


def _laid_out(piece: Piece) -> QTensor:
    """The rows in the order of the file, [rows, K]."""
    form, lay_out = _LAYOUTS[piece.kind]
    out = QTensor.empty(form, (piece.rows, piece.shape[-1]))
    stored = out.tensors()
    for start, stop in piece.chunks(_CHUNK):
        for part, tensor in lay_out(piece.blocks(start, stop)).items():
            stored[part][start:stop] = tensor.view(stop - start, -1)
    return out


def _lattice(name: str, piece: Piece) -> Tensor:
    try:
        from gguf import quants
        from gguf.constants import GGMLQuantizationType
    except ImportError:
        raise UnsupportedModelError(
            f"{name} in {piece.file.path} is {piece.kind}, which gguf-py expands: pip install 'qrun-llm[gguf]'"
        ) from None
    kind = GGMLQuantizationType(CODES[piece.kind])
    dequantize = cast(Callable[..., Any], quants.dequantize)
    out = torch.empty(piece.rows, piece.shape[-1])
    for start, stop in piece.chunks(_CHUNK):
        out[start:stop] = torch.as_tensor(dequantize(cast(Any, piece.blocks(start, stop).flatten(1)).numpy(), kind))
    return out


def _half(blocks: Tensor, at: int, count: int = 1) -> Tensor:
    """``count`` FP16 numbers of each block [n, B, bytes], from byte ``at``: [n, B, count]."""
    return blocks[..., at : at + 2 * count].clone(memory_format=torch.contiguous_format).view(torch.float16)


def _fields(packed: Tensor, width: int, bits: int) -> Tensor:
    """Fields of ``bits`` from bytes that are taken ``width`` at a time, every lowest field before every next one."""
    runs = packed.reshape(*packed.shape[:-1], -1, 1, width)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
    return ((runs >> shifts) & ((1 << bits) - 1)).flatten(-3)


def _flat(codes: Tensor, bits: int) -> Tensor:
    return pack(codes.flatten(1), bits)


def _four(blocks: Tensor, at: int) -> Tensor:
    return _fields(blocks[..., at : at + 16], 16, 4)


def _q4_0(blocks: Tensor) -> Parts:
    return {"codes": _flat(_four(blocks, 2), 4), "scale": _half(blocks, 0)}


def _q4_1(blocks: Tensor) -> Parts:
    codes = _flat(_four(blocks, 4), 4)
    return {"codes": codes, "scale": _half(blocks, 0), "zero": -_half(blocks, 2)}


def _q5_0(blocks: Tensor) -> Parts:
    codes = _four(blocks, 6) | _fields(blocks[..., 2:6], 1, 1) << 4
    return {"codes": _flat(codes, 5), "scale": _half(blocks, 0)}


def _q5_1(blocks: Tensor) -> Parts:
    codes = _four(blocks, 8) | _fields(blocks[..., 4:8], 1, 1) << 4
    return {"codes": _flat(codes, 5), "scale": _half(blocks, 0), "zero": -_half(blocks, 2)}


def _q8_0(blocks: Tensor) -> Parts:
    return {"codes": blocks[..., 2:].contiguous().view(torch.int8), "scale": _half(blocks, 0)}


def _q2_k(blocks: Tensor) -> Parts:
    scales = blocks[..., :16]
    return {
        "codes": _flat(_fields(blocks[..., 16:80], 32, 2), 2),
        "scale": _flat(scales & 15, 4),
        "zero": _flat(scales >> 4, 4),
        "scale2": _half(blocks, 80, 2),
    }


def _q3_k(blocks: Tensor) -> Parts:
    codes = _fields(blocks[..., 32:96], 32, 2) | _fields(blocks[..., :32], 32, 1) << 2
    scales = _fields(blocks[..., 96:104], 8, 4) | _fields(blocks[..., 104:108], 4, 2) << 4
    return {"codes": _flat(codes, 3), "scale": _flat(scales, 6), "scale2": _half(blocks, 108)}


def _six(blocks: Tensor) -> Parts:
    """The eight scales and minima of Q4_K and Q5_K: low ones whole, the high ones' upper bits above the low ones."""
    s, m, rest = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scales = torch.cat((s & 63, (rest & 15) | (s >> 2) & 48), -1)
    minima = torch.cat((m & 63, (rest >> 4) | (m >> 2) & 48), -1)
    return {"scale": _flat(scales, 6), "zero": _flat(minima, 6)}


def _q4_k(blocks: Tensor) -> Parts:
    codes = _fields(blocks[..., 16:], 32, 4)
    return {"codes": _flat(codes, 4), **_six(blocks), "scale2": _half(blocks, 0, 2)}


def _q5_k(blocks: Tensor) -> Parts:
    codes = _fields(blocks[..., 48:], 32, 4) | _fields(blocks[..., 16:48], 32, 1) << 4
    return {"codes": _flat(codes, 5), **_six(blocks), "scale2": _half(blocks, 0, 2)}


def _q6_k(blocks: Tensor) -> Parts:
    codes = _fields(blocks[..., :128], 64, 4) | _fields(blocks[..., 128:192], 32, 2) << 4
    return {"codes": _flat(codes, 6), "scale": blocks[..., 192:208] ^ 128, "scale2": _half(blocks, 208)}


def _iq4_xs(blocks: Tensor) -> Parts:
    scales = _fields(blocks[..., 4:8], 1, 4) | _fields(blocks[..., 2:4], 1, 2) << 4
    codes = _fields(blocks[..., 8:], 16, 4)
    return {"codes": _flat(codes, 4), "scale": _half(blocks, 0).float() * (scales.float() - 32)}


def _mxfp4(blocks: Tensor) -> Parts:
    return {"codes": _flat(_four(blocks, 1), 4), "scale": blocks[..., :1]}


def _affine(bits: int, *, minimum: bool = False) -> AffineFormat:
    half = torch.float16
    if minimum:
        return AffineFormat(bits, 32, False, scale_dtype=half, zero_dtype=half, minimum=True)
    return AffineFormat(bits, 32, True, scale_dtype=half)


_LAYOUTS: Final[Mapping[str, tuple[Format, Callable[[Tensor], Parts]]]] = {
    "Q4_0": (_affine(4), _q4_0),
    "Q4_1": (_affine(4, minimum=True), _q4_1),
    "Q5_0": (_affine(5), _q5_0),
    "Q5_1": (_affine(5, minimum=True), _q5_1),
    "Q8_0": (_affine(8), _q8_0),
    "Q2_K": (SuperBlockFormat(2, 16, 4, True), _q2_k),
    "Q3_K": (SuperBlockFormat(3, 16, 6, False), _q3_k),
    "Q4_K": (SuperBlockFormat(4, 32, 6, True), _q4_k),
    "Q5_K": (SuperBlockFormat(5, 32, 6, True), _q5_k),
    "Q6_K": (SuperBlockFormat(6, 16, 8, False), _q6_k),
    "IQ4_NL": (CodebookFormat("iq4_nl", IQ4, 32, torch.float16), _q4_0),
    "IQ4_XS": (CodebookFormat("iq4_xs", IQ4, 32, torch.float32), _iq4_xs),
    "MXFP4": (MxFp4Format(), _mxfp4),
}
