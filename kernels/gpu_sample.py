"""Logits to a token in two launches and no wait: the best few of a vocabulary, the cuts, and a race by Philox numbers.

A number and its place are one int64 key, larger for what comes first, so that no two keys are equal and a rank is a
count of larger keys. The vocabulary lies in groups of 64, of which the first launch keeps the largest key. The top_k
largest tokens are in the top_k groups whose largest key is largest: few enough to compare with one another.
It does not know penalties, nor a choice among more than 64.
"""
# pyright: basic, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from qrun.kernels.gpu_aot import Variant

MOST = 64
"""The largest top_k."""
_GROUPS = 16  # groups a program looks at
_GREEDY = 2048  # tokens a program looks at where only the largest counts
_LEAST = tl.constexpr(-(1 << 63))


@triton.jit
def _keys(logits, ids, V: tl.constexpr):
    """int64 keys of the tokens ``ids``: the order of their logits, then of their ids, the lower first. NaN is last."""
    value = tl.load(logits + ids, mask=ids < V, other=float("-inf"))
    value = tl.where(value == value, value, float("-inf"))
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(bits == -2147483648, 0, bits)  # -0 is 0
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)


@triton.jit
def _token(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _value(key):
    order = (key >> 32).to(tl.int32)
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _member(group, i, G: tl.constexpr):
    """The token that is number ``i`` of 64 in a group: runs of 8, far apart, so that neighbours are in other groups."""
    return (i // 8) * (8 * G) + group * 8 + i % 8


@triton.jit
def greedy_kernel(logits, keys, arrived, token, V: tl.constexpr, BLOCK: tl.constexpr, BLOCKS_P: tl.constexpr):
    """The largest key of each block of the vocabulary; the last program takes the largest of those."""
    block = tl.program_id(0)
    found = _keys(logits, block * BLOCK + tl.arange(0, BLOCK), V)
    tl.store(keys + block, tl.max(found, axis=0))
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(arrived, 0)
        at = tl.arange(0, BLOCKS_P)
        peaks = tl.load(keys + at, mask=at < tl.num_programs(0), other=_LEAST, cache_modifier=".cg")
        tl.store(token, _token(tl.max(peaks, axis=0)).to(tl.int64))


@triton.jit
def peaks_kernel(logits, keys, V: tl.constexpr, G: tl.constexpr, GROUPS: tl.constexpr):
    """keys[g]: the largest key of group g."""
    groups = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    found = _keys(logits, _member(groups[:, None], tl.arange(0, 64)[None, :], G), V)
    tl.store(keys + groups, tl.max(found, axis=1))


@triton.jit(do_not_specialize=["top_k"])
def choose_kernel(
    logits, keys, arrived, seed, counter, values, ids, token, top_k, temperature, top_p, min_p,
    V: tl.constexpr, G: tl.constexpr, GROUPS: tl.constexpr, CHUNK: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Each program ranks its groups among all; the last one ranks what the best hold, cuts, and draws.

    ``keys`` holds the peaks [G], then the best groups' peaks [MOST], the candidates [MOST·64] and the best of them
    [MOST], in descending order but for the candidates.
    """
    best = keys + G
    candidates = best + MOST
    ranked = candidates + MOST * 64

    mine = tl.load(keys + tl.program_id(0) * GROUPS + tl.arange(0, GROUPS))
    larger = tl.zeros((GROUPS, CHUNK), tl.int32)
    for start in range(0, G, CHUNK):
        other = start + tl.arange(0, CHUNK)
        peaks = tl.load(keys + other, mask=other < G, other=_LEAST)
        larger += (peaks[None, :] > mine[:, None]).to(tl.int32)
    place = tl.sum(larger, axis=1)
    tl.store(best + place, mine, mask=place < MOST)

    tl.debug_barrier()
    if tl.atomic_add(arrived, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(arrived, 0)
        # What is not below the least of the best groups' peaks: at least top_k tokens, and hardly ever many more.
        least = tl.load(best + top_k - 1, cache_modifier=".cg")
        at = tl.arange(0, MOST * 64)
        inside = at // 64 < top_k
        peak = tl.load(best + at // 64, mask=inside, other=0, cache_modifier=".cg")
        group = (_token(peak) % (8 * G)) // 8
        found = _keys(logits, tl.where(inside, _member(group, at % 64, G), V), V)
        kept = (inside & (found >= least)).to(tl.int32)
        tl.store(candidates + tl.cumsum(kept, axis=0) - 1, found, mask=kept > 0)
        total = tl.sum(kept, axis=0)
        tl.debug_barrier()

        lane = tl.arange(0, MOST)
        first = 0
        while first < total:
            row = tl.load(candidates + first + lane, mask=first + lane < total, other=_LEAST)
            ahead = tl.zeros((MOST, MOST), tl.int32)
            start = 0
            while start < total:
                column = tl.load(candidates + start + lane, mask=start + lane < total, other=_LEAST)
                ahead += (column[None, :] > row[:, None]).to(tl.int32)
                start += MOST
            rank = tl.sum(ahead, axis=1)
            tl.store(ranked + rank, row, mask=(rank < top_k) & (first + lane < total))
            first += MOST
        tl.debug_barrier()

        key = tl.load(ranked + lane, mask=lane < top_k, other=_LEAST)
        value = tl.where(lane < top_k, _value(key), float("-inf"))
        # The largest is taken off before the division: a tiny temperature must not make infinities of it.
        largest = tl.maximum(tl.max(value, axis=0), -3e38)
        chance = tl.where(lane < top_k, tl.exp((value - largest) / temperature), 0.0)
        chance = chance / tl.maximum(tl.sum(chance, axis=0), 1e-30)
        likeliest = tl.max(chance, axis=0)
        chance = tl.where((top_p >= 1) | (tl.cumsum(chance, axis=0) - chance < top_p), chance, 0.0)
        chance = tl.where((min_p <= 0) | (chance >= min_p * likeliest), chance, 0.0)
        tl.store(values + lane, chance)
        tl.store(ids + lane, tl.where(lane < top_k, _token(key), -1))
        # p / Exp(1): the largest is of each with its chance. Where nothing can be drawn, the first.
        step = tl.load(counter)
        luck = tl.rand(tl.load(seed), step * MOST + lane)
        race = tl.where(chance > 0, chance / -tl.log(tl.maximum(luck, 1e-10)), -1.0)
        winner = tl.argmax(race, axis=0)
        tl.store(token, tl.sum(tl.where(lane == winner, _token(key), 0), axis=0).to(tl.int64))
        tl.debug_barrier()  # every thread has read the counter
        tl.store(counter, step + 1)


def handles(temperature: float, top_k: int) -> bool:
    """Whether ``sample`` can choose by these settings; top_p and min_p may be anything."""
    return temperature == 0 or 1 <= top_k <= MOST


def _groups(vocab: int) -> int:
    return max(-(-vocab // (64 * _GROUPS)) * _GROUPS, MOST)


def scratch(vocab: int) -> int:
    """How many int64 ``keys`` must have."""
    return max(_groups(vocab) + MOST * 66, -(-vocab // _GREEDY))


def sample(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: Tensor,
    counter: Tensor,
    values: Tensor,
    ids: Tensor,
    token: Tensor,
    keys: Tensor,
    arrived: Tensor,
) -> Tensor:
    """Choose a token by logits float32 [1, V]: top_k, then top_p and min_p among what it left, then chance.

    On the device: ``seed`` and ``counter`` int64 [1], the draws so far, which is counted up; scratch ``keys`` int64
    [scratch(V)] and ``arrived`` int32 [1], zero before and after. Fills and returns ``token`` int64 [1]; fills
    ``values`` float32 [64] and ``ids`` int32 [64] with the top_k in descending order, their chances before the last
    draw (0 where cut; they need not add up to 1) and tokens (-1 beyond). At temperature 0 these three stay as they are.
    """
    vocab = logits.shape[-1]
    if temperature == 0:
        greedy_kernel[(-(-vocab // _GREEDY),)](
            logits, keys, arrived, token, **_greedy_constants(vocab), num_warps=4, num_stages=1
        )
        return token
    constants = _constants(vocab)
    grid = (constants["G"] // _GROUPS,)
    peaks_kernel[grid](logits, keys, V=vocab, G=constants["G"], GROUPS=_GROUPS, num_warps=4, num_stages=1)
    choose_kernel[grid](
        logits, keys, arrived, seed, counter, values, ids, token, min(top_k, vocab), temperature, top_p, min_p,
        **constants, num_warps=8, num_stages=1,
    )  # fmt: skip
    return token


def _greedy_constants(vocab: int) -> dict[str, int]:
    blocks = -(-vocab // _GREEDY)
    return {"V": vocab, "BLOCK": _GREEDY, "BLOCKS_P": 1 << (blocks - 1).bit_length()}


def _constants(vocab: int) -> dict[str, int]:
    return {"V": vocab, "G": _groups(vocab), "GROUPS": _GROUPS, "CHUNK": 256, "MOST": MOST}


class DeviceChoice:
    """One reply's choices on a device, in buffers that stay where they are: fit for a CUDA graph.

    The token it returns lies in one of them: the next call overwrites it.
    """

    def __init__(
        self,
        vocab: int,
        device: str | torch.device,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        seed: int,
    ) -> None:
        self._settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        self._seed = torch.zeros(1, dtype=torch.int64, device=device)
        self._counter = torch.zeros_like(self._seed)
        self._keys = torch.zeros(scratch(vocab), dtype=torch.int64, device=device)
        self._arrived = torch.zeros(1, dtype=torch.int32, device=device)
        self.token = torch.zeros(1, dtype=torch.int64, device=device)
        self.values = torch.zeros(MOST, dtype=torch.float32, device=device)
        self.ids = torch.zeros(MOST, dtype=torch.int32, device=device)
        self.restart(seed)

    def restart(self, seed: int) -> None:
        """Begin another reply with the same settings: a graph that holds the choice goes on with the new seed."""
        self._seed.fill_(seed)
        self._counter.zero_()

    def __call__(self, logits: Tensor) -> Tensor:
        """logits float32 [1, V] -> token int64 [1]."""
        return sample(
            logits, **self._settings, seed=self._seed, counter=self._counter, values=self.values, ids=self.ids,
            token=self.token, keys=self._keys, arrived=self._arrived,
        )  # fmt: skip


def variants() -> list[Variant]:
    """Both ways for ERNIE-4.5's vocabulary."""
    vocab = 103424
    pointers = {"logits": "*fp32", "keys": "*i64"}
    states = {"arrived": "*i32", "token": "*i64"}
    numbers = {"top_k": "i32", "temperature": "fp32", "top_p": "fp32", "min_p": "fp32"}
    drawn = {"seed": "*i64", "counter": "*i64", "values": "*fp32", "ids": "*i32"}
    constants = _constants(vocab)
    peaks = {name: constants[name] for name in ("V", "G", "GROUPS")}
    return [
        Variant(name="greedy", kernel=greedy_kernel, types=pointers | states, constants=_greedy_constants(vocab)),
        Variant(name="sample peaks", kernel=peaks_kernel, types=pointers, constants=peaks),
        Variant(
            name="sample choose",
            kernel=choose_kernel,
            types=pointers | states | drawn | numbers,
            constants=constants,
            warps=8,
        ),
    ]
