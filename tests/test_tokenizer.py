"""Text to ids and back, streams that never cut a character, and what bad tokenizer files end in."""

import json
import random
import time
from pathlib import Path

import pytest
from text_doubles import FAMILIES, write_family
from transformers import PreTrainedTokenizerFast

from qrun.errors import TokenizerError
from qrun.tokenizer import Tokenizer

TEXTS = [
    "Hello there",
    "  two  leading and trailing  ",
    "\n\nline\n",
    "naïve café, 你好世界 😀 👩‍👩‍👧‍👦 🏳️‍🌈 é",
    "def f(x):\n    return [0, 1]\n",
    "a�b",
]


@pytest.fixture(scope="module", params=["ernie", "llama3", "mistral"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.from_dir(directory)


def streamed(tokenizer: Tokenizer, ids: list[int], **settings: list[int]) -> list[str]:
    decoder = tokenizer.stream(**settings)
    return [*(decoder.push(index) for index in ids), decoder.flush()]


def random_text(draw: random.Random) -> str:
    ranges = [(32, 127), (160, 591), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (0x1F1E6, 0x1F1FF)]
    extra = ["‍", "️", "́", "\n", "  ", "👩‍👩‍👧‍👦", "🏳️‍🌈", "<", "_"]
    pieces = [draw.choice(extra) if draw.random() < 0.2 else chr(draw.randint(*draw.choice(ranges))) for _ in range(40)]
    return "".join(pieces)


def test_round_trip_and_oracle(directory: Path, tokenizer: Tokenizer) -> None:
    oracle = PreTrainedTokenizerFast.from_pretrained(directory)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == oracle(text)["input_ids"]
        assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids).lstrip() == text.lstrip()  # Mistral's own tokenizer loses a leading space


def test_stream_equals_decode(tokenizer: Tokenizer) -> None:
    draw = random.Random(1)
    for text in [*TEXTS, *(random_text(draw) for _ in range(60))]:
        ids = tokenizer.encode(text)
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids)
        assert "".join(pieces).lstrip() == text.lstrip()
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)


def test_stream_of_random_ids_loses_nothing(tokenizer: Tokenizer) -> None:
    """Ids no model should say: their bytes are invalid, but what is whole between them must come through.

    Decoding all at once, byte fallback spoils every character next to an invalid byte, so a stream may show more.
    """
    draw = random.Random(2)
    for _ in range(60):
        ids = [draw.randrange(tokenizer.vocab_size) for _ in range(40)]
        shown = iter("".join(streamed(tokenizer, ids)))
        assert all(character in shown for character in tokenizer.decode(ids).replace("\ufffd", ""))


