"""Tiny random checkpoints made by transformers, and that library's own logits for them."""

from pathlib import Path
from typing import Any

import torch
import transformers

COMMON: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 131, "max_position_embeddings": 512, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MOE: dict[str, Any] = {"moe_num_experts": 5, "moe_k": 2, "moe_intermediate_size": 24, "moe_num_shared_experts": 2}
QWEN_MOE: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "head_dim": 32}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ernie": ("Ernie4_5", {"head_dim": 32}),
    "ernie-untied-bias": ("Ernie4_5", {"head_dim": 16, "use_bias": True, "tie_word_embeddings": False}),
    "ernie-one-kv-head": ("Ernie4_5", {"head_dim": 40, "num_key_value_heads": 1, "num_hidden_layers": 1}),
    "ernie-odd": ("Ernie4_5", {"head_dim": 24, "hidden_size": 100, "intermediate_size": 52, "vocab_size": 97}),
    "ernie-moe": ("Ernie4_5_Moe", MOE),
    "ernie-moe-untied-bias": ("Ernie4_5_Moe", MOE | {"use_bias": True, "tie_word_embeddings": False}),
    "ernie-moe-interval": ("Ernie4_5_Moe", MOE | {"num_hidden_layers": 4, "moe_layer_interval": 2}),
    "ernie-moe-range": (
        "Ernie4_5_Moe",
        MOE | {"num_hidden_layers": 4, "moe_layer_start_index": 1, "moe_layer_end_index": 2},
    ),
    "ernie-moe-no-shared": ("Ernie4_5_Moe", MOE | {"moe_num_shared_experts": 0, "moe_layer_start_index": 0}),
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama-tied-bias": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-rope3": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear": (
        "Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}, "head_dim": 18},
    ),
    "mistral-window": ("Mistral", {"sliding_window": 7}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 24}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3-bias": ("Qwen3", {"head_dim": 20, "attention_bias": True, "num_key_value_heads": 4}),
    "qwen3-moe": ("Qwen3Moe", QWEN_MOE | {"norm_topk_prob": True, "mlp_only_layers": [0]}),
    "qwen3-moe-plain": ("Qwen3Moe", QWEN_MOE | {"norm_topk_prob": False, "decoder_sparse_step": 2}),
}  # fmt: skip


def make(case: str, path: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Save the case's model under path, its weights rounded to dtype; returns that model, in float32."""
    name, settings = CASES[case]
    config = getattr(transformers, f"{name}Config")(**(COMMON | settings | changes))
    torch.manual_seed(sum(map(ord, case)))
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for label, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if label.endswith("inv_freq"):
                continue
            noise = torch.randn_like(tensor)
            tensor.copy_(1 + 0.2 * noise if "norm" in label else 0.15 * noise)
    if not config.tie_word_embeddings:
        assert model.lm_head.weight is not model.model.embed_tokens.weight
    model.to(dtype).save_pretrained(path)
    return type(model).from_pretrained(path, dtype=torch.float32).eval()


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    """transformers' own next-token logits [S, V] in float32."""
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].float()
