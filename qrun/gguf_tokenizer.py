"""The tokenizer that a GGUF file carries, as the files that a Hugging Face checkpoint of the same model has.

Two kinds: ``gpt2`` is byte-level BPE with its merges; ``llama`` is SentencePiece BPE, whose merges follow from the
scores of its pieces. Facts as in llama.cpp's ``llama-vocab`` and transformers' converter. Knows nothing of their use.
"""

import array
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, cast

from qrun.errors import TemplateError, TokenizerError
from qrun.gguf_file import GgufFile, Value, gguf_at
from qrun.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
"""Kinds of tokens in ``tokenizer.ggml.token_type``."""
SPACE: Final = "\u2581"

_CONTRACTIONS: Final = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3: Final = (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _REST,)
_QWEN2: Final = (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _REST,)
_GPT2: Final = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN: Final = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
PATTERNS: Final[Mapping[str, Sequence[str]]] = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "megrez": _QWEN2,
    "smaug-bpe": _LLAMA3,
    "tekken": _TEKKEN,
    "gpt-2": _GPT2,
    "smollm": (r"\p{N}", *_GPT2),
}
"""tokenizer.ggml.pre -> the expressions that cut a text, one after another, before bytes are merged."""
_WHOLE_WORDS: Final = ("llama-bpe", "llama3", "llama-v3", "tekken")
"""Where a word that is a token is not built from merges, and BOS is put first unless the file says otherwise."""
_NAMED: Final = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "padding": "pad_token",
    "cls": "cls_token",
    "seperator": "sep_token",  # so spelled in the files
    "mask": "mask_token",
}
_ERNIE: Final = {"cls_token": "<|begin_of_sentence|>", "sep_token": "<|end_of_sentence|>"}
"""What ERNIE's template prints and its GGUF files do not name."""
_LONGEST: Final = 512  # characters of a piece; published ones have up to 128
_BYTE: Final = re.compile(r"<0x[0-9A-F]{2}>")