def test_stream_holds_an_unfinished_character_and_flush_says_so(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("x😀", special=False)
    pieces = streamed(tokenizer, ids[:-1])
    assert "".join(pieces[:-1]) == "x" and set(pieces[-1]) == {"\ufffd"}


def test_stream_gives_up_on_endless_invalid_bytes(tokenizer: Tokenizer) -> None:
    lead = tokenizer.encode("x😀", special=False)[1]
    decoder = tokenizer.stream()
    text = "".join(decoder.push(lead) for _ in range(500))
    assert len(text) > 300


def test_stream_skips_special_tokens_but_keeps_the_space_behind(tokenizer: Tokenizer) -> None:
    special = sorted(tokenizer.special_ids)[-1]
    ids = tokenizer.encode("fine you", special=False)
    assert "".join(streamed(tokenizer, [special, *ids[:1], special, *ids[1:], special])) == "fine you"
    assert special in tokenizer.special_ids
    assert len("".join(streamed(tokenizer, [special], keep=[special]))) > 1


def test_stream_after_a_prompt_keeps_the_leading_space(tokenizer: Tokenizer) -> None:
    prompt, rest = tokenizer.encode("Hello"), tokenizer.encode_marked(" you 你", continues=True)
    assert "".join(streamed(tokenizer, rest, after=prompt)) == " you 你"
    assert tokenizer.text_after(prompt, rest) == " you 你"


def test_stream_is_linear(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Hello there 你好 " * 400)
    start = time.process_time()
    streamed(tokenizer, ids)
    assert (time.process_time() - start) / len(ids) < 200e-6


def test_control_strings_as_text(tokenizer: Tokenizer) -> None:
    for control in tokenizer.control:
        text = f"a {control} b"
        ids = tokenizer.encode(text, special=False)
        assert tokenizer.token_id(control) not in ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_id(control) in tokenizer.encode(text)


def test_lone_surrogates_do_not_crash(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


def test_padding_and_truncation_of_the_file_are_off(tmp_path: Path) -> None:
    directory = write_family("ernie", tmp_path)
    file = directory / "tokenizer.json"
    state = json.loads(file.read_text())
    state["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    state["padding"] = {"strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0,
                        "pad_type_id": 0, "pad_token": "<unk>"}  # fmt: skip
    file.write_text(json.dumps(state))
    tokenizer = Tokenizer.from_dir(directory)
    assert tokenizer.decode(tokenizer.encode("Hello there, you")) == "Hello there, you"
    assert len(tokenizer.encode("a")) == 1


STOPS = {
    "ernie": {"</s>", "<|end_of_sentence|>"},
    "ernie-thinking": {"</s>", "<|im_end|>"},
    "llama3": {"<|eot_id|>", "<|end_of_text|>", "<|endoftext|>"},
    "mistral": {"</s>"},
    "qwen2": {"<|im_end|>", "<|endoftext|>", "<|end_of_text|>"},
}


@pytest.mark.parametrize("name", STOPS)
def test_stop_ids(tmp_path: Path, name: str) -> None:
    tokenizer = Tokenizer.from_dir(write_family(name, tmp_path))
    assert tokenizer.stop_ids == {tokenizer.token_id(token) for token in STOPS[name]}


def test_stop_ids_of_the_configs(tmp_path: Path) -> None:
    directory = write_family("mistral", tmp_path)
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 77, -1, 10000000, true, "x"]}')
    (directory / "config.json").write_text('{"eos_token_id": 78}')
    assert Tokenizer.from_dir(directory).stop_ids == {2, 77, 78}


def test_tokens_declared_in_the_config_only(tmp_path: Path) -> None:
    directory = write_family("qwen3", tmp_path)
    size = Tokenizer.from_dir(directory).vocab_size
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {str(size): {"content": "<|extra|>", "special": True}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_dir(directory)
    assert tokenizer.encode("<|extra|>") == [size] and size in tokenizer.special_ids
    config["added_tokens_decoder"] = {"3": {"content": "<|other|>", "special": True}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TokenizerError, match=r"'<\|other\|>' the id 3"):
        Tokenizer.from_dir(directory)


@pytest.mark.parametrize(("name", "thinks"), [("ernie", False), ("ernie-thinking", True), ("qwen3", True)])
def test_thinks(tmp_path: Path, name: str, thinks: bool) -> None:
    assert name in FAMILIES
    assert Tokenizer.from_dir(write_family(name, tmp_path)).thinks is thinks


def fail(directory: Path, vocab_size: int | None = None) -> str:
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_dir(directory, vocab_size)
    assert "\n" not in str(caught.value) and str(directory) in str(caught.value)
    return str(caught.value)


def test_missing(tmp_path: Path) -> None:
    assert "tokenizer.json: not found" in fail(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    assert "only tokenizer.model" in fail(tmp_path) and "save_pretrained" in fail(tmp_path)


DAMAGED = ["", "{", "[]", "{}", "null", '{"model": {"type": "BPE", "vocab": {"a": 4294967295}, "merges": []}}', "\x00"]


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    assert "fetch the file again" in fail(tmp_path, 1000) or "vocab_size is 1000" in fail(tmp_path, 1000)


def test_truncated(tmp_path: Path) -> None:
    file = write_family("ernie", tmp_path) / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:-100])
    assert "damaged" in fail(tmp_path)


def test_oversized(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(300 * 1024 * 1024)
    assert "refused" in fail(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000])
def test_damaged_configs(tmp_path: Path, name: str, text: str) -> None:
    directory = write_family("ernie", tmp_path)
    (directory / name).write_text(text)
    assert name in fail(directory)


def test_another_models_tokenizer(tmp_path: Path) -> None:
    directory = write_family("ernie", tmp_path)
    size = Tokenizer.from_dir(directory).vocab_size
    assert Tokenizer.from_dir(directory, size).vocab_size == size
    assert f"go up to {size - 1}, but the model's vocab_size is {size - 1}" in fail(directory, size - 1)


def test_odd_declarations_do_not_crash(tmp_path: Path) -> None:
    directory = write_family("ernie", tmp_path)
    config = {"eos_token": "\ud800", "bos_token": {"content": 3}, "pad_token": "not in it", "eos_token_id": [[1], None]}
    config["added_tokens_decoder"] = {"x": 1, "5": "text", "6": {"special": True}, "7": None}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.from_dir(directory).decode([]) == ""


def test_a_vocabulary_that_cannot_encode(tmp_path: Path) -> None:
    state = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer.encode("a") == [0]
    with pytest.raises(TokenizerError, match="cannot encode 'b'"):
        tokenizer.encode("b")
