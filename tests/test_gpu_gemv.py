"""The GPU's kernel for a few tokens against plain matrix products of the dequantized weight, in every format."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gpu_doubles import DEVICE, DTYPES, difference
from torch import Tensor

pytest.importorskip("triton")

from qrun.backends.cuda_matrix import pack, pack_stack, pad_bias, row_order
from qrun.formats import AffineFormat, QTensor, format_of
from qrun.kernels import reference_gemv
from qrun.kernels.gpu_gemv import Config, Emit, Operand, Routed, Scratch, columns_for, gemv, scratch_size
from qrun.kernels.gpu_packed import BITS, Kind, Packed, pack_planes, unpack_planes
from qrun.recipe import WeightScheme

SCHEMES = {
    "bf16": WeightScheme("bf16", 16),
    "int8": WeightScheme("int", 8, 0),
    "int8 g64": WeightScheme("int", 8, 64),
    "int8 g32 asym": WeightScheme("int", 8, 32, False),
    "int8 g32 f16": WeightScheme("int", 8, 32, False),
    "int4 g64 f16": WeightScheme("int", 4, 64, False),
    "int4 g32 sym f16": WeightScheme("int", 4, 32, True),
    "int6 g64": WeightScheme("int", 6, 64, False),
    "int5 channel": WeightScheme("int", 5, 0),
    "int4 g64": WeightScheme("int", 4, 64, False),
    "int4 g32 sym": WeightScheme("int", 4, 32, True),
    "int4 g96": WeightScheme("int", 4, 96, False),
    "int4 g256": WeightScheme("int", 4, 256, False),
    "int4 channel": WeightScheme("int", 4, 0, True),
    "int3 g64": WeightScheme("int", 3, 64, False),
    "int3 g32 sym": WeightScheme("int", 3, 32, True),
    "int2 g32": WeightScheme("int", 2, 32, False),
    "int2 g128": WeightScheme("int", 2, 128, False),
    "fp8": WeightScheme("fp8", 8),
    "nf4": WeightScheme("nf4", 4),
    "fp4": WeightScheme("fp4", 4),
    "mxfp4": WeightScheme("mxfp4", 4),
    "nvfp4": WeightScheme("nvfp4", 4),
}
CONFIG = Config(rows=128, warps=4, stages=2, split=2)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def quantized(name: str, *shape: int) -> QTensor:
    made = format_of(SCHEMES[name]).quantize(torch.randn(*shape) * 0.05)
    if name.endswith(" f16"):  # as other tools' checkpoints have their scales
        assert isinstance(made.format, AffineFormat) and made.scale is not None
        made = replace(made, format=replace(made.format, scale_dtype=torch.float16), scale=made.scale.half())
    return made.to(DEVICE)


def packed(weight: QTensor, half: torch.dtype, *, paired: bool = False) -> Packed:
    stack = [weight[e] for e in range(weight.shape[0])] if len(weight.shape) == 3 else None
    found = pack(weight, half, paired=paired) if stack is None else pack_stack(stack, half, paired=paired)
    assert found is not None
    return found


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


def operand(x: Tensor, half: torch.dtype, *, ssq: Tensor | None = None) -> Operand:
    """x [M, K] float32 as the kernels take it."""
    tokens, k = x.shape
    wide = F.pad(x.to(half), (0, -k % 256)).contiguous()
    return Operand(x=wide, sums=wide.float().view(tokens, -1, 32).sum(-1), width=k, ssq=ssq)


def scratch(w: Packed, columns: int = 64, blocks: int = 16, pieces: int = 8) -> Scratch:
    return Scratch(
        partial=poisoned(scratch_size(w, columns, blocks, pieces)),
        counter=torch.zeros(blocks * w.rows // 128, dtype=torch.int32, device=DEVICE),
    )


def run(w: Packed, x: Operand, out: Tensor, **settings: Any) -> Tensor:
    """The kernel's product, which its plain torch twin must agree with."""
    space = scratch(w)
    twin = torch.full_like(out, torch.nan)
    reference_gemv.gemv(w, x, twin, **{k: v for k, v in settings.items() if k not in ("emit", "out_sums")})
    gemv(w, x, out, **({"scratch": space, "config": CONFIG} | settings))
    assert not space.counter.any(), "the counters must be left at zero"
    width = w.n // 2 if settings.get("epilogue") == "silu" else w.n
    assert difference(out[:, :width], twin[:, :width]) < (1e-2 if x.x.dtype == torch.bfloat16 else 2e-3)
    return out


