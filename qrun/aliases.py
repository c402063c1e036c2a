"""Short names for models on the hub, with as much of each config as a memory forecast needs. Pure data, no network.

The shapes only decide which model a bare family name picks; before a download the repository's own config is read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True)
class Alias:
    """``name`` as typed, the repository it stands for, and its Hugging Face config in short.

    ``families`` are the bare names that may pick it; empty for a model that is only meant when asked for by name.
    """

    name: str
    repo: str
    config: Mapping[str, Any]
    families: Sequence[str]


def _config(kind: str, sizes: Sequence[int], *, tied: bool, head_dim: int | None = None, **more: Any) -> dict[str, Any]:
    """``sizes``: hidden, intermediate, layers, heads, kv heads, vocabulary, positions."""
    hidden, intermediate, layers, heads, kv_heads, vocab, positions = sizes
    return {
        "model_type": kind,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim or hidden // heads,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
        **more,
    }


def _ernie(tag: str, repo: str, config: Mapping[str, Any], *, bare: bool = True) -> Alias:
    return Alias(f"ernie:{tag}", f"baidu/ERNIE-4.5-{repo}", config, ("ernie",) if bare else ())


def _llama(version: str, tag: str, sizes: Sequence[int], *, tied: bool = False) -> Alias:
    repo = f"meta-llama/Llama-{version}-{tag.upper()}-Instruct"
    return Alias(f"llama{version}:{tag}", repo, _config("llama", sizes, tied=tied), ("llama", f"llama{version}"))


def _qwen2(tag: str, sizes: Sequence[int], *, tied: bool = False) -> Alias:
    repo = f"Qwen/Qwen2.5-{tag.upper()}-Instruct"
    return Alias(f"qwen2.5:{tag}", repo, _config("qwen2", sizes, tied=tied), ("qwen2.5",))


def _qwen3(tag: str, sizes: Sequence[int], *, tied: bool = False, expert_width: int = 0) -> Alias:
    moe = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": expert_width} if expert_width else {}
    config = _config("qwen3_moe" if moe else "qwen3", sizes, tied=tied, head_dim=128, **moe)
    return Alias(f"qwen3:{tag}", f"Qwen/Qwen3-{tag.upper()}", config, ("qwen3", "qwen"))


_ERNIE_21B: Final = _config(
    "ernie4_5_moe", (2560, 12288, 28, 20, 4, 103424, 131072), tied=True,
    moe_num_experts=64, moe_k=6, moe_num_shared_experts=2, moe_intermediate_size=1536, moe_layer_start_index=1,
)  # fmt: skip
_ERNIE_300B: Final = _config(
    "ernie4_5_moe", (8192, 28672, 54, 64, 8, 103424, 131072), tied=False,
    moe_num_experts=64, moe_k=8, moe_num_shared_experts=0, moe_intermediate_size=3584, moe_layer_start_index=3,
)  # fmt: skip
_ERNIE_0_3B: Final = _config("ernie4_5", (1024, 3072, 18, 16, 2, 103424, 131072), tied=True, head_dim=128)

ALIASES: Final[Mapping[str, Alias]] = {
    alias.name: alias
    for alias in (
        _ernie("0.3b", "0.3B-PT", _ERNIE_0_3B),
        _ernie("21b", "21B-A3B-PT", _ERNIE_21B),
        _ernie("21b-thinking", "21B-A3B-Thinking", _ERNIE_21B, bare=False),
        _ernie("300b", "300B-A47B-PT", _ERNIE_300B),
        _llama("3.2", "1b", (2048, 8192, 16, 32, 8, 128256, 131072), tied=True),
        _llama("3.2", "3b", (3072, 8192, 28, 24, 8, 128256, 131072), tied=True),
        _llama("3.1", "8b", (4096, 14336, 32, 32, 8, 128256, 131072)),
        _llama("3.3", "70b", (8192, 28672, 80, 64, 8, 128256, 131072)),
        Alias(
            "mistral:7b",
            "mistralai/Mistral-7B-Instruct-v0.3",
            _config("mistral", (4096, 14336, 32, 32, 8, 32768, 32768), tied=False),
            ("mistral",),
        ),
        _qwen2("0.5b", (896, 4864, 24, 14, 2, 151936, 32768), tied=True),
        _qwen2("1.5b", (1536, 8960, 28, 12, 2, 151936, 32768), tied=True),
        _qwen2("3b", (2048, 11008, 36, 16, 2, 151936, 32768), tied=True),
        _qwen2("7b", (3584, 18944, 28, 28, 4, 152064, 32768)),
        _qwen2("14b", (5120, 13824, 48, 40, 8, 152064, 32768)),
        _qwen2("32b", (5120, 27648, 64, 40, 8, 152064, 32768)),
        _qwen2("72b", (8192, 29568, 80, 64, 8, 152064, 32768)),
        _qwen3("0.6b", (1024, 3072, 28, 16, 8, 151936, 40960), tied=True),
        _qwen3("1.7b", (2048, 6144, 28, 16, 8, 151936, 40960), tied=True),
        _qwen3("4b", (2560, 9728, 36, 32, 8, 151936, 40960), tied=True),
        _qwen3("8b", (4096, 12288, 36, 32, 8, 151936, 40960)),
        _qwen3("14b", (5120, 17408, 40, 40, 8, 151936, 40960)),
        _qwen3("32b", (5120, 25600, 64, 64, 8, 151936, 40960)),
        _qwen3("30b-a3b", (2048, 6144, 48, 32, 4, 151936, 40960), expert_width=768),
        _qwen3("235b-a22b", (4096, 12288, 94, 64, 4, 151936, 40960), expert_width=1536),
    )
}


def family(name: str) -> list[Alias]:
    """The aliases that a bare family name may pick, in the order of the table; empty if it is no family."""
    return [alias for alias in ALIASES.values() if name in alias.families]


def known_names() -> list[str]:
    """Every short name, families first."""
    families = dict.fromkeys(name for alias in ALIASES.values() for name in alias.families)
    return [*families, *ALIASES]
