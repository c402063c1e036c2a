"""A plain PyTorch decoder to compare qrun with: static cache, torch.compile, a CUDA graph; BF16, or int4 by tinygemm.

    python benchmarks/peer_decoder.py --shape '{"hidden": 4096, ...}' --weights int4 --depth 1024 --tokens 128

It is what a good programmer gets from PyTorch alone, in the manner of gpt-fast: one layer is compiled (with
max-autotune, all layers share the code) and the whole step is captured. int4 is `aten._weight_int4pack_mm` in groups of
64; experts are gathered by index, in BF16 only. Weights and cache are noise. Prints one line of JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP: Final = 64
aten: Any = torch.ops.aten
plain: Any = torch


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes in elements. ``experts`` 0: every layer is dense; else all but the first ``dense`` ones have experts."""

    hidden: int
    inter: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    experts: int = 0
    top_k: int = 0
    expert_inter: int = 0
    shared_inter: int = 0
    dense: int = 0

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Shape":
        """From a Hugging Face config of the Llama or ERNIE-4.5 family."""
        expert = config.get("moe_intermediate_size", 0)
        return cls(
            hidden=config["hidden_size"],
            inter=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            vocab=config["vocab_size"],
            experts=config.get("moe_num_experts", 0),
            top_k=config.get("moe_k", 0),
            expert_inter=expert,
            shared_inter=expert * config.get("moe_num_shared_experts", 0),
            dense=config.get("moe_layer_start_index", 0),
        )


Weight: TypeAlias = Tensor | tuple[Tensor, Tensor]
"""BF16 [N, K], or int4 codes packed for tinygemm with their scales and zeros [K/64, N, 2]."""