def open_tokenizer(path: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of the checkpoint at a path, whether it is in GGUF or a safetensors directory.

    Raises as `read_tokenizer` and `Tokenizer.from_dir`.
    """
    file = gguf_at(Path(path))
    return Tokenizer.from_dir(path, vocab_size) if file is None else read_tokenizer(GgufFile(file), vocab_size)


def read_tokenizer(file: GgufFile, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer in a file's metadata; ``vocab_size`` is the model's, for checking.

    Raises `TokenizerError` if there is none, or it is damaged or of a kind that qrun does not know.
    """
    with tempfile.TemporaryDirectory(prefix="qrun-") as name:
        directory = Path(name)
        for part, content in tokenizer_files(file).items():
            (directory / part).write_text(json.dumps(content), encoding="utf-8")
        try:
            found = Tokenizer.from_dir(directory, vocab_size)
        except TokenizerError as error:
            raise TokenizerError(str(error).replace(f"{directory}/", f"{file.path}: ")) from None
        template: dict[str, Any] = {}
        try:
            template["_template"] = replace(found.template, name=str(file.path))
        except TemplateError as error:
            template["_template"] = TemplateError(str(error).replace(str(directory), str(file.path)))
        return replace(found, directory=file.path, **template)


def tokenizer_files(file: GgufFile) -> dict[str, Any]:
    """What tokenizer.json, tokenizer_config.json and generation_config.json would say. Raises as `read_tokenizer`."""
    vocabulary = _Vocabulary(file)
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        core = _byte_level(vocabulary)
    elif kind == "llama":
        core = _sentencepiece(vocabulary)
    else:
        raise TokenizerError(
            f"{file.path}: tokenizer.ggml.model is {kind!r}; qrun reads gpt2 and llama: use the safetensors checkpoint"
        )
    config: dict[str, Any] = vocabulary.named()
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    ends = [vocabulary.special(name) for name in ("eos", "eot", "eom")]
    return {
        "tokenizer.json": {"version": "1.0", "added_tokens": vocabulary.added(), **core},
        "tokenizer_config.json": config,
        "generation_config.json": {"eos_token_id": [end for end in ends if end is not None]},
    }


class _Vocabulary:
    """The tokens of a file with what is known of each, checked."""

    def __init__(self, file: GgufFile) -> None:
        self.path = file.path
        self.metadata = file.metadata
        tokens = self._get("tokens")
        if not isinstance(tokens, list) or not tokens:
            raise TokenizerError(
                f"{file.path} has no tokenizer: it is part of a model, or give its safetensors checkpoint"
            )
        kinds = self._get("token_type")
        held = list(kinds) if isinstance(kinds, array.array) else []
        if len(held) != len(tokens):
            raise self.fail(f"{len(tokens)} tokens and {len(held)} types of them")
        while len(tokens) > 1 and held[len(tokens) - 1] == UNUSED:  # padding up to a round number
            tokens = tokens[:-1]
        self.tokens: list[str] = tokens
        self.kinds = [int(kind) for kind in held[: len(tokens)]]
        self.ids = {text: i for i, text in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            twice = next(text for i, text in enumerate(self.tokens) if self.ids[text] != i)
            raise self.fail(f"the token {twice!r} twice")

    def fail(self, what: str) -> TokenizerError:
        return TokenizerError(f"{self.path}: the tokenizer has {what}: fetch the file again")

    def _get(self, key: str) -> "Value | None":
        return self.metadata.get(f"tokenizer.ggml.{key}")

    def strings(self, key: str) -> list[str]:
        found = self._get(key)
        if not isinstance(found, list):
            raise self.fail(f"no {key}")
        return found

    def scores(self) -> Sequence[float]:
        found = self._get("scores")
        if not isinstance(found, array.array) or len(found) < len(self.tokens):
            raise self.fail("no score for some token")
        return cast(Sequence[float], found)

    def flag(self, key: str, default: bool) -> bool:
        found = self._get(key)
        return found if isinstance(found, bool) else default

    def special(self, name: str) -> int | None:
        """The id of a special token by its GGUF name; none where the file has none, or puts an ordinary token there."""
        found = self._get(f"{name}_token_id")
        known = type(found) is int and 0 <= found < len(self.tokens) and self.kinds[found] != NORMAL
        return cast(int, found) if known else None

    def named(self) -> dict[str, str]:
        """Special tokens by the names that templates know."""
        ids = {ours: self.special(theirs) for theirs, ours in _NAMED.items()}
        found = {ours: self.tokens[i] for ours, i in ids.items() if i is not None}
        if str(self.metadata.get("general.architecture")).startswith("ernie"):
            found = {ours: text for ours, text in _ERNIE.items() if text in self.ids} | found
        return found

    def added(self) -> list[dict[str, Any]]:
        """Tokens that are looked for in a text before it is cut."""
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        kinds = enumerate(self.kinds)
        found = [(i, kind != USER) for i, kind in kinds if kind in (CONTROL, USER, UNKNOWN) and self.tokens[i]]
        return [{"id": i, "content": self.tokens[i], **flags, "special": special} for i, special in found]

    def frame(self, *, bos: bool) -> dict[str, Any] | None:
        """The post-processor that puts BOS and EOS around a text; none where the file wants neither."""
        wanted = {"bos": self.flag("add_bos_token", bos), "eos": self.flag("add_eos_token", False)}
        ids = {name: self.special(name) for name, want in wanted.items() if want}
        texts = {name: self.tokens[i] for name, i in ids.items() if i is not None}
        if not texts:
            return None
        single: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
        pair: list[dict[str, Any]] = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
        before = [{"SpecialToken": {"id": texts["bos"], "type_id": 0}}] if "bos" in texts else []
        after = [{"SpecialToken": {"id": texts["eos"], "type_id": 0}}] if "eos" in texts else []
        special = {text: {"id": text, "ids": [ids[name]], "tokens": [text]} for name, text in texts.items()}
        return {
            "type": "TemplateProcessing",
            "single": [*before, *single, *after],
            "pair": [*before, *pair, *after],
            "special_tokens": special,
        }


def _byte_level(vocabulary: _Vocabulary) -> dict[str, Any]:
    pre = vocabulary.metadata.get("tokenizer.ggml.pre")
    if not isinstance(pre, str) or pre not in PATTERNS:
        raise TokenizerError(
            f"{vocabulary.path}: tokenizer.ggml.pre is {pre!r}, which qrun does not know; it knows "
            f"{', '.join(PATTERNS)}: use the safetensors checkpoint"
        )
    merges = [merge.split(" ") for merge in vocabulary.strings("merges")]
    for merge in merges:
        if len(merge) != 2 or any(text not in vocabulary.ids for text in (*merge, "".join(merge))):
            raise vocabulary.fail(f"a merge {' '.join(merge)[:40]!r} of no tokens")
    cuts = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in PATTERNS[pre]
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, level]},
        "post_processor": vocabulary.frame(bos=pre in _WHOLE_WORDS),
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre in _WHOLE_WORDS,
            "vocab": vocabulary.ids,
            "merges": merges,
        },
    }


def _sentencepiece(vocabulary: _Vocabulary) -> dict[str, Any]:
    prefix = vocabulary.flag("add_space_prefix", True)
    unknown = vocabulary.special("unknown")
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    if prefix:
        steps.insert(0, {"type": "Prepend", "prepend": SPACE})
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": vocabulary.frame(bos=True),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None if unknown is None else vocabulary.tokens[unknown],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(_BYTE.fullmatch(text) for text in vocabulary.tokens),
            "ignore_merges": False,
            "vocab": vocabulary.ids,
            "merges": _merges(vocabulary),
        },
    }


def _merges(vocabulary: _Vocabulary) -> list[list[str]]:
    """Every pair of pieces that make a piece, in the order in which SentencePiece merges: best score first."""
    scores, ids = vocabulary.scores(), vocabulary.ids
    kinds = zip(vocabulary.tokens, vocabulary.kinds, strict=True)
    usable = [kind in (NORMAL, USER, UNUSED) and len(text) <= _LONGEST for text, kind in kinds]
    found: list[tuple[float, int, int, str, str]] = []
    for i, text in enumerate(vocabulary.tokens):
        if not usable[i]:
            continue
        for at in range(1, len(text)):
            left, right = ids.get(text[:at]), ids.get(text[at:])
            if left is not None and right is not None and usable[left] and usable[right]:
                found.append((-scores[i], left, right, text[:at], text[at:]))
    found.sort(key=lambda merge: merge[:3])
    return [[left, right] for *_, left, right in found]
