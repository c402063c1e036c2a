"""ERNIE-4.5, dense and mixture of experts: a Llama whose rotary pairs are interleaved and whose router has a bias.

Facts as in transformers' ``models/ernie4_5`` and ``models/ernie4_5_moe``.
"""

from qrun.models.config import HfConfig, ModelConfig, MoE, Reader


def dense(config: HfConfig) -> ModelConfig:
    """``model_type: ernie4_5``."""
    read = Reader(config)
    read.must_be("hidden_act", "silu")
    bias = read.flag("use_bias")
    return ModelConfig(
        **read.shape(head_dim=128, eps=1e-5),
        rope=read.rope(theta=500_000.0, interleaved=True),
        tied=read.tied(),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
    )


def moe(config: HfConfig) -> ModelConfig:
    """``model_type: ernie4_5_moe``. There is no head_dim key: it is hidden/heads."""
    read = Reader(config)
    read.must_be("hidden_act", "silu")
    bias = read.flag("use_bias")
    shape = read.shape(eps=1e-5)
    layers = shape["layers"]
    experts = read.count("moe_num_experts", 64, most=4096)
    first = read.count("moe_layer_start_index", 1, least=0)
    last = read.count("moe_layer_end_index", -1, least=-1)
    last = layers - 1 if last == -1 else last
    interval = read.count("moe_layer_interval", 1)
    width = read.count("moe_intermediate_size", 1536)
    return ModelConfig(
        **shape,
        rope=read.rope(theta=500_000.0, interleaved=True),
        tied=read.tied(),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        head_bias=bias,
        moe=MoE(
            experts=experts,
            top_k=read.count("moe_k", 6, most=experts),
            width=width,
            shared_width=width * read.count("moe_num_shared_experts", 2, least=0),
            normalise=True,
            norm_min=read.number("moe_norm_min", 1e-12),
            correction=True,
            sparse=tuple((i + 1) % interval == 0 and first <= i <= last for i in range(layers)),
        ),
    )
