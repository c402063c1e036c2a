"""Attention on the GPU against plain torch: cache writes bit for bit, pairs of cache formats, odd widths, windows."""

import math
from dataclasses import dataclass

import pytest
import torch
from gpu_doubles import DEVICE, DTYPES, difference
from torch import Tensor

from qrun.cache import KVStore
from qrun.formats import kv_format
from qrun.kernels import gpu_append, gpu_attention, gpu_flash, reference, reference_attention
from qrun.kernels.gpu_kv import Side, padded

KINDS = ["bf16", "fp32", "int8", "int4", "fp8"]
TOLERANCE = 4e-3 if DEVICE == "cpu" else 1.2e-2  # of products in fp16, and in bf16


def poisoned_store(kind: str, kv_heads: int, dim: int, capacity: int) -> KVStore:
    """What nothing has written must not be read: NaN, or the largest codes with NaN scales."""
    store = KVStore(kv_format(kind), kv_heads, dim, capacity, torch.device(DEVICE))
    for tensor in (store.codes, store.scale):
        if tensor is not None:
            tensor.view(torch.uint8).fill_(0x7F if tensor.dtype == torch.float8_e4m3fn else 0xFF)
    return store


def side(store: KVStore) -> Side:
    return Side(store.format.name, store.codes, store.scale)


def nan(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


def filled(kind: str, x: Tensor, capacity: int) -> KVStore:
    """A store of x [S, kv_heads, D] from position 0 on."""
    store = poisoned_store(kind, x.shape[1], x.shape[2], capacity)
    store.write(torch.arange(x.shape[0], device=DEVICE), x)
    return store


@dataclass
class Appended:
    k: KVStore
    v: KVStore
    q: Tensor


def append(
    module: object, kinds: tuple[str, str], qkv: Tensor, *, heads: int, kv_heads: int, dim: int, norm: bool
) -> Appended:
    torch.manual_seed(3)
    tokens = qkv.shape[0]
    positions = torch.randperm(tokens + 4, device=DEVICE)[:tokens]
    angle = positions[:, None] * torch.logspace(0, -3, dim // 2, device=DEVICE)
    norms = [torch.rand(dim, device=DEVICE) + 0.5 if norm else None for _ in range(2)]
    made = Appended(
        poisoned_store(kinds[0], kv_heads, dim, tokens + 4),
        poisoned_store(kinds[1], kv_heads, dim, tokens + 4),
        nan(tokens, heads, padded(dim), dtype=DTYPES[0]),
    )
    module.append(  # type: ignore[attr-defined]
        qkv,
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        positions=positions,
        cos=angle.cos(),
        sin=angle.sin(),
        q_norm=norms[0],
        k_norm=norms[1],
        eps=1e-5,
        k=side(made.k),
        v=side(made.v),
        q_out=made.q,
    )
    return made


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "norm"), [(5, 1, 128, True), (2, 2, 80, True), (3, 1, 18, False)])
def test_append(heads: int, kv_heads: int, dim: int, norm: bool) -> None:
    """In every format, codes are those of the format itself for what the float32 cache holds of the same keys."""
    torch.manual_seed(0)
    qkv = torch.randn(7, (heads + 2 * kv_heads) * dim, device=DEVICE)
    qkv *= torch.logspace(-3, 3, qkv.shape[1], device=DEVICE)[torch.randperm(qkv.shape[1], device=DEVICE)]
    qkv[3] = 0.0
    shape = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "norm": norm}
    plain = append(gpu_append, ("fp32", "fp32"), qkv, **shape)
    twin = append(reference_attention, ("fp32", "fp32"), qkv, **shape)
    for ours, theirs in ((plain.k.codes, twin.k.codes), (plain.v.codes, twin.v.codes), (plain.q, twin.q)):
        written = ~theirs.isnan()
        assert torch.equal(~ours.isnan(), written)
        assert difference(ours[written], theirs[written]) < (1e-6 if ours.dtype == torch.float32 else 1e-3)
    for kind in KINDS:
        found = append(gpu_append, (kind, kind), qkv, **shape)
        for ours, values in ((found.k, plain.k), (found.v, plain.v)):
            # On the CPU, where torch divides; on a GPU it multiplies by a constant's reciprocal.
            codes, scale = kv_format(kind).encode(values.codes.cpu())
            ours_codes = ours.codes.cpu()
            written = ~values.codes[0, :, 0].isnan().cpu()
            assert written.sum() == 7
            if scale is not None and ours.scale is not None:
                scales = ours.scale.cpu()[:, written].float(), scale[:, written].float()
                assert torch.equal(*scales) if kind != "int4" else difference(*scales) < 1e-3
            if kind == "int4":
                nibbles = [torch.stack((c & 15, c >> 4)).int() for c in (codes[:, written], ours_codes[:, written])]
                apart = (nibbles[0] - nibbles[1]).abs()
                assert apart.max() <= 1
                assert (apart > 0).float().mean() < 2e-3
            else:
                assert same_bits(codes[:, written], ours_codes[:, written])
            rest = ours_codes[:, ~written].view(torch.uint8)
            assert (rest == rest[0, 0, 0]).all(), "only the given positions are written"
        wanted = reference_attention.hadamard32(plain.q) if kind == "int4" else plain.q
        assert difference(found.q, wanted) < 1e-3


