"""Which tensors a model is made of: canonical weights, and the checkpoint tensors each is assembled from.

All supported families share one naming on disk, so this is the only place with tensor names. It reads no data; the
shapes here are what a checkpoint must have, so a config that lies is caught before anything is allocated.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from qrun.models.config import ModelConfig
from qrun.recipe import Role


@dataclass(frozen=True)
class Source:
    """One tensor on disk. ``pairs`` > 0: its rows are heads of that width whose rotary pairs are interleaved."""

    name: str
    shape: tuple[int, ...]
    pairs: int = 0


@dataclass(frozen=True)
class Weight:
    """One weight of the decoder. ``role`` is a recipe's, or kept for what is never quantized.

    ``parts`` holds one group of sources per matrix, concatenated along the rows: one group for a plain weight, one
    per expert for stacked ones. ``shape`` is that of the whole.
    """

    name: str
    role: Role | Literal["kept"]
    shape: tuple[int, ...]
    parts: tuple[tuple[Source, ...], ...]


def plan(config: ModelConfig, *, tied: bool) -> Iterator[Weight]:
    """Every weight, in the order of use: embedding, layers, final norm, head (left out when tied)."""
    yield from before(config, tied=tied)
    for i in range(config.layers):
        yield from layer(config, i)
    yield from after(config, tied=tied)


def before(config: ModelConfig, *, tied: bool) -> Iterator[Weight]:
    """What a token meets first. A tied embedding has the head's role: it is the same tensor."""
    role: Role = "lm_head" if tied else "embedding"
    yield _plain("embed", role, "model.embed_tokens.weight", (config.vocab, config.hidden))


def after(config: ModelConfig, *, tied: bool) -> Iterator[Weight]:
    """What follows the layers."""
    yield _plain("norm", "kept", "model.norm.weight", (config.hidden,))
    if not tied:
        yield _plain("lm_head", "lm_head", "lm_head.weight", (config.vocab, config.hidden))
    if config.head_bias:
        yield _plain("lm_head.bias", "kept", "lm_head.bias", (config.vocab,))


def layer(config: ModelConfig, i: int) -> Iterator[Weight]:
    """The weights of layer i, under ``layers.i.``."""
    here, disk = f"layers.{i}.", f"model.layers.{i}."
    hidden, dim = config.hidden, config.head_dim
    attn = disk + "self_attn."
    yield _plain(here + "attn_norm", "kept", disk + "input_layernorm.weight", (hidden,))
    paired = dim if config.rope.interleaved else 0
    rows = {"q": config.heads * dim, "k": config.kv_heads * dim, "v": config.kv_heads * dim}
    pairs = {"q": paired, "k": paired, "v": 0}
    yield _fused(here + "qkv", "dense", [Source(f"{attn}{n}_proj.weight", (rows[n], hidden), pairs[n]) for n in rows])
    if config.qkv_bias:
        yield _fused(here + "qkv.bias", "kept", [Source(f"{attn}{n}_proj.bias", (rows[n],), pairs[n]) for n in rows])
    if config.qk_norm:
        yield _plain(here + "q_norm", "kept", attn + "q_norm.weight", (dim,))
        yield _plain(here + "k_norm", "kept", attn + "k_norm.weight", (dim,))
    yield _plain(here + "o", "dense", attn + "o_proj.weight", (hidden, rows["q"]))
    if config.o_bias:
        yield _plain(here + "o.bias", "kept", attn + "o_proj.bias", (hidden,))
    yield _plain(here + "ffn_norm", "kept", disk + "post_attention_layernorm.weight", (hidden,))
    mlp = disk + "mlp."
    if not config.is_sparse(i) or config.moe is None:
        yield from _mlp(here, mlp, hidden, config.intermediate, bias=config.mlp_bias)
        return
    moe = config.moe
    yield _plain(here + "router", "kept", mlp + "gate.weight", (moe.experts, hidden))
    if moe.correction:
        yield _plain(here + "correction", "kept", mlp + "moe_statics.e_score_correction_bias", (1, moe.experts))
    names = [f"{mlp}experts.{e}." for e in range(moe.experts)]
    yield Weight(
        here + "experts.gate_up",
        "experts",
        (moe.experts, 2 * moe.width, hidden),
        tuple(tuple(Source(f"{n}{p}_proj.weight", (moe.width, hidden)) for p in ("gate", "up")) for n in names),
    )
    yield Weight(
        here + "experts.down",
        "experts",
        (moe.experts, hidden, moe.width),
        tuple((Source(f"{n}down_proj.weight", (hidden, moe.width)),) for n in names),
    )
    if moe.shared_width:
        yield from _mlp(here + "shared.", mlp + "shared_experts.", hidden, moe.shared_width, bias=config.mlp_bias)


def _mlp(here: str, disk: str, hidden: int, width: int, *, bias: bool) -> Iterator[Weight]:
    yield _fused(here + "gate_up", "dense", [Source(f"{disk}{n}_proj.weight", (width, hidden)) for n in ("gate", "up")])
    if bias:
        yield _fused(here + "gate_up.bias", "kept", [Source(f"{disk}{n}_proj.bias", (width,)) for n in ("gate", "up")])
    yield _plain(here + "down", "dense", disk + "down_proj.weight", (hidden, width))
    if bias:
        yield _plain(here + "down.bias", "kept", disk + "down_proj.bias", (hidden,))


def _plain(name: str, role: Role | Literal["kept"], disk: str, shape: tuple[int, ...]) -> Weight:
    return Weight(name, role, shape, ((Source(disk, shape),),))


def _fused(name: str, role: Role | Literal["kept"], sources: list[Source]) -> Weight:
    rows = sum(s.shape[0] for s in sources)
    return Weight(name, role, (rows, *sources[0].shape[1:]), (tuple(sources),))
