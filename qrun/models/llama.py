"""Llama and Mistral: the plain decoder. Facts as in transformers' ``models/llama`` and ``models/mistral``."""

from qrun.models.config import HfConfig, ModelConfig, Reader


def llama(config: HfConfig) -> ModelConfig:
    """``model_type: llama``."""
    read = Reader(config)
    read.must_be("hidden_act", "silu")
    attention = read.flag("attention_bias")
    return ModelConfig(
        **read.shape(),
        rope=read.rope(theta=10_000.0),
        tied=read.tied(),
        qkv_bias=attention,
        o_bias=attention,
        mlp_bias=read.flag("mlp_bias"),
    )


def mistral(config: HfConfig) -> ModelConfig:
    """``model_type: mistral``; the sliding window, 4096 where the config does not name one, holds for every layer."""
    read = Reader(config)
    read.must_be("hidden_act", "silu")
    window = None if config.get("sliding_window", 4096) is None else read.count("sliding_window", 4096)
    return ModelConfig(**read.shape(), rope=read.rope(theta=10_000.0), tied=read.tied(), window=window)