def heads_of(tokens: int, heads: int, dim: int) -> Tensor:
    """Values with a few large channels, as keys have."""
    x = torch.randn(tokens, heads, dim, device=DEVICE)
    x[..., 1] *= 6
    return x


def ready(q: Tensor, k: str, dtype: torch.dtype) -> Tensor:
    """q [M, heads, D] as ``append`` leaves it."""
    dim = q.shape[-1]
    wide = torch.nn.functional.pad(q / math.sqrt(dim), (0, -dim % 32))
    return (reference_attention.hadamard32(wide) if k == "int4" else wide).to(dtype)


def decode(q: Tensor, k: KVStore, v: KVStore, length: int, window: int, splits: int, repeat: int = 1) -> Tensor:
    """``decode_attention`` of q [1, heads, D], checked for what it must leave alone."""
    _, heads, dim = q.shape
    kv_heads = k.codes.shape[0]
    dtype = DTYPES[-1]
    wide, whole = heads * dim, dim % 32 == 0
    out = nan(1, wide + 64, dtype=torch.bfloat16 if dim == 128 else dtype)
    sums = nan(1, (wide + 64) // 32) if whole else None
    partial = nan(*gpu_attention.partial_shape(heads, kv_heads, dim, splits))
    counter = torch.zeros(kv_heads, dtype=torch.int32, device=DEVICE)
    for _ in range(repeat):
        out.fill_(torch.nan)
        gpu_attention.decode_attention(
            ready(q, k.format.name, dtype)[0],
            k=side(k),
            v=side(v),
            dim=dim,
            length=torch.tensor([length], device=DEVICE),
            window=window,
            splits=splits,
            partial=partial,
            counter=counter,
            out=out,
            sums=sums,
        )
        assert not counter.any()
    assert out[0, wide:].isnan().all()
    if sums is not None:
        assert sums[0, wide // 32 :].isnan().all()
        wanted = out[0, :wide].float().view(-1, 32).sum(-1)
        assert difference(sums[0, : wide // 32], wanted) < 1e-5
    return out[0, :wide].view(1, heads, dim)


CASES = [  # kinds of K and V, heads, kv heads, dim, length, window, splits
    ("bf16", "bf16", 5, 1, 128, 300, 0, 3),
    ("fp32", "int8", 4, 2, 64, 129, 0, 2),
    ("int8", "int4", 8, 1, 80, 257, 0, 4),
    ("int4", "int8", 2, 2, 24, 64, 0, 4),
    ("int4", "int4", 10, 2, 128, 191, 100, 2),
    ("fp8", "fp8", 2, 1, 80, 200, 0, 5),
    ("fp8", "bf16", 12, 1, 64, 70, 64, 1),
    ("bf16", "int4", 1, 1, 160, 130, 65, 3),
    ("int8", "fp8", 8, 4, 18, 65, 0, 2),
    ("int4", "fp32", 3, 1, 20, 1, 0, 3),
    ("int8", "int8", 17, 1, 64, 63, 0, 2),
]


@pytest.mark.parametrize(("k", "v", "heads", "kv_heads", "dim", "length", "window", "splits"), CASES)
def test_decode(k: str, v: str, heads: int, kv_heads: int, dim: int, length: int, window: int, splits: int) -> None:
    torch.manual_seed(0)
    keys, values = (filled(kind, heads_of(length, kv_heads, dim), length + 70) for kind in (k, v))
    q = torch.randn(1, heads, dim, device=DEVICE)
    found = decode(q, keys, values, length, window, splits, repeat=2)
    wanted = reference.attend(q, lambda a, b: (keys.read(a, b), values.read(a, b)), length - 1, window=window or None)
    assert difference(found, wanted) < TOLERANCE
    twin = nan(1, heads * dim)
    reference_attention.decode_attention(
        ready(q, k, torch.float32)[0],
        k=side(keys),
        v=side(values),
        dim=dim,
        length=torch.tensor([length]),
        window=window,
        splits=splits,
        partial=nan(0),
        counter=nan(0),
        out=twin,
        sums=None,
    )
    assert difference(twin.view_as(wanted), wanted) < 1e-5


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 129, 192])
def test_decode_at_the_edges_of_blocks_and_splits(length: int) -> None:
    """The grid and the scratch stay, the length in device memory does not."""
    torch.manual_seed(0)
    keys, values = (filled("int8", heads_of(length, 1, 64), 256) for _ in range(2))
    q = torch.randn(1, 2, 64, device=DEVICE)
    for window in (0, 64):
        wanted = reference.attend(
            q, lambda a, b: (keys.read(a, b), values.read(a, b)), length - 1, window=window or None
        )
        assert difference(decode(q, keys, values, length, window, 2), wanted) < TOLERANCE


def test_decode_is_deterministic() -> None:
    torch.manual_seed(0)
    keys, values = (filled("int8", heads_of(200, 1, 64), 256) for _ in range(2))
    q = torch.randn(1, 2, 64, device=DEVICE)
    assert torch.equal(decode(q, keys, values, 200, 0, 4), decode(q, keys, values, 200, 0, 4))


def test_split_count() -> None:
    assert gpu_attention.split_count(132, 8, 1 << 17) == 33
    assert gpu_attention.split_count(132, 8, 512) == 4
    assert gpu_attention.split_count(132, 1, 1 << 17) == 64
    assert gpu_attention.split_count(2, 8, 10) == 1


def expanded(store: KVStore, start: int, stop: int, *, rotate: bool, dtype: torch.dtype) -> Tensor:
    kv_heads, dim = store.codes.shape[0], store.head_dim
    out = nan(kv_heads, stop - start, padded(dim), dtype=dtype)
    gpu_flash.expand_kv(side(store), dim=dim, start=start, stop=stop, rotate=rotate, out=out)
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [128, 80, 24])
def test_expand(kind: str, dim: int) -> None:
    torch.manual_seed(0)
    store = filled(kind, heads_of(75, 2, dim), 80)
    found = expanded(store, 3, 75, rotate=True, dtype=DTYPES[-1])
    assert difference(found[..., :dim], store.read(3, 75)) < TOLERANCE
    kept = expanded(store, 3, 75, rotate=False, dtype=DTYPES[-1])
    for rotate, ours in ((True, found), (False, kept)):
        wanted = reference_attention.decode(side(store), 3, 75, dim=dim, rotate=rotate)
        assert difference(ours, wanted) < TOLERANCE


@pytest.mark.parametrize(
    ("k", "v", "heads", "kv_heads", "dim", "start", "tokens", "window"),
    [
        ("bf16", "bf16", 2, 1, 128, 0, 130, 0),
        ("int4", "int4", 2, 2, 64, 37, 70, 0),
        ("int8", "int4", 5, 1, 80, 0, 90, 33),
        ("fp8", "int8", 2, 1, 24, 150, 65, 100),
        ("int4", "fp8", 1, 1, 160, 100, 1, 0),
        ("bf16", "bf16", 1, 1, 64, 70, 200, 1),
    ],
)
def test_flash(k: str, v: str, heads: int, kv_heads: int, dim: int, start: int, tokens: int, window: int) -> None:
    torch.manual_seed(0)
    stop = start + tokens
    keys, values = (filled(kind, heads_of(stop, kv_heads, dim), stop) for kind in (k, v))
    q = torch.randn(tokens, heads, dim, device=DEVICE)
    first = max(0, start - window + 1) if window else 0
    dtype = DTYPES[-1]
    out, twin = nan(tokens, heads * dim + 32, dtype=dtype), nan(tokens, heads * dim + 32, dtype=dtype)
    for flash, to in ((gpu_flash.flash, out), (reference_attention.flash, twin)):
        flash(
            ready(q, k, dtype),
            expanded(keys, first, stop, rotate=False, dtype=dtype),
            expanded(values, first, stop, rotate=True, dtype=dtype),
            dim=dim,
            start=start,
            first=first,
            window=window,
            out=to,
        )
        assert to[:, heads * dim :].isnan().all()
    wanted = reference.attend(
        q, lambda a, b: (keys.read(a, b), values.read(a, b)), start, window=window or None
    ).flatten(1)
    assert difference(twin[:, : heads * dim], wanted) < TOLERANCE
    assert difference(out[:, : heads * dim], wanted) < TOLERANCE
