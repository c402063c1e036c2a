"""Random-weight checkpoints of published shapes, to measure speed with: a Hugging Face directory and a GGUF file in it.

The weights are noise of the usual size, so no text that comes out means anything; only time and memory do. Written one
tensor at a time, and kept: a second call finds the files and returns at once.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qrun.tensorfile import TensorFile, TensorWriter


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A dense decoder with tied embeddings; sizes in elements."""

    name: str
    family: str
    hidden: int
    inter: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    rope: dict[str, Any]

    @property
    def parameters(self) -> int:
        return sum(_product(shape) for _, shape in self.tensors())

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Hugging Face names and shapes, in file order."""
        h, q, kv = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocab, h)
        for layer in range(self.layers):
            at = f"model.layers.{layer}."
            yield at + "input_layernorm.weight", (h,)
            yield at + "self_attn.q_proj.weight", (q, h)
            yield at + "self_attn.k_proj.weight", (kv, h)
            yield at + "self_attn.v_proj.weight", (kv, h)
            yield at + "self_attn.o_proj.weight", (h, q)
            yield at + "post_attention_layernorm.weight", (h,)
            yield at + "mlp.gate_proj.weight", (self.inter, h)
            yield at + "mlp.up_proj.weight", (self.inter, h)
            yield at + "mlp.down_proj.weight", (h, self.inter)
        yield "model.norm.weight", (h,)

    def config(self) -> dict[str, Any]:
        """config.json as transformers reads it."""
        classes = {"ernie4_5": "Ernie4_5ForCausalLM", "llama": "LlamaForCausalLM"}
        return {
            "architectures": [classes[self.family]],
            "model_type": self.family,
            "hidden_size": self.hidden,
            "intermediate_size": self.inter,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "bos_token_id": 1,
            "eos_token_id": 2,
            **self.rope,
        }


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES = (
    Shape(
        name="ernie-4.5-0.3b", family="ernie4_5", hidden=1024, inter=3072, layers=18, heads=16, kv_heads=2,
        head_dim=128, vocab=103424, rope={"rope_theta": 500000.0, "use_bias": False},
    ),
    Shape(
        name="llama-3.2-1b", family="llama", hidden=2048, inter=8192, layers=16, heads=32, kv_heads=8,
        head_dim=64, vocab=128256, rope={"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE},
    ),
)  # fmt: skip


def write_checkpoint(shape: Shape, root: Path) -> Path:
    """The BF16 safetensors directory of a shape under root."""
    folder = root / shape.name
    weights = folder / "model.safetensors"
    if not weights.exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(shape.config(), indent=2), encoding="utf-8")
        generator = torch.Generator().manual_seed(0)
        unfinished = folder / f"unfinished.{os.getpid()}"
        with TensorWriter(unfinished) as writer:
            for name, size in shape.tensors():
                writer.add(name, _noise(size, generator))
        unfinished.rename(weights)
    return folder


def write_gguf(shape: Shape, folder: Path) -> Path:
    """The same weights as an F16 GGUF file without a vocabulary, in llama.cpp's `llama` architecture."""
    import gguf

    path = folder / f"{shape.name}-f16.gguf"
    if path.exists():
        return path
    unfinished = folder / f"unfinished-{os.getpid()}.gguf"
    writer = gguf.GGUFWriter(unfinished, "llama")
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(shape.vocab)
    writer.add_context_length(131072)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.inter)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    source = TensorFile(folder / "model.safetensors")
    for name, size in shape.tensors():
        dtype = torch.empty(0, dtype=_gguf_dtype(size)).numpy().dtype
        writer.add_tensor_info(_gguf_name(name), size, dtype, _product(size) * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, size in shape.tensors():
        writer.write_tensor_data(source.read(name).to(_gguf_dtype(size)).numpy())
    writer.close()
    unfinished.rename(path)
    return path


def _product(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) == 1 else shape[0] * shape[1]


def _noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A norm of ones, or a matrix whose outputs are about as large as its inputs."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    noise = torch.empty(shape, dtype=torch.bfloat16)
    for start in range(0, shape[0], 8192):
        rows = noise[start : start + 8192]
        rows.copy_(torch.randn(rows.shape, generator=generator) / shape[1] ** 0.5)
    return noise


def _gguf_dtype(shape: tuple[int, ...]) -> torch.dtype:
    return torch.float32 if len(shape) == 1 else torch.float16


def _gguf_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`."""
    fixed = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in fixed:
        return fixed[name]
    _, _, layer, rest = name.split(".", 3)
    short = {
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    return f"blk.{layer}.{short[rest.removesuffix('.weight')]}.weight"
