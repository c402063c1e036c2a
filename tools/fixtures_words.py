"""A tokenizer of as many words as the tiny fixture models have rows, and token sequences, for tools that calibrate.

Knows nothing of any tool; both are the same on every run.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

FIRST = 3
"""The first id that is a word: below are padding, begin and end."""


def save_words(to: Path, vocab: int = 128) -> None:
    """Write a tokenizer of the words w3, w4 ... beside a model."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(FIRST, vocab)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    ).save_pretrained(to)


def sequences(count: int = 16, length: int = 64, vocab: int = 128) -> list[list[int]]:
    """Random token ids to calibrate with."""
    random = torch.Generator().manual_seed(7)
    return torch.randint(FIRST, vocab, (count, length), generator=random).tolist()
