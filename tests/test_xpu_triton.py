"""The Triton kernels of the XPU backend under the interpreter, against plain products and plain attention."""

import math
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from xpu_doubles import card

from qrun.backends import xpu_triton
from qrun.backends.xpu_matrix import expand, place
from qrun.cache import KVStore
from qrun.formats import format_of, kv_format
from qrun.kernels import reference, reference_attention
from qrun.kernels.gpu_kv import Side, padded
from qrun.kernels.xpu_attention import decode_attention, partial_shape, split_count
from qrun.kernels.xpu_gemv import Kind, Matrix, Routed, gemv, rows_for
from qrun.recipe import WeightScheme

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, nothing is interpreted")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def difference(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|; NaN where anything is."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def nan(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def made(
    kind: Kind, n: int, k: int, group: int, *, experts: int = 0, rows_first: bool = False, groups_first: bool = False,
    offset: bool = False, factor: bool = False,
) -> tuple[Matrix, Tensor]:  # fmt: skip
    """A matrix of random codes, with columns of padding that no product may see, and its values [experts, n, k].

    rows_first: codes [n, experts, …] and not [experts, n, …]; groups_first: scales [G, experts, n].
    """
    kp = math.lcm(32, group) * -(-k // math.lcm(32, group)) if group else -(-k // 32) * 32
    group = group or kp
    count = max(1, experts)
    table = torch.randn(16) if kind == "codebook" else None
    if kind in ("int4", "codebook"):
        codes = torch.randint(0, 16, (count, n, kp), dtype=torch.uint8)
        values = codes.float() if table is None else table[codes.long()]
        codes = (codes[..., ::2] | codes[..., 1::2] << 4).contiguous().view(torch.int32)
    elif kind == "int8":
        codes = torch.randint(-128, 128, (count, n, kp), dtype=torch.int8)
        values = codes.float()
    else:
        codes = torch.randint(0, 255, (count, n, kp), dtype=torch.uint8) & 0xFE  # every number but NaN
        values = codes.view(torch.float8_e4m3fn).float()
        codes = codes.view(torch.float8_e4m3fn)
    across = (count, kp // group, n)
    wide = torch.float32 if kind == "fp8" or group == kp else torch.float16
    scale = (torch.rand(across) + 0.5).to(wide)
    zero = torch.randint(0, 16, across, dtype=torch.int8) if kind == "int4" else None
    shift = torch.randn(across).half() if offset else None
    each = torch.rand(count) + 0.5 if factor else None

    def by_column(part: Tensor | None) -> Tensor | float:
        return 0.0 if part is None else part.float().repeat_interleave(group, 1).transpose(1, 2)

    values = (values - by_column(zero)) * by_column(scale) + by_column(shift)
    values = values * (1.0 if each is None else each[:, None, None])
    if groups_first:
        scale, zero, shift = (None if t is None else t.transpose(0, 1).contiguous() for t in (scale, zero, shift))
    codes = codes.transpose(0, 1).contiguous() if rows_first else codes
    matrix = Matrix(
        kind=kind, n=n, k=k, kp=kp, group=group, codes=codes, scale=scale, zero=zero, offset=shift, table=table,
        factor=each, codes_row=codes.stride(0 if rows_first else 1), codes_expert=codes.stride(1 if rows_first else 0),
        scale_group=scale.stride(0 if groups_first else 1), scale_expert=scale.stride(1 if groups_first else 0),
    )  # fmt: skip
    return matrix, values[..., :k] if experts else values[0, :, :k]


SHAPES: list[tuple[Kind, int, int, int, int]] = [  # kind, n, k, group, tokens
    ("int4", 9, 70, 16, 1), ("int4", 3, 320, 32, 8), ("int4", 3, 1100, 64, 3), ("int4", 4, 256, 128, 1),
    ("int4", 5, 99, 0, 3), ("int8", 7, 130, 16, 3), ("int8", 4, 192, 96, 1), ("int8", 11, 513, 0, 1),
    ("int8", 2, 64, 64, 8), ("fp8", 3, 200, 128, 3), ("fp8", 5, 33, 0, 1), ("fp8", 2, 32, 0, 8),
    ("codebook", 6, 96, 16, 1), ("codebook", 3, 77, 32, 3), ("codebook", 1, 1024, 64, 8),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "n", "k", "group", "tokens"), SHAPES)
def test_product(kind: Kind, n: int, k: int, group: int, tokens: int) -> None:
    w, values = made(kind, n, k, group, offset=tokens == 3, factor=tokens == 3)
    x = torch.randn(tokens, k).to(torch.float16 if tokens == 8 else torch.bfloat16)
    out = nan(tokens, n + 1)
    gemv(x, out[:, :n], w)
    assert difference(out[:, :n], x.float() @ values.t()) < 1e-5
    assert out[:, n].isnan().all()


def test_codes_of_eight_bits() -> None:
    """Codes at either end of each half: e4m3's subnormal numbers, and the largest."""
    for kind in ("fp8", "int8"):
        w, _ = made(kind, 8, 256, 0)
        codes = torch.arange(256, dtype=torch.uint8).repeat(8, 1)
        codes[(codes & 0x7F) == 0x7F] = 0
        w.codes.view(torch.uint8).copy_(codes)
        decoded = codes.view(torch.float8_e4m3fn if kind == "fp8" else torch.int8).float()
        x = torch.zeros(8, 256)
        for first in (0, 128, 248):
            x.zero_()[:, first : first + 8] = torch.eye(8)
            wanted = decoded[:, first : first + 8].t() * w.scale.view(1, 8)
            assert torch.equal(product(x, w), wanted)


def product(x: Tensor, w: Matrix) -> Tensor:
    out = nan(x.shape[0], w.n)
    gemv(x, out, w)
    return out


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8", "codebook"])
@pytest.mark.parametrize("turned", [False, True])
def test_experts_by_index(kind: Kind, turned: bool) -> None:
    """Both layouts of a stack; a row for all slots of a token or each its own; added up by gates or not."""
    tokens, slots, experts, n, k = 2, 3, 4, 5, 96
    w, values = made(
        kind, n, k, 32, experts=experts, rows_first=turned, groups_first=turned, offset=turned, factor=not turned
    )
    chosen = torch.tensor([2, 0, 3, 1, 3, 1], dtype=torch.int64 if turned else torch.int32)
    shared, own = torch.randn(tokens, k).half(), torch.randn(tokens * slots, k).half()
    gates = torch.rand(tokens * slots)
    experts_of = values[chosen.long()]  # [tokens · slots, n, k]

    each = nan(tokens * slots, n)
    gemv(shared, each, w, routed=Routed(chosen=chosen, slots=slots, shared_rows=True))
    wanted = torch.einsum("snk,sk->sn", experts_of, shared.float().repeat_interleave(slots, 0))
    assert difference(each, wanted) < 1e-5

    total = nan(tokens, n)
    gemv(own, total, w, routed=Routed(chosen=chosen, slots=slots, shared_rows=False, gates=gates))
    wanted = gates[:, None] * torch.einsum("snk,sk->sn", experts_of, own.float())
    assert difference(total, wanted.view(tokens, slots, n).sum(1)) < 1e-5


def test_rows_of_a_program() -> None:
    assert rows_for(4096, 1, 1) == 8
    assert rows_for(4096, 1, 8) == 2
    assert rows_for(1024, 1, 1) == 4
    assert rows_for(256, 8, 1) == 8


@pytest.mark.parametrize(
    "scheme",
    [
        WeightScheme("int", 4, 64, False),
        WeightScheme("int", 4, 32, True),
        WeightScheme("int", 8, 0),
        WeightScheme("int", 6, 64, False),
        WeightScheme("fp8", 8),
        WeightScheme("nf4", 4),
        WeightScheme("nvfp4", 4),
    ],
)
def test_placed_weights(scheme: WeightScheme) -> None:
    half = torch.float16 if scheme.bits == 4 else torch.bfloat16
    placed = place(format_of(scheme).quantize(torch.randn(6, 160) * 0.05), half)
    stand_in = card(half)
    (kernel,) = [each for each in xpu_triton.LINEARS if each.takes(placed, stand_in, "16")]
    assert kernel.tier == "triton" and kernel.most == 8 and not kernel.fallback
    x = torch.randn(2, 160).to(half)
    wanted = x.float() @ expand(placed, 0, 6, torch.float32).t()
    assert difference(kernel.bind(placed, stand_in, "16")(x), wanted) < 1e-5
    assert kernel.takes(placed, stand_in, "int8"), "so few tokens stay in 16 bits"


def test_where_it_is_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert xpu_triton.usable(card())
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not xpu_triton.usable(card())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(xpu_triton, "find_spec", lambda name: None)
    assert not xpu_triton.usable(card())


Kinds = Literal["bf16", "fp32", "int8", "int4", "fp8"]
CASES: list[tuple[Kinds, Kinds, int, int, int, int, int, int]] = [
    # kinds of K and V, heads, kv heads, dim, length, window, splits
    ("bf16", "bf16", 4, 1, 128, 300, 0, 3),
    ("fp32", "int8", 2, 2, 64, 129, 0, 2),
    ("int8", "int8", 8, 1, 64, 700, 300, 8),
    ("int8", "int4", 4, 1, 80, 257, 0, 4),
    ("int4", "int8", 2, 2, 32, 64, 0, 5),
    ("int4", "int4", 6, 2, 128, 191, 100, 2),
    ("fp8", "fp8", 2, 1, 80, 200, 0, 5),
    ("fp8", "bf16", 8, 1, 64, 70, 64, 1),
    ("bf16", "int4", 1, 1, 256, 30, 17, 3),
    ("int8", "fp8", 2, 1, 18, 65, 0, 2),
    ("int4", "fp32", 3, 1, 80, 1, 0, 3),
    ("bf16", "bf16", 1, 1, 96, 33, 1, 4),
]


@pytest.mark.parametrize(("k", "v", "heads", "kv_heads", "dim", "length", "window", "splits"), CASES)
def test_decode(k: Kinds, v: Kinds, heads: int, kv_heads: int, dim: int, length: int, window: int, splits: int) -> None:
    """Over what is written and nothing behind it, whatever share of the splits has nothing to see."""
    keys, values = (filled(kind, length, kv_heads, dim) for kind in (k, v))
    q = torch.randn(1, heads, dim)
    found = decode(q, keys, values, length, window, splits)
    wanted = reference.attend(q, lambda a, b: (keys.read(a, b), values.read(a, b)), length - 1, window=window or None)
    assert difference(found, wanted) < 1e-3


def filled(kind: Kinds, length: int, kv_heads: int, dim: int) -> KVStore:
    """A store of random vectors, a channel of which is large, with NaN or the largest codes behind them."""
    store = KVStore(kv_format(kind), kv_heads, dim, length + 9, torch.device("cpu"))
    for part in store.parts().values():
        part.view(torch.uint8).fill_(0x7F if part.dtype == torch.float8_e4m3fn else 0xFF)
    x = torch.randn(length, kv_heads, dim)
    x[..., 1] *= 6
    store.write(torch.arange(length), x)
    return store


def decode(q: Tensor, k: KVStore, v: KVStore, length: int, window: int, splits: int) -> Tensor:
    _, heads, dim = q.shape
    ready = F.pad(q / math.sqrt(dim), (0, -dim % 32))
    ready = reference_attention.hadamard32(ready) if k.format.name == "int4" else ready
    assert ready.shape[-1] == padded(dim)
    out = nan(1, heads * dim, dtype=torch.float16)
    decode_attention(
        ready[0].half(), k=Side(k.format.name, k.codes, k.scale), v=Side(v.format.name, v.codes, v.scale), dim=dim,
        length=torch.tensor([length]), window=window, splits=splits,
        partial=nan(*partial_shape(heads, dim, splits)), out=out,
    )  # fmt: skip
    return out.view(1, heads, dim)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 64])
def test_decode_at_the_edges_of_blocks_and_splits(length: int) -> None:
    keys, values = filled("int8", length, 1, 64), filled("int8", length, 1, 64)
    q = torch.randn(1, 2, 64)
    for window in (0, 16):
        wanted = reference.attend(
            q, lambda a, b: (keys.read(a, b), values.read(a, b)), length - 1, window=window or None
        )
        assert difference(decode(q, keys, values, length, window, 2), wanted) < 1e-3


def test_split_count() -> None:
    assert split_count(20, 8, 1 << 17) == 40
    assert split_count(20, 8, 512) == 8
    assert split_count(32, 1, 1 << 17) == 64
    assert split_count(2, 8, 10) == 1
