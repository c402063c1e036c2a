"""A GGUF file's tensors under the names that a safetensors file has, and where in the file each of them lies.

Facts as in llama.cpp's converter: matrices of all experts are stacked; files of the architecture ``llama`` have the
rows of q and k in interleaved rotary pairs, which are put back into halves; ERNIE's rows are as published. Knows no
number formats.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import torch
from torch import Tensor

from qrun.errors import CheckpointError
from qrun.gguf_file import GgufFile

ROPE_FACTORS: Final = "rope_freqs.weight"
_OUTSIDE: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "output.bias": "lm_head.bias",
}
_IN_LAYER: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
_STACKED: Final = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
_NAME: Final = re.compile(r"blk\.(\d{1,4})\.(\w+)\.(weight|bias)")


@dataclass(frozen=True)
class Piece:
    """Some rows of one tensor in a file, which are a whole tensor of the model.

    ``first``: the first row. ``shape``: the model's. ``pairs`` > 0: the rows are heads of that width whose rotary pairs
    are interleaved in the file and not in the model.
    """

    file: GgufFile
    tensor: str
    first: int
    shape: tuple[int, ...]
    pairs: int = 0

    @property
    def kind(self) -> str:
        return self.file.entries[self.tensor].kind

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        return self.rows * self.file.entries[self.tensor].row_bytes

    def require(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise `CheckpointError` unless the tensor has the shape that the metadata promise."""
        if self.shape != tuple(shape):
            raise CheckpointError(
                f"{self.tensor} in {self.file.path} is {list(self.shape)}, but its metadata make {name} {list(shape)}: "
                "fetch it again"
            )

    def chunks(self, elements: int) -> Iterator[tuple[int, int]]:
        """Runs of rows with about so many elements together."""
        step = max(1, elements // self.shape[-1])
        return ((start, min(start + step, self.rows)) for start in range(0, self.rows, step))

    def blocks(self, start: int, stop: int) -> Tensor:
        """The blocks of some rows, in the order of the file: u8 [rows, blocks, bytes]."""
        size = self.file.entries[self.tensor].block_bytes
        return self.file.read(self.tensor, self.first + start, stop - start).reshape(stop - start, -1, size)

    def order(self) -> Tensor | None:
        """Which row of the file is each row of the model; none where they are the same."""
        if not self.pairs:
            return None
        rows = torch.arange(self.shape[0]).view(-1, self.pairs // 2, 2)
        return rows.transpose(1, 2).flatten()


def pieces(files: Mapping[str, GgufFile], config: Mapping[str, Any]) -> dict[str, Piece]:
    """Where each tensor lies, by its Hugging Face name; a tensor that is not a known one keeps the file's name.

    ``files``: which file holds each tensor. Raises `CheckpointError` for heads or experts that contradict the config.
    """
    found: dict[str, Piece] = {}
    for tensor, file in files.items():
        if tensor == ROPE_FACTORS:
            continue
        for name, piece in _named(tensor, file, config):
            if name in found:
                raise CheckpointError(f"{file.path}: {found[name].tensor} and {tensor} are both {name}: fetch it again")
            found[name] = piece
    return found


def _named(tensor: str, file: GgufFile, config: Mapping[str, Any]) -> Iterator[tuple[str, Piece]]:
    shape = file.entries[tensor].shape
    match = _NAME.fullmatch(tensor)
    if match is None:
        yield _OUTSIDE.get(tensor, tensor), Piece(file, tensor, 0, shape)
        return
    layer, part, end = match.groups()
    here = f"model.layers.{int(layer)}."
    if part in _STACKED:
        experts = int(config.get("moe_num_experts") or config.get("num_experts") or 0)
        if len(shape) != 3 or shape[0] != experts:
            raise CheckpointError(f"{tensor} in {file.path} is {list(shape)}, not of {experts} experts: fetch it again")
        for e in range(experts):
            yield f"{here}mlp.experts.{e}.{_STACKED[part]}.{end}", Piece(file, tensor, e * shape[1], shape[1:])
    elif part == "exp_probs_b":
        yield here + "mlp.moe_statics.e_score_correction_bias", Piece(file, tensor, 0, (1, prod(shape)))
    elif part in _IN_LAYER:
        pairs = (
            config["head_dim"] if config["model_type"] in ("llama", "mistral") and part in ("attn_q", "attn_k") else 0
        )
        if pairs and shape[0] % pairs:
            raise CheckpointError(f"{tensor} in {file.path} has {shape[0]} rows in heads of {pairs}: fetch it again")
        yield f"{here}{_IN_LAYER[part]}.{end}", Piece(file, tensor, 0, shape, pairs)
    else:
        yield tensor, Piece(file, tensor, 0, shape)
