"""The tokenizer inside a GGUF file against the one it was made from, and against llama.cpp's."""

import array
import json
from pathlib import Path
from typing import Any

import pytest
from gguf_doubles import changed

from qrun.errors import TemplateError, TokenizerError
from qrun.gguf_file import GgufFile
from qrun.gguf_tokenizer import PATTERNS, read_tokenizer
from qrun.tokenizer import Tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
MODELS = ["llama", "llama_spm", "qwen2", "ernie"]


def file_of(name: str) -> Path:
    return FIXTURES / f"gguf_{name}" / "model.gguf"


def tokenizer(name: str) -> Tokenizer:
    return read_tokenizer(GgufFile(file_of(name)))


@pytest.mark.parametrize("name", MODELS)
def test_ids_are_those_of_the_original_and_of_llama_cpp(name: str) -> None:
    ours = tokenizer(name)
    rows = json.loads(file_of(name).with_name("tokens.json").read_text())
    assert len(rows) > 5
    for row in rows:
        ids = ours.encode_marked(row["text"])
        assert ids == row["llama_cpp"], row["text"]
        # SentencePiece itself puts its space before a text, transformers and llama.cpp behind every control token too.
        if name != "llama_spm" or "<|" not in row["text"]:
            assert ids == row["ids"], row["text"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("text", ["Hello world, it's 12345.", " two  spaces\n\n", "Zażółć 你好 🚀", "</s> <|im_end|>"])
def test_text_comes_back_whole_at_once_and_streamed(name: str, text: str) -> None:
    ours = tokenizer(name)
    ids = ours.encode(text, special=False)
    assert not ours.special_ids.intersection(ids)
    assert ours.decode(ids) == text
    stream = ours.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == text


def test_special_tokens_template_and_ends() -> None:
    llama, ernie = tokenizer("llama"), tokenizer("ernie")
    assert llama.encode("hi")[0] == llama.token_id("<|begin_of_text|>")
    assert llama.render([{"role": "user", "content": "hi"}]) == (
        "<|begin_of_text|><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert llama.thinks
    assert llama.token_id("<|im_end|>") in llama.stop_ids
    assert llama.directory == file_of("llama")
    assert {ernie.token_id("</s>"), ernie.token_id("<|end_of_sentence|>")} <= ernie.stop_ids
    assert ernie.token_id("<think>") not in ernie.special_ids


def test_ernies_template_gets_the_tokens_that_its_files_do_not_name(tmp_path: Path) -> None:
    template = "{{ cls_token }}User: {{ messages[0].content }}\nAssistant: {{ sep_token }}"
    path = changed(file_of("ernie"), tmp_path / "m.gguf", tokenizer__chat_template=template)
    text = read_tokenizer(GgufFile(path)).render([{"role": "user", "content": "hi"}])
    assert text == "<|begin_of_sentence|>User: hi\nAssistant: <|end_of_sentence|>"


def test_a_token_that_is_no_control_token_is_no_bos() -> None:
    file = GgufFile(file_of("qwen2"))
    assert file.metadata["tokenizer.ggml.bos_token_id"] == 1  # an ordinary one
    assert 1 not in read_tokenizer(file).special_ids


def test_a_file_without_a_template_can_still_encode(tmp_path: Path) -> None:
    path = changed(file_of("qwen2"), tmp_path / "m.gguf", tokenizer__chat_template=None)
    found = read_tokenizer(GgufFile(path))
    assert found.encode("hi")
    with pytest.raises(TemplateError, match=r"m\.gguf: no chat template"):
        found.render([{"role": "user", "content": "hi"}])
    bad = changed(file_of("qwen2"), tmp_path / "bad.gguf", tokenizer__chat_template="{% bad %}")
    with pytest.raises(TemplateError, match=r"bad\.gguf: the chat template"):
        read_tokenizer(GgufFile(bad)).render([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("name", "key", "item", "named"),
    [
        ("llama", "model", "t5", "'t5'"),
        ("llama", "model", None, "None"),
        ("llama", "pre", "falcon", "'falcon'"),
        ("llama", "tokens", None, "no tokenizer"),
        ("llama", "tokens", ["a"], "1 tokens and 326 types"),
        ("llama", "tokens", ["a"] * 326, "'a' twice"),
        ("llama", "merges", None, "no merges"),
        ("llama", "merges", ["q zz"], "q zz"),
        ("llama", "merges", ["a b c"], "a b c"),
        ("ernie", "scores", None, "no score"),
        ("ernie", "scores", array.array("f", [0.0]), "no score"),
    ],
)
def test_a_damaged_or_unknown_tokenizer_is_refused(name: str, key: str, item: Any, named: str, tmp_path: Path) -> None:
    path = changed(file_of(name), tmp_path / "m.gguf", **{f"tokenizer__ggml__{key}": item})
    with pytest.raises(TokenizerError, match=named) as refused:
        read_tokenizer(GgufFile(path))
    assert str(path) in str(refused.value)


def test_a_vocabulary_larger_than_the_model_is_refused() -> None:
    with pytest.raises(TokenizerError, match=r"model\.gguf: tokenizer\.json: ids go up to 325"):
        read_tokenizer(GgufFile(file_of("llama")), vocab_size=300)


def test_padding_at_the_end_of_the_vocabulary_is_left_out(tmp_path: Path) -> None:
    file = GgufFile(file_of("qwen2"))
    tokens, kinds = file.metadata["tokenizer.ggml.tokens"], file.metadata["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list)
    assert isinstance(kinds, array.array)
    padded = {
        "tokenizer__ggml__tokens": [*tokens, "[PAD325]", "[PAD326]"],
        "tokenizer__ggml__token_type": array.array("i", [*kinds, 5, 5]),
    }
    path = changed(file_of("qwen2"), tmp_path / "m.gguf", **padded)
    assert read_tokenizer(GgufFile(path)).vocab_size == len(tokens)


@pytest.mark.parametrize("pre", PATTERNS)
def test_every_pre_tokenizer_is_one_that_the_library_takes(pre: str, tmp_path: Path) -> None:
    path = changed(file_of("qwen2"), tmp_path / "m.gguf", tokenizer__ggml__pre=pre)
    found = read_tokenizer(GgufFile(path))
    text = "Hello World's 12345 \t\n ÉCOLE école/"
    assert found.decode(found.encode(text)) == text
