"""The text that a model is calibrated on, as windows of token ids. Knows tokenizers, but neither weights nor layers."""

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from qrun.errors import UsageError
from qrun.hub import EMBEDDED
from qrun.tokenizer import Tokenizer

BUILT_IN: Final = "calibration.txt"
"""A text beside the embedded model's weights, no part of what it is evaluated on."""
WINDOW: Final = 512
TOKENS: Final = 32768
_KEPT: Final = 8  # one window of so many is kept from the Hessians, to measure on


@dataclass(frozen=True)
class Calibration:
    """ids [windows, S] int64; the last windows, from ``train`` on, are only measured on. ``name`` is the text's."""

    name: str
    ids: Tensor
    train: int

    @property
    def digest(self) -> str:
        """Of the ids, for a journal."""
        return hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()[:16]


def calibration(
    directory: Path, vocab: int, positions: int, *, label: str = "", text: Path | None = None, window: int = WINDOW,
    tokens: int = TOKENS,
) -> Calibration:  # fmt: skip
    """Windows from a UTF-8 file, or from the built-in text, spread evenly over it if it is longer than ``tokens``.

    Raises UsageError for a text that cannot be read or is too short, TokenizerError where it cannot be cut to tokens.
    """
    name = f"built-in ({BUILT_IN})" if text is None else text.name
    try:
        content = ((files("qrun.spark") / BUILT_IN) if text is None else text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {text}: {error}; give a UTF-8 text with --calibration") from error
    if text is None and label != EMBEDDED:  # the marks of its conversations are another model's
        content = content.replace("<|begin_of_sentence|>", "").replace("<|end_of_sentence|>", "\n")
    ids = Tokenizer.from_dir(directory, vocab_size=vocab).encode(content)
    size = min(window, positions)
    count = len(ids) // size
    if count < 2:
        raise UsageError(f"{name} has {len(ids)} tokens: calibration needs 2 windows of {size} or more")
    most = max(2, tokens // size)
    chosen = [i * count // most for i in range(most)] if count > most else list(range(count))
    windows = torch.tensor(ids[: count * size], dtype=torch.int64).view(count, size)[chosen]
    every = max(2, len(chosen) // max(1, len(chosen) // _KEPT))
    kept = set(range(every - 1, len(chosen), every))
    order = [i for i in range(len(chosen)) if i not in kept] + sorted(kept)
    return Calibration(name, windows[order], len(chosen) - len(kept))
