"""Weights from their canonical formats into the layout of the GPU kernels, once, at load. It multiplies nothing."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qrun.formats import AffineFormat, CodebookFormat, Fp8Format, MxFp4Format, NvFp4Format, PlainFormat, QTensor
from qrun.formats.packing import unpack
from qrun.kernels.gpu_expand import expand
from qrun.kernels.gpu_packed import BITS, ROW_ALIGN, Kind, Packed, pack_planes

WHOLE = ("table", "scale2")
"""Tensors that serve all rows of a weight."""
PAIR = 64
"""Rows of a gate that stand together before as many of its up; 128 for fp8, whose blocks are that high."""


def packs(weight: QTensor, *, paired: bool = False) -> bool:
    """Whether the kernels have a kind for the weight's format and shape."""
    form = weight.format
    if isinstance(form, Fp8Format):
        if not form.blocks:
            return False
        # A gate that ends inside a block of scales has no rows of its own to pair.
        return not paired or (weight.shape[-2] // 2) % ROW_ALIGN == 0
    if isinstance(form, PlainFormat):
        return form.dtype == torch.bfloat16  # who asks for 32 bits wants them
    if isinstance(form, AffineFormat):
        return form.group % 32 == 0 and form.zero_dtype == torch.uint8
    # Of scales the kernels read BF16, E8M0 and e4m3; float32 ones are of another tool's checkpoint.
    return isinstance(form, CodebookFormat) and form.scale_dtype != torch.float32


def pack(weight: QTensor, half: torch.dtype, *, paired: bool = False) -> Packed:
    """The weight [N, K], which `packs`, for the kernels.

    paired: the first half of the rows are gates and the others their ups. 16-bit floats are kept in ``half``.
    """
    if not packs(weight, paired=paired):
        raise ValueError(f"the GPU kernels have no kind for {weight.format} of shape {weight.shape}")
    form = weight.format
    n, k = weight.shape
    pair = (128 if isinstance(form, Fp8Format) else PAIR) if paired else 0
    if isinstance(form, PlainFormat):
        codes = _reorder(weight.codes.to(half), pair)
        return Packed(kind="plain", n=n, k=k, codes=_padded(codes, ROW_ALIGN, 128), pairs=pair)
    if isinstance(form, Fp8Format):
        return _fp8(weight, pair)
    if isinstance(form, AffineFormat):
        return _affine(weight, form, pair)
    assert isinstance(form, CodebookFormat)
    return _codebook(weight, form, pair)


def pack_stack(weights: Sequence[QTensor], half: torch.dtype, *, paired: bool = False) -> Packed:
    """Weights of one shape and format as a stack, made one at a time."""
    stacks: dict[str, Tensor] = {}
    packed = pack(weights[0], half, paired=paired)
    for e, weight in enumerate(weights):
        packed = packed if e == 0 else pack(weight, half, paired=paired)
        for name, tensor in packed.tensors().items():
            if name == "table":
                stacks[name] = tensor
            else:
                stacks.setdefault(name, tensor.new_empty(len(weights), *tensor.shape))[e] = tensor
    return packed.holding(stacks)


def row_order(rows: int, pair: int, device: torch.device) -> Tensor:
    """Which of ``rows`` gate and up rows each stored row holds, [Np]; ``rows`` itself where it holds none."""
    half = rows // 2
    chunks = -(-half // pair)
    place = torch.arange(chunks * pair, device=device)
    gate = torch.where(place < half, place, rows)
    up = torch.where(place < half, half + place, rows)
    return torch.stack((gate.view(-1, pair), up.view(-1, pair)), 1).flatten()


def gather_rows(packed: Packed, index: Tensor) -> Tensor:
    """Rows ``index`` [S] of a weight that is not fp8, float32 [S, K]."""
    parts = packed.tensors()
    some = packed.holding(
        {name: t[index] if name == "codes" else t[:, index] for name, t in parts.items() if name not in WHOLE}
    )
    if packed.kind == "plain":
        return some.codes[:, : packed.k].float()
    out = torch.empty(index.shape[0], packed.k, device=packed.codes.device)
    expand(some, out)
    return out


def pad_bias(bias: Tensor, packed: Packed) -> Tensor:
    """float32 [N] in the order and number of the stored rows, [Np]."""
    bias = bias.float()
    if packed.pairs:
        bias = _reorder(bias[:, None], packed.pairs)[:, 0]
    return _padded(bias[:, None], packed.rows, 1)[:, 0].contiguous()


def _affine(weight: QTensor, form: AffineFormat, pair: int) -> Packed:
    n, k = weight.shape
    kind: Kind = "int2" if form.bits == 2 else "int4" if form.bits <= 4 else "int8"
    codes = weight.codes if form.signed else unpack(weight.codes, form.bits)
    if kind == "int8" and not form.signed:
        # Signed bytes around the zero, which is the middle where there is none, else counted from -128.
        middle = 1 << (form.bits - 1) if form.symmetric else 128
        codes = (codes.to(torch.int16) - middle).to(torch.int8)
    elif form.symmetric and form.bits == 3:
        codes = codes + 4  # to the middle of four bits
    codes = _reorder(codes, pair)
    packed = Packed(kind=kind, n=n, k=k, codes=codes, group=form.group, pairs=pair)
    codes = _padded(codes, ROW_ALIGN, packed.tile)
    width = codes.shape[1]
    scale = _across(weight.scale, pair, codes.shape[0], -(-width // form.group) if form.group else 1)
    zero = None
    if weight.zero is not None:
        zero = _across(weight.zero, pair, codes.shape[0], -(-width // form.group))
    return packed.holding(
        {"codes": pack_planes(codes, kind) if kind in BITS else codes, "scale": scale}
        | ({} if zero is None else {"zero": zero})
    )


def _codebook(weight: QTensor, form: CodebookFormat, pair: int) -> Packed:
    n, k = weight.shape
    plane = 16 if isinstance(form, NvFp4Format) else 32
    codes = _padded(_reorder(unpack(weight.codes, 4), pair), ROW_ALIGN, 128)
    assert weight.scale is not None, "a codebook has scales"
    raw = weight.scale.view(torch.uint8) if isinstance(form, NvFp4Format | MxFp4Format) else weight.scale
    return Packed(
        kind="codebook",
        n=n,
        k=k,
        codes=pack_planes(codes, "codebook", plane),
        scale=_across(raw, pair, codes.shape[0], codes.shape[1] // form.group),
        table=form.codebook(codes.device),
        scale2=None if weight.scale2 is None else weight.scale2.float().reshape(1),
        group=form.group,
        plane=plane,
        values=form.values,
        pairs=pair,
    )


def _fp8(weight: QTensor, pair: int) -> Packed:
    n, k = weight.shape
    codes, scale = weight.codes.view(torch.uint8), weight.scale
    assert scale is not None, "fp8 has block scales"
    codes = _reorder(codes, pair)
    if pair:
        scale = _reorder(scale, 1)
    codes = _padded(codes, ROW_ALIGN, 128)
    return Packed(kind="fp8", n=n, k=k, codes=codes, scale=scale.contiguous(), group=128, pairs=pair)


def _reorder(rows: Tensor, pair: int) -> Tensor:
    """Rows in pairs of ``pair`` gates and ups, with zeros where the last ones are not full; as they are for 0."""
    if not pair:
        return rows
    order = row_order(rows.shape[0], pair, rows.device)
    full = torch.cat((rows, rows.new_zeros(1, *rows.shape[1:]))) if int(order.max()) == rows.shape[0] else rows
    return full[order]


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    """[n, k] with zeros up to multiples of rows and columns."""
    down, right = -x.shape[0] % rows, -x.shape[1] % columns
    return F.pad(x, (0, right, 0, down)) if down or right else x.contiguous()


def _across(scales: Tensor | None, pair: int, rows: int, groups: int) -> Tensor:
    """Scales or zeros [N, G] as the kernels read them: [groups, rows]."""
    assert scales is not None, "an integer format has scales"
    moved = _reorder(scales, pair)
    return F.pad(moved, (0, groups - moved.shape[1], 0, rows - moved.shape[0])).t().contiguous()
