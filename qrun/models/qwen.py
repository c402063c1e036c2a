"""Qwen2, Qwen3 and Qwen3-MoE. Facts as in transformers' ``models/qwen2``, ``qwen3`` and ``qwen3_moe``."""

from dataclasses import replace
from typing import cast

from qrun.models.config import HfConfig, ModelConfig, MoE, Reader


def qwen2(config: HfConfig) -> ModelConfig:
    """``model_type: qwen2``: biases on q, k and v."""
    read = _reader(config)
    return ModelConfig(**read.shape(), rope=read.rope(theta=10_000.0), tied=read.tied(), qkv_bias=True)


def qwen3(config: HfConfig) -> ModelConfig:
    """``model_type: qwen3``: q and k normalised per head; heads 128 wide unless the config says otherwise."""
    return _qwen3(_reader(config), head_dim=128)


def qwen3_moe(config: HfConfig) -> ModelConfig:
    """``model_type: qwen3_moe``: qwen3 with routed experts, no shared ones and no correction bias."""
    read = _reader(config)
    model = _qwen3(read, head_dim=None)
    key = "num_local_experts" if "num_local_experts" in config else "num_experts"  # transformers 5 renamed it
    experts = read.count(key, 128, most=4096)
    step = read.count("decoder_sparse_step", 1)
    dense = cast(list[object], config.get("mlp_only_layers") or [])
    if not all(isinstance(i, int) for i in dense):
        raise read.fail("mlp_only_layers", dense, "a list of layer numbers")
    return replace(
        model,
        moe=MoE(
            experts=experts,
            top_k=read.count("num_experts_per_tok", 8, most=experts),
            width=read.count("moe_intermediate_size", 768),
            shared_width=0,
            normalise=read.flag("norm_topk_prob"),
            norm_min=1e-20,
            correction=False,
            sparse=tuple(i not in dense and (i + 1) % step == 0 for i in range(model.layers)),
        ),
    )


def _qwen3(read: Reader, head_dim: int | None) -> ModelConfig:
    bias = read.flag("attention_bias")
    return ModelConfig(
        **read.shape(head_dim=head_dim),
        rope=read.rope(theta=10_000.0),
        tied=read.tied(),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
    )


def _reader(config: HfConfig) -> Reader:
    read = Reader(config)
    read.must_be("hidden_act", "silu")
    read.must_be("use_sliding_window", False, None)
    kinds = config.get("layer_types")
    if kinds is not None and set(cast(list[str], kinds)) != {"full_attention"}:
        raise read.fail("layer_types", kinds, "full_attention in every layer")
    return read