@pytest.mark.parametrize("kind", ["int2", "int4", "codebook"])
@pytest.mark.parametrize("plane", [16, 32])
def test_planes_are_a_permutation(kind: Kind, plane: int) -> None:
    codes = torch.randint(0, 1 << BITS[kind], (3, 512), dtype=torch.uint8)
    words = pack_planes(codes, kind, plane)
    assert words.shape == (3, 512 * BITS[kind] // 32)
    assert torch.equal(unpack_planes(words, kind, plane), codes)


def test_a_word_holds_what_its_layout_says() -> None:
    codes = (torch.arange(128) % 16).to(torch.uint8)
    codes[34], codes[35] = 5, 11  # plane 1, word 1
    word = int(pack_planes(codes, "int4")[1])
    assert (word >> 4) & 15 == 5 and (word >> 20) & 15 == 11


@pytest.mark.parametrize("half", DTYPES)
@pytest.mark.parametrize("name", SCHEMES)
def test_product(name: str, half: torch.dtype) -> None:
    for rows, columns in ((130, 352), (7, 96)):
        weight = quantized(name, rows, columns)
        w = packed(weight, half)
        bias = torch.randn(rows, device=DEVICE)
        for tokens in (1, 3, 17) if rows == 7 else (1,):
            x = torch.randn(tokens, columns, device=DEVICE)
            out = run(w, operand(x, half), poisoned(tokens, rows), bias=pad_bias(bias, w), eps=0.0)
            wanted = x.to(half).float() @ weight.dequantize().t() + bias
            assert difference(out, wanted) < (6e-3 if half == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("half", DTYPES)
@pytest.mark.parametrize("name", ["int4 g64", "int8", "bf16"])
@pytest.mark.parametrize(("tokens", "split"), [(1, 1), (1, 3), (64, 2), (70, 1)])
def test_pieces_and_columns(name: str, half: torch.dtype, tokens: int, split: int) -> None:
    weight = quantized(name, 140, 640)
    w = packed(weight, half)
    x = torch.randn(tokens, 640, device=DEVICE)
    config = Config(rows=128, warps=8 if columns_for(w, tokens) > 8 else 4, stages=2, split=split)
    out = run(w, operand(x, half), poisoned(tokens, 140), config=config)
    assert difference(out, x.to(half).float() @ weight.dequantize().t()) < 1e-3


@pytest.mark.parametrize("half", DTYPES)
@pytest.mark.parametrize("name", ["int4 g64", "int8", "fp8", "nf4", "bf16"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_silu(name: str, half: torch.dtype, tokens: int) -> None:
    """A norm that is still to be divided out on the way in, gate and up in the same program on the way out."""
    inner, k = (256, 160) if name == "fp8" else (100, 160)
    weight = quantized(name, 2 * inner, k)
    w = packed(weight, half, paired=True)
    x = torch.randn(tokens, k, device=DEVICE) * 3
    ssq = torch.stack((x[:, :70].square().sum(1), x[:, 70:].square().sum(1))).contiguous()
    bias = torch.randn(2 * inner, device=DEVICE)
    wide = -(-inner // 256) * 256
    out, sums = torch.zeros(tokens, wide, dtype=half, device=DEVICE), torch.zeros(tokens, wide // 32, device=DEVICE)
    out[:, :inner], sums[:, : -(-inner // 32)] = torch.nan, torch.nan
    config = Config(rows=256 if name == "fp8" else 128, stages=2, split=2)
    run(
        w, operand(x, half, ssq=ssq), out, epilogue="silu", bias=pad_bias(bias, w), eps=1e-5, out_sums=sums,
        config=config,
    )  # fmt: skip
    rms = torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-5)
    gate, up = (x.to(half).float() @ weight.dequantize().t() * rms + bias).chunk(2, 1)
    wanted = F.pad(F.silu(gate) * up, (0, wide - inner))
    assert difference(out, wanted) < (1e-2 if half == torch.bfloat16 else 2e-3)
    assert difference(sums, out.float().view(tokens, -1, 32).sum(-1)) < 1e-5


@pytest.mark.parametrize("half", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5])
def test_residual_leaves_the_next_operand(half: torch.dtype, tokens: int) -> None:
    rows, k = 200, 256
    weight = quantized("int4 g64", rows, k)
    w = packed(weight, half)
    x, before = torch.randn(tokens, k, device=DEVICE), torch.randn(tokens, rows, device=DEVICE)
    norm = torch.rand(rows, device=DEVICE) + 0.5
    next_x, next_sums = torch.zeros(tokens, 256, dtype=half, device=DEVICE), torch.zeros(tokens, 8, device=DEVICE)
    next_x[:, :rows] = torch.nan
    emit = Emit(norm=norm, x=next_x, sums=next_sums, ssq=poisoned(2, tokens))
    out = run(w, operand(x, half), poisoned(tokens, rows), epilogue="residual", residual=before, emit=emit)
    wanted = before + x.to(half).float() @ weight.dequantize().t()
    assert difference(out, wanted) < 1e-3
    assert difference(next_x[:, :rows], wanted * norm) < (1e-2 if half == torch.bfloat16 else 2e-3)
    assert difference(next_sums, next_x.float().view(tokens, -1, 32).sum(-1)) < 1e-5
    assert difference(emit.ssq.sum(0), wanted.square().sum(1)) < 1e-3


@pytest.mark.parametrize("half", DTYPES)
@pytest.mark.parametrize("name", ["int4 g64", "int8", "nvfp4", "fp8"])
def test_experts_by_index(name: str, half: torch.dtype) -> None:
    """Two tokens, three slots each: every slot's own expert, then the slots of a token added up by their gates."""
    experts, inner, hidden, slots = 4, 128, 96, 3
    wide, narrow = quantized(name, experts, 2 * inner, hidden), quantized(name, experts, hidden, inner)
    x, before = torch.randn(2, hidden, device=DEVICE), torch.randn(2, hidden, device=DEVICE)
    chosen = torch.tensor([[2, 0, 3], [1, 3, 1]], dtype=torch.int32, device=DEVICE)
    gates = torch.rand(2, slots, device=DEVICE)
    inside, sums = torch.zeros(6, 256, dtype=half, device=DEVICE), torch.zeros(6, 8, device=DEVICE)
    up = packed(wide, half, paired=True)
    routed = Routed(slots=slots, chosen=chosen.flatten(), shared_rows=True)
    config = Config(rows=256 if name == "fp8" else 128, stages=2, split=1)
    run(up, operand(x, half), inside, epilogue="silu", out_sums=sums, routed=routed, config=config)
    down = packed(narrow, half)
    out = poisoned(2, hidden)
    routed = Routed(slots=slots, chosen=chosen.flatten(), shared_rows=False, gates=gates.flatten())
    run(
        down, Operand(x=inside, sums=sums, width=inner), out, epilogue="residual", residual=before, routed=routed,
        tokens=2,
    )  # fmt: skip
    first, second = wide.dequantize(), narrow.dequantize()
    for token in range(2):
        wanted = before[token].clone()
        for slot in range(slots):
            e = int(chosen[token, slot])
            gate, rest = (x[token].to(half).float() @ first[e].t()).chunk(2)
            wanted += gates[token, slot] * ((F.silu(gate) * rest).to(half).float() @ second[e].t())
        assert difference(out[token], wanted) < (2e-2 if half == torch.bfloat16 else 3e-3)


@pytest.mark.parametrize("half", DTYPES)
def test_experts_that_are_added_up_are_whole(half: torch.dtype) -> None:
    """More rows than a program has, and a shape meant for pieces: a token's slots are its pieces, and no others."""
    experts, inner, hidden, slots = 3, 256, 300, 2
    weight = quantized("int4 g64", experts, hidden, inner)
    x, before = torch.randn(slots, inner, device=DEVICE), torch.randn(1, hidden, device=DEVICE)
    chosen, gates = torch.tensor([2, 0], dtype=torch.int32, device=DEVICE), torch.rand(slots, device=DEVICE)
    out = run(
        packed(weight, half), operand(x, half), poisoned(1, hidden), epilogue="residual", residual=before, tokens=1,
        routed=Routed(slots=slots, chosen=chosen, shared_rows=False, gates=gates), config=Config(stages=2, split=2),
    )  # fmt: skip
    dense = weight.dequantize()
    wanted = before + sum(gates[s] * (x[s].to(half).float() @ dense[int(chosen[s])].t()) for s in range(slots))
    assert difference(out, wanted) < 1e-3


@pytest.mark.parametrize("half", DTYPES)
def test_experts_sorted(half: torch.dtype) -> None:
    """Many tokens: blocks of slots that share an expert, some places empty."""
    experts, inner, hidden, slots, tokens = 3, 64, 96, 2, 9
    weight = quantized("int4 g64", experts, inner, hidden)
    w = packed(weight, half)
    x = torch.randn(tokens, hidden, device=DEVICE)
    chosen = torch.stack([torch.randperm(experts)[:slots] for _ in range(tokens)]).to(DEVICE)
    order, owners = [], []
    for e in range(experts):
        mine = [int(s) for s in torch.where(chosen.flatten() == e)[0]]
        order.append(mine + [-1] * (16 - len(mine)))
        owners.append(e)
    routed = Routed(
        slots=slots,
        chosen=torch.tensor(owners, dtype=torch.int32, device=DEVICE),
        shared_rows=True,
        order=torch.tensor(order, dtype=torch.int32, device=DEVICE),
    )
    out = run(w, operand(x, half), poisoned(tokens * slots, inner), routed=routed)
    dense = weight.dequantize()
    wanted = torch.stack([x[s // slots].to(half).float() @ dense[chosen.flatten()[s]].t() for s in range(18)])
    assert difference(out, wanted) < 1e-3


def test_row_order_covers_every_row_once() -> None:
    order = row_order(200, 64, torch.device("cpu"))
    assert order.shape == (256,) and sorted(order[order < 200].tolist()) == list(range(200))
    assert order[0] == 0 and order[64] == 100 and order[128] == 64 and order[192] == 164
