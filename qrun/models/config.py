"""What a decoder must know of a model, the same for every family, and how to read it from a config safely.

It knows no tensor names and no files. Reading refuses, by key and value, whatever would change the mathematics.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from qrun.errors import UnsupportedModelError

HfConfig = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions. ``kind`` is default, linear or llama3; ``interleaved``: how the checkpoint pairs the rows."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 0
    interleaved: bool = False


@dataclass(frozen=True, kw_only=True)
class MoE:
    """Experts per sparse layer, how many a token uses, their width, and the shared ones' width together (or 0)."""

    experts: int
    top_k: int
    width: int
    shared_width: int
    normalise: bool
    norm_min: float
    correction: bool
    sparse: tuple[bool, ...]  # per layer


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    positions: int
    eps: float
    rope: Rope
    tied: bool | None  # none: the config does not say, so the checkpoint's tensors decide
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    moe: MoE | None = None

    def is_sparse(self, layer: int) -> bool:
        return self.moe is not None and self.moe.sparse[layer]


class Reader:
    """A config's values, each checked as it is read; every complaint names the key and the value."""

    def __init__(self, config: HfConfig) -> None:
        self.config = config
        self.family = str(config.get("model_type"))

    def fail(self, key: str, value: object, want: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"config.json: {key} is {value!r} in this {self.family} model; qrun supports {want}"
        )

    def count(self, key: str, default: int | None = None, *, least: int = 1, most: int = 1 << 24) -> int:
        """A whole number in least … most; a missing key takes the default, and is an error without one."""
        value = self.config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.fail(key, value, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: float | None = None, *, within: HfConfig | None = None) -> float:
        """A positive finite number."""
        value = (self.config if within is None else within).get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise self.fail(key, value, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.config.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.fail(key, value, "true or false")
        return value

    def must_be(self, key: str, *allowed: object) -> None:
        """Refuse any value but these; a missing key is fine."""
        if key in self.config and self.config[key] not in allowed:
            raise self.fail(key, self.config[key], " or ".join(repr(a) for a in allowed))

    def tied(self, default: bool | None = None) -> bool | None:
        value = self.config.get("tie_word_embeddings", default)
        return self.flag("tie_word_embeddings") if value is not None else None

    def rope(self, *, theta: float, interleaved: bool = False) -> Rope:
        """From transformers 5's ``rope_parameters`` or the older flat ``rope_theta`` + ``rope_scaling``."""
        scaling: Any = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        if not isinstance(scaling, Mapping):
            raise self.fail("rope_parameters", scaling, "a mapping")
        values = cast(HfConfig, scaling)
        self.must_be("partial_rotary_factor", None, 1, 1.0)
        if values.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise self.fail("partial_rotary_factor", values["partial_rotary_factor"], "1.0")
        kind = values.get("rope_type", values.get("type", "default")) or "default"
        if kind not in ("default", "linear", "llama3"):
            raise self.fail("rope_type", kind, "'default', 'linear' or 'llama3'")
        base = self.number("rope_theta", theta, within=values if "rope_theta" in values else None)
        if kind == "default":
            return Rope(theta=base, interleaved=interleaved)
        if kind == "linear":
            return Rope(theta=base, kind=kind, factor=self.number("factor", within=values), interleaved=interleaved)
        low, high = self.number("low_freq_factor", within=values), self.number("high_freq_factor", within=values)
        if high <= low:
            raise self.fail("high_freq_factor", high, f"more than low_freq_factor ({low})")
        original = values.get("original_max_position_embeddings")
        if isinstance(original, bool) or not isinstance(original, int) or original < 1:
            raise self.fail("original_max_position_embeddings", original, "a positive whole number")
        return Rope(
            theta=base,
            kind=kind,
            factor=self.number("factor", within=values),
            low_freq_factor=low,
            high_freq_factor=high,
            original_positions=original,
            interleaved=interleaved,
        )

    def shape(self, *, head_dim: int | None = None, eps: float = 1e-6) -> dict[str, Any]:
        """The sizes every family has. ``head_dim``: what is meant where the key is missing; none means hidden/heads."""
        hidden, heads = self.count("hidden_size"), self.count("num_attention_heads", most=4096)
        kv_heads = self.count("num_key_value_heads", heads, most=4096)
        if heads % kv_heads:
            raise self.fail("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads ({heads})")
        if self.config.get("head_dim") is None and head_dim is None and hidden % heads:
            raise self.fail("hidden_size", hidden, f"a multiple of num_attention_heads ({heads})")
        dim = self.count("head_dim", head_dim or hidden // heads, least=2, most=1024)
        if dim % 2:
            raise self.fail("head_dim", dim, "an even number")
        return {
            "family": self.family,
            "hidden": hidden,
            "layers": self.count("num_hidden_layers", most=1000),
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": dim,
            "intermediate": self.count("intermediate_size"),
            "vocab": self.count("vocab_size"),
            "positions": self.count("max_position_embeddings", most=1 << 30),
            "eps": self.number("rms_norm_eps", eps),
        }