def multiply(x: Tensor, weight: Weight) -> Tensor:
    """x [1, K] -> [1, N]."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight)
    return aten._weight_int4pack_mm(x, weight[0], GROUP, weight[1])


def norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [heads, D], cos and sin [D/2]."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def attend(shape: Shape, x: Tensor, w: dict[str, Any], k: Tensor, v: Tensor, at: Tensor, cos: Tensor, sin: Tensor,
           mask: Tensor) -> Tensor:  # fmt: skip
    """x [1, H] -> x + attention; k and v [kv_heads, L, D] are written at position ``at`` [1]."""
    dim, groups = shape.head_dim, shape.heads // shape.kv_heads
    mixed = multiply(norm(x, w["norm"]), w["qkv"]).view(-1, dim)
    q, new_k, new_v = torch.tensor_split(mixed, (shape.heads, shape.heads + shape.kv_heads))
    k.index_copy_(1, at, rotate(new_k, cos, sin)[:, None])
    v.index_copy_(1, at, new_v[:, None])
    q = rotate(q, cos, sin).view(shape.kv_heads, groups, dim)
    out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask)
    return x + multiply(out.reshape(1, -1), w["o"])


def feed(x: Tensor, w: dict[str, Any]) -> Tensor:
    gate, up = multiply(norm(x, w["ffn_norm"]), w["gate_up"]).chunk(2, -1)
    return x + multiply(F.silu(gate) * up, w["down"])


def feed_experts(shape: Shape, x: Tensor, w: dict[str, Any]) -> Tensor:
    """Softmax over all experts, the best ``top_k`` gathered, their gates normalised; the shared ones added."""
    h = norm(x, w["ffn_norm"])
    gates, chosen = F.linear(h.float(), w["router"]).softmax(-1)[0].topk(shape.top_k)
    gates = (gates / gates.sum()).to(x.dtype)
    gate, up = torch.einsum("k, enk -> en", h[0], w["experts_gate_up"][chosen]).chunk(2, -1)
    routed = torch.einsum("ei, ehi -> eh", F.silu(gate) * up, w["experts_down"][chosen])
    gate, up = multiply(h, w["gate_up"]).chunk(2, -1)
    return x + gates @ routed + multiply(F.silu(gate) * up, w["down"])


def finish(x: Tensor, final: Tensor, head: Weight) -> Tensor:
    """The likeliest token [1]."""
    return multiply(norm(x, final), head).float().argmax(-1)


class Peer:
    """A decoder with random weights and a cache of ``context`` positions of noise."""

    def __init__(self, shape: Shape, *, weights: str, context: int, device: str, compiled: bool) -> None:
        self.shape = shape
        self.device = device
        self.context = context
        self._packed: dict[tuple[int, int], Weight] = {}
        self.bytes_per_token = 0
        make = self._int4 if weights == "int4" else self._noise
        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.layers: list[dict[str, Any]] = []
        for i in range(shape.layers):
            sparse = shape.experts > 0 and i >= shape.dense
            inter = shape.shared_inter if sparse else shape.inter
            one = torch.ones(shape.hidden, dtype=torch.bfloat16, device=device)
            layer: dict[str, Any] = {"norm": one, "ffn_norm": one.clone()}
            layer |= {"qkv": make(q + 2 * kv, shape.hidden), "o": make(shape.hidden, q)}
            layer |= {"gate_up": make(2 * inter, shape.hidden), "down": make(shape.hidden, inter)}
            if sparse:
                layer |= self._experts()
            self.layers.append(layer)
        self.embed = self._noise(shape.vocab, shape.hidden, counted=False)
        self.head = make(shape.vocab, shape.hidden)
        self.final = torch.ones(shape.hidden, dtype=torch.bfloat16, device=device)
        size = (shape.layers, 2, shape.kv_heads, context, shape.head_dim)
        self.cache = torch.empty(size, dtype=torch.bfloat16, device=device).normal_()
        self.inv_freq = 500000.0 ** -(torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim)
        self.token = torch.zeros(1, dtype=torch.int64, device=device)
        self.at = torch.zeros(1, dtype=torch.int64, device=device)
        self._places = torch.arange(context, device=device)
        wrap: Callable[[Any], Any] = _compiled if compiled else lambda function: function
        self._attend, self._feed, self._feed_experts = wrap(attend), wrap(feed), wrap(feed_experts)
        self._finish = wrap(finish)

    def _noise(self, rows: int, columns: int, *, counted: bool = True) -> Tensor:
        made = torch.empty(rows, columns, dtype=torch.bfloat16, device=self.device).normal_()
        self.bytes_per_token += made.nbytes * counted
        return made.mul_(columns**-0.5)

    def _int4(self, rows: int, columns: int) -> Weight:
        """Codes of noise: speed does not depend on them. Rows are padded as tinygemm wants them."""
        rows += -rows % 8
        codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=self.device)
        packed = aten._convert_weight_to_int4pack(codes, 8 if columns % 128 == 0 else 4)
        scales = torch.full((columns // GROUP, rows, 2), 0.01, dtype=torch.bfloat16, device=self.device)
        self.bytes_per_token += packed.nbytes + scales.nbytes
        return packed, scales

    def _experts(self) -> dict[str, Tensor]:
        s = self.shape
        made = {
            "experts_gate_up": torch.empty(
                s.experts, 2 * s.expert_inter, s.hidden, dtype=torch.bfloat16, device=self.device
            ).normal_(0, s.hidden**-0.5),
            "experts_down": torch.empty(
                s.experts, s.hidden, s.expert_inter, dtype=torch.bfloat16, device=self.device
            ).normal_(0, s.expert_inter**-0.5),
        }
        self.bytes_per_token += sum(tensor.nbytes for tensor in made.values()) * s.top_k // s.experts
        return {**made, "router": torch.randn(s.experts, s.hidden, device=self.device)}

    def step(self) -> None:
        """One token through the model: ``token`` and ``at`` are replaced by the next."""
        angles = self.at.float() * self.inv_freq
        cos, sin = angles.cos(), angles.sin()
        mask = (self._places <= self.at)[None, None, None]
        x = self.embed[self.token]
        for layer, cache in zip(self.layers, self.cache, strict=True):
            x = self._attend(self.shape, x, layer, cache[0], cache[1], self.at, cos, sin, mask)
            if "router" in layer:
                x = self._feed_experts(self.shape, x, layer)
            else:
                x = self._feed(x, layer)
        self.token.copy_(self._finish(x, self.final, self.head))
        self.at += 1


def _compiled(function: Any) -> Any:
    return plain.compile(function, mode="max-autotune-no-cudagraphs", fullgraph=True, dynamic=False)


@torch.inference_mode()
def run(peer: Peer, *, depth: int, tokens: int, repeats: int = 3) -> list[float]:
    """Tokens a second behind ``depth`` positions, of each of some runs."""
    on_gpu = peer.device != "cpu"
    step = peer.step
    for _ in range(2):
        peer.at.fill_(depth)
        step()
    if on_gpu:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            peer.step()
        step = graph.replay
    speeds: list[float] = []
    for _ in range(repeats + 1):
        peer.at.fill_(depth)
        if on_gpu:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(tokens):
            step()
            peer.token.item()  # whoever shows the text needs it
        speeds.append(tokens / (time.perf_counter() - begun))
    return speeds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=json.loads, required=True, help="a Hugging Face config, in JSON")
    parser.add_argument("--weights", choices=("bf16", "int4"), default="bf16")
    parser.add_argument("--depth", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    begun = time.perf_counter()
    with torch.inference_mode():
        peer = Peer(
            Shape.of(options.shape),
            weights=options.weights,
            context=-(-(options.depth + options.tokens + 1) // 64) * 64,
            device=options.device,
            compiled=not options.no_compile,
        )
    speeds = run(peer, depth=options.depth, tokens=options.tokens)
    cache = 2 * peer.cache[0, 0, :, : options.depth + options.tokens // 2].nbytes * peer.shape.layers
    print(
        json.dumps(
            {
                "tokens_per_second": statistics.median(speeds),
                "samples": speeds,
                "bytes_per_token": peer.bytes_per_token + cache,
                "seconds": time.perf_counter() - begun,
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
