"""Reads the files a tokenizer is made of and what the configs say about its tokens; knows nothing of their use."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import tokenizers

from qrun.errors import TokenizerError

_MAX_FILE = 256 * 1024 * 1024  # bytes; the largest published tokenizer.json has about 35 MB
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_core(directory: Path) -> tokenizers.Tokenizer:
    """tokenizer.json, with padding and truncation off. TokenizerError if it is missing, damaged or oversized."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        others = [name for name in ("tokenizer.model", "vocab.json", "tekken.json") if (directory / name).is_file()]
        found = f"only {', '.join(others)}, which qrun does not read" if others else "no other tokenizer either"
        raise TokenizerError(
            f"{file}: not found, {found}; fetch tokenizer.json from the model's repository, "
            "or make it with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    try:
        size = file.stat().st_size
        if size > _MAX_FILE:
            raise TokenizerError(f"{file}: {size} bytes, larger than any tokenizer should be; refused")
        core = tokenizers.Tokenizer.from_file(str(file))
    except TokenizerError:
        raise
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library's panics are no Exceptions
        reason = " ".join(str(error).split())[:200]
        raise TokenizerError(f"{file}: damaged or of an unknown kind ({reason}); fetch the file again") from error
    core.no_truncation()  # both would silently change what the model reads
    core.no_padding()
    return core


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, or an empty one if there is no such file. TokenizerError if it is damaged or oversized."""
    if not file.is_file():
        return {}
    try:
        if file.stat().st_size > _MAX_FILE:
            raise TokenizerError(f"{file}: larger than such a file should be; refused")
        value: object = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{file}: cannot be read ({error}); fetch the file again") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{file}: holds {type(value).__name__}, not an object; fetch the file again")
    return cast("dict[str, Any]", value)


def _content(value: object) -> str | None:
    """The text of a token, written as a string or as an object with ``content``."""
    if isinstance(value, dict):
        value = cast("dict[str, Any]", value).get("content")
    if not isinstance(value, str) or not value:
        return None
    return value.encode("utf-8", "replace").decode("utf-8")  # JSON can write half a surrogate pair


def named_tokens(*configs: Mapping[str, Any]) -> dict[str, str]:
    """``bos_token`` and the like by name; the first file that names one wins."""
    named: dict[str, str] = {}
    for config in configs:
        for name in _NAMED:
            text = _content(config.get(name))
            if text is not None:
                named.setdefault(name, text)
    return named


def add_declared(
    core: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, str], directory: Path
) -> None:
    """Register the tokens that tokenizer_config.json declares and tokenizer.json leaves ordinary, as transformers does.

    TokenizerError: the two files disagree about an id.
    """
    known = {token.content for token in core.get_added_tokens_decoder().values()}
    declared: object = config.get("added_tokens_decoder", {})
    entries = cast("dict[str, Any]", declared).items() if isinstance(declared, dict) else ()
    numbered = [(int(key), value) for key, value in entries if key.isdecimal()]
    for index, value in sorted(numbered, key=lambda entry: entry[0]):
        text = _content(value)
        if text is None or text in known or not isinstance(value, dict):
            continue
        flags = cast("dict[str, Any]", value)
        special = bool(flags.get("special"))
        token = tokenizers.AddedToken(
            text,
            special=special,
            normalized=bool(flags.get("normalized", not special)),
            **{flag: bool(flags.get(flag)) for flag in ("lstrip", "rstrip", "single_word")},
        )
        _add(core, [token], special=special)
        if core.token_to_id(text) != index:
            raise TokenizerError(
                f"{directory / 'tokenizer_config.json'}: gives {text!r} the id {index}, but tokenizer.json gives it "
                f"{core.token_to_id(text)}; the files belong to different models: fetch both from one source"
            )
    names = [text for text in named.values() if core.token_to_id(text) is not None]
    _add(core, [tokenizers.AddedToken(text, special=True, normalized=False) for text in names], special=True)


def _add(core: Any, tokens: list[tokenizers.AddedToken], *, special: bool) -> None:
    add = core.add_special_tokens if special else core.add_tokens
    add(tokens)


def eos_ids(directory: Path, tokenizer_config: Mapping[str, Any]) -> set[int]:
    """Every end id that the configs name; a number or a list in each."""
    found: set[int] = set()
    configs = (read_json(directory / "generation_config.json"), read_json(directory / "config.json"), tokenizer_config)
    for config in configs:
        value: object = config.get("eos_token_id")
        values = cast("list[Any]", value) if isinstance(value, list) else [value]
        found.update(v for v in values if isinstance(v, int) and not isinstance(v, bool))
    return found
