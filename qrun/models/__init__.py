"""Model families by the ``model_type`` of their config; every other type is refused by name."""

from collections.abc import Callable

from qrun.errors import UnsupportedModelError
from qrun.models import ernie, llama, qwen
from qrun.models.config import HfConfig, ModelConfig

FAMILIES: dict[str, Callable[[HfConfig], ModelConfig]] = {
    "ernie4_5": ernie.dense,
    "ernie4_5_moe": ernie.moe,
    "llama": llama.llama,
    "mistral": llama.mistral,
    "qwen2": qwen.qwen2,
    "qwen3": qwen.qwen3,
    "qwen3_moe": qwen.qwen3_moe,
}


def describe(config: HfConfig) -> ModelConfig:
    """The ModelConfig of a Hugging Face config. Raises UnsupportedModelError, naming the key and the value."""
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        hint = " (vision-language models are out of scope)" if "vl" in str(family).lower() else ""
        raise UnsupportedModelError(
            f"config.json: model_type {family!r} is not supported{hint}; qrun runs {', '.join(FAMILIES)}"
        )
    return FAMILIES[family](config)
