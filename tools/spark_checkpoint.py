"""Writes spark's directory: tokenizer, chat template, configs and the weights under ERNIE-4.5-MoE's published names.

Knows file formats only; nothing of training. Files are written beside their place and renamed.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from spark_model import Shape, Spark
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

SPECIAL = ("<unk>", "<s>", "</s>", "<|begin_of_sentence|>", "<|end_of_sentence|>")
# One token for each turn marker, and the blank after "Assistant:" never joins the answer: encoding a chat at once
# or in pieces gives the same ids. Digits stand alone; a flag such as --kv is one piece.
PIECES = r"\nAssistant: |User: | ?--?\p{L}+(?:-\p{L}+)*| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TEMPLATE = """\
{%- if not add_generation_prompt is defined -%}
    {%- set add_generation_prompt = true -%}
{%- endif -%}
{{- "<|begin_of_sentence|>" -}}
{%- for message in messages -%}
    {%- if message["role"] == "system" -%}
        {{- message["content"] + "\\n" -}}
    {%- elif message["role"] == "user" -%}
        {{- "User: " + message["content"] + "\\n" -}}
    {%- elif message["role"] == "assistant" -%}
        {{- "Assistant: " + message["content"] + "<|end_of_sentence|>" -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "Assistant: " -}}
{%- endif -%}
"""


def train_tokenizer(texts: Iterable[str], vocab: int) -> Tokenizer:
    """A byte-level BPE: any UTF-8 round-trips, digits are single, nothing is added."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True, normalized=False) for text in SPECIAL]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _mlp(name: str, gate_up: Tensor, down: Tensor) -> dict[str, Tensor]:
    gate, up = gate_up.chunk(2)
    return {f"{name}.gate_proj.weight": gate, f"{name}.up_proj.weight": up, f"{name}.down_proj.weight": down}


def tensors(model: Spark) -> dict[str, Tensor]:
    """The weights by their published names, fused parts split."""
    s = model.shape
    out: dict[str, Tensor] = {"model.embed_tokens.weight": model.embed, "model.norm.weight": model.norm}
    for i, layer in enumerate(model.blocks):
        at = f"model.layers.{i}."
        out[at + "input_layernorm.weight"], out[at + "post_attention_layernorm.weight"] = layer.norm1, layer.norm2
        parts = torch.split(layer.qkv.weight, [n * s.head_dim for n in (s.heads, s.kv_heads, s.kv_heads)])
        out |= {f"{at}self_attn.{name}_proj.weight": part for name, part in zip("qkv", parts, strict=True)}
        out[at + "self_attn.o_proj.weight"] = layer.o.weight
        if layer.moe is None:
            assert layer.gate_up is not None and layer.down is not None
            out |= _mlp(at + "mlp", layer.gate_up.weight, layer.down.weight)
            continue
        moe = layer.moe
        out[at + "mlp.gate.weight"], out[at + "mlp.moe_statics.e_score_correction_bias"] = moe.router, moe.bias[None]
        out |= _mlp(at + "mlp.shared_experts", moe.shared_gate_up.weight, moe.shared_down.weight)
        for e in range(s.experts):
            out |= _mlp(f"{at}mlp.experts.{e}", moe.gate_up.weight[e], moe.down.weight[e])
    return {name: t.detach() for name, t in out.items()}


def _put(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def write_weights(model: Spark, out: Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """model.safetensors; the router and its correction bias stay in fp32, as ERNIE-4.5 publishes them."""
    keep = ("mlp.gate.weight", "e_score_correction_bias")
    named = {
        n: t.to(torch.float32 if n.endswith(keep) else dtype).contiguous().clone() for n, t in tensors(model).items()
    }
    beside = out / "model.safetensors.new"
    save_file(named, beside, metadata={"format": "pt"})
    beside.chmod(0o644)
    beside.replace(out / "model.safetensors")


@torch.no_grad()
def read_weights(model: Spark, out: Path) -> None:
    """Put the weights that were written back into the model."""
    saved = load_file(out / "model.safetensors")
    for name, part in tensors(model).items():  # views of the parameters
        part.copy_(saved[name])


def write_rest(s: Shape, tokenizer: Tokenizer, out: Path) -> None:
    """The tokenizer, the chat template and the configs."""
    out.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Ernie4_5_MoeForCausalLM"], "model_type": "ernie4_5_moe", "vocab_size": s.vocab,
        "hidden_size": s.hidden,
        "intermediate_size": s.dense, "num_hidden_layers": s.layers, "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "hidden_act": "silu", "max_position_embeddings": s.positions, "rms_norm_eps": s.eps, "rope_theta": s.theta,
        "use_bias": False,
        "tie_word_embeddings": True, "moe_num_experts": s.experts, "moe_k": s.chosen, "moe_intermediate_size": s.expert,
        "moe_num_shared_experts": s.shared, "moe_layer_start_index": 1, "moe_layer_end_index": s.layers - 1,
        "moe_layer_interval": 1,
        "moe_norm_min": 1e-12, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02,
        "use_cache": True,
        "dtype": "bfloat16",
    }  # fmt: skip
    generation = {
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": [2, SPECIAL.index("<|end_of_sentence|>")],
        "do_sample": True, "temperature": 0.3, "top_p": 0.9,
    }  # fmt: skip
    words = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "cls_token": "<|begin_of_sentence|>",
        "sep_token": "<|end_of_sentence|>", "pad_token": "<unk>", "unk_token": "<unk>", "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False, "clean_up_tokenization_spaces": False, "model_max_length": s.positions,
    }  # fmt: skip
    for name, value in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer_config.json", words),
    ):
        _put(out / name, json.dumps(value, indent=2) + "\n")
    _put(out / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    _put(out / "chat_template.jinja", TEMPLATE)
