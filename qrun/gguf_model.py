"""A GGUF file's metadata as the config that a Hugging Face checkpoint of the same model has.

Facts as in llama.cpp's converter and in its graphs of these architectures; whatever would change the mathematics is
refused by key and value. The factors of ``rope_freqs`` become the llama3 parameters that make them.
"""

from collections.abc import Mapping
from typing import Any, Final

import torch

from qrun.errors import CheckpointError, UnsupportedModelError
from qrun.gguf_file import GgufFile, Value
from qrun.gguf_names import ROPE_FACTORS

FAMILIES: Final = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "ernie4_5": "ernie4_5",
    "ernie4_5-moe": "ernie4_5_moe",
}
"""general.architecture -> model_type."""
_MOST_EXPERTS: Final = 4096


def config_of(first: GgufFile, files: Mapping[str, GgufFile]) -> dict[str, Any]:
    """A config that `qrun.models.describe` takes; ``first`` holds the metadata, ``files`` tell who holds each tensor.

    Raises `UnsupportedModelError` for another architecture, or a value that would change the mathematics.
    """
    keys = _Keys(first)
    architecture = keys.architecture
    if architecture not in FAMILIES:
        raise UnsupportedModelError(
            f"{first.path}: general.architecture {architecture!r} is not supported; qrun runs {', '.join(FAMILIES)}"
        )
    keys.must_be("attention.causal", True)
    keys.must_be("attention.scale", 0.0)
    for tensor in ("token_embd.weight", "output_norm.weight"):
        if tensor not in files:
            raise CheckpointError(
                f"{first.path} has no {tensor}: it is no language model, or part of one; fetch it again"
            )
    hidden, heads = keys.whole("embedding_length"), keys.whole("attention.head_count")
    head_dim = keys.whole("attention.key_length", max(hidden // heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        keys.must_be(key, head_dim)
    width = keys.whole("feed_forward_length", 0)
    bias = "blk.0.attn_q.bias" in files
    window = keys.whole("attention.sliding_window", 0)
    config: dict[str, Any] = {
        "model_type": FAMILIES[architecture],
        "hidden_size": hidden,
        "num_hidden_layers": keys.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": width,
        "vocab_size": files["token_embd.weight"].entries["token_embd.weight"].shape[0],
        "max_position_embeddings": keys.whole("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(keys, files, head_dim),
        "tie_word_embeddings": "output.weight" not in files,
        "quantization_config": {"quant_method": "gguf"},
    }
    if architecture.startswith("ernie"):
        config["use_bias"] = bias
    elif architecture != "qwen2":
        config["attention_bias"] = bias
    if window and architecture != "llama":
        raise keys.fail("attention.sliding_window", window, "0")
    if window:
        config |= {"model_type": "mistral", "sliding_window": window}
    if architecture in ("qwen3moe", "ernie4_5-moe"):
        config |= _experts(keys, files, width)
    else:
        keys.must_be("expert_count", 0)
    return config


def generation_of(metadata: Mapping[str, Value]) -> dict[str, Any]:
    """What generation_config.json would say: the ids that end a reply, and sampling defaults if there are any."""
    names = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
    names["penalty_repeat"] = "repetition_penalty"
    found: dict[str, Any] = {}
    for key, name in names.items():
        value = metadata.get(f"general.sampling.{key}")
        if isinstance(value, int | float):
            found[name] = value
    ends = [metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot", "eom")]
    return {**found, "eos_token_id": [end for end in ends if type(end) is int]}


def _experts(keys: "_Keys", files: Mapping[str, GgufFile], width: int) -> dict[str, Any]:
    experts = keys.whole("expert_count", most=_MOST_EXPERTS)
    used = keys.whole("expert_used_count", most=experts)
    keys.must_be("expert_weights_scale", 0.0, 1.0)
    keys.must_be("expert_gating_func", 1)
    each = keys.whole("expert_feed_forward_length", max(width // used, 1))
    if keys.architecture == "qwen3moe":
        keys.must_be("expert_weights_norm", True)
        return {
            "num_experts": experts,
            "num_experts_per_tok": used,
            "moe_intermediate_size": each,
            "norm_topk_prob": True,  # llama.cpp knows no other
        }
    shared = [name for name in files if name.endswith(".ffn_gate_shexp.weight")]
    together = files[shared[0]].entries[shared[0]].shape[0] if shared else 0  # the key for it is wrong in some files
    if together % each:
        raise CheckpointError(f"{shared[0]} in {keys.path} has {together} rows, no multiple of {each}: fetch it again")
    return {
        "moe_num_experts": experts,
        "moe_k": used,
        "moe_intermediate_size": each,
        "moe_num_shared_experts": together // each,
        "moe_layer_start_index": keys.whole("leading_dense_block_count", 0),
        "moe_layer_interval": keys.whole("interleave_moe_layer_step", 1),
    }


def _rope(keys: "_Keys", files: Mapping[str, GgufFile], head_dim: int) -> dict[str, Any]:
    base = keys.number("rope.freq_base", 10_000.0)
    kind = keys.metadata.get(f"{keys.architecture}.rope.scaling.type", "none")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    if kind not in ("none", "linear"):
        raise keys.fail("rope.scaling.type", kind, "'none' or 'linear'")
    if ROPE_FACTORS in files:
        if factor != 1.0:
            raise keys.fail("rope.scaling.factor", factor, f"1 beside {ROPE_FACTORS}")
        return {"rope_theta": base, **_llama3(files[ROPE_FACTORS], base, head_dim)}
    if factor != 1.0:
        return {"rope_theta": base, "rope_type": "linear", "factor": factor}
    return {"rope_theta": base, "rope_type": "default"}


def _llama3(file: GgufFile, base: float, head_dim: int) -> dict[str, Any]:
    """The llama3 parameters that make the factors of a file: the largest is that of the slow pairs; between slow and
    fast ones 1/factor grows linearly with 1/wavelength, from which the two limits follow.

    Raises `UnsupportedModelError` where no parameters make them.
    """
    entry = file.entries[ROPE_FACTORS]
    if entry.kind != "F32" or entry.shape != (head_dim // 2,):
        raise UnsupportedModelError(
            f"{file.path}: {ROPE_FACTORS} is {entry.kind} {list(entry.shape)}, not F32 [{head_dim // 2}]"
        )
    stored = file.read(ROPE_FACTORS).view(torch.float32)[0].double()
    turns = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim) / (2 * torch.pi)  # 1/wavelength
    factor = float(stored.max())
    if bool(torch.isfinite(stored).all()) and float(stored.min()) >= 1.0:
        blend = (1 / stored - 1 / factor) / (1 - 1 / factor) if factor > 1 else torch.ones_like(stored)
        between = ((blend > 1e-4) & (blend < 1 - 1e-4)).nonzero().flatten()
        limits = [(1.0, 4.0, 8192)]  # as published
        if len(between) > 1:
            first, last = int(between[0]), int(between[-1])
            slope = float((blend[first] - blend[last]) / (turns[first] - turns[last]))
            offset = slope * float(turns[first]) - float(blend[first])
            if slope > 0 and offset > 0:
                limits.append((1.0, 1 + 1 / offset, max(round(slope / offset), 1)))
        for low, high, original in limits:
            made = 1 / (1 / factor + (1 - 1 / factor) * ((original * turns - low) / (high - low)).clamp(0, 1))
            if torch.allclose(made, stored, rtol=1e-4, atol=0):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": low,
                    "high_freq_factor": high,
                    "original_max_position_embeddings": original,
                }
    raise UnsupportedModelError(
        f"{file.path}: {ROPE_FACTORS} holds factors that no llama3 rope has; qrun knows no others"
    )


class _Keys:
    """The metadata of a file's architecture, each value checked as it is read."""

    def __init__(self, file: GgufFile) -> None:
        self.path = file.path
        self.metadata = file.metadata
        self.architecture = str(file.metadata.get("general.architecture"))

    def fail(self, key: str, value: object, want: str) -> UnsupportedModelError:
        shown = value if value is None or isinstance(value, str | int | float) else "a list"
        return UnsupportedModelError(f"{self.path}: {self.architecture}.{key} is {shown!r}; qrun supports {want}")

    def _get(self, key: str, default: object) -> object:
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def whole(self, key: str, default: int | None = None, most: int = 1 << 24) -> int:
        """A whole number up to ``most``: from 1, or 0 where that is the default. Without a default it must be there."""
        value = self._get(key, default)
        least = 0 if default == 0 else 1
        if type(value) is not int or not least <= value <= most:
            raise self.fail(key, value, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if type(value) not in (int, float) or not 0 < float(str(value)) < 1e30:
            raise self.fail(key, value, "a positive number")
        return float(str(value))

    def must_be(self, key: str, *allowed: object) -> None:
        """Refuse any value but these; a missing key is fine."""
        value = self._get(key, allowed[0])
        if value not in allowed:
            raise self.fail(key, value, " or ".join(map(repr, allowed)))
