"""Makes the GGUF fixtures: blocks of every type by ggml's quantizer, and tiny models by llama.cpp's converter.

    PYTHONPATH=LLAMA_CPP/gguf-py python tools/fixtures_gguf.py LLAMA_CPP

llama-cpp-python 0.3.36 built from source, whose sdist holds llama.cpp in vendor/llama.cpp: the argument. With it
transformers 5.24, torch 2.13, tokenizers 0.23 and sentencepiece 0.2.3, in a venv of their own. The oracle of the
blocks is gguf-py's dequantization; of the models, transformers' logits of the model that was converted and llama.cpp's
of the file; of the tokenizers, the ids of the one that was converted and llama.cpp's.
"""

import ctypes
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import gguf
import llama_cpp
import numpy as np
import sentencepiece
import torch
from fixtures_models import FIXTURES, tiny
from llama_cpp import _ggml
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

BLOCKS = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ2_XXS", "IQ2_XS", "IQ3_XXS",
    "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS", "IQ1_M", "TQ1_0", "TQ2_0", "MXFP4",
)  # fmt: skip
ROWS, COLUMNS = 6, 512
TEXTS = (
    "Hello world, it's 12345 o'clock.",
    "  two spaces,\n\nlines\tand tabs ",
    "Zażółć gęślą jaźń — 你好 🚀",
    "def f(x):\n    return x + 1",
    "<|im_start|>user\nhi<|im_end|> <think>\n",
    "",
    " ",
    "\n",
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog and it's been 1234 days since they've returned.",
    "Hello world, hello there. A world of words, the words of the world; other people rather than another.",
    "def function(self, value): return self.value + value\n    if value: print(value)\n",
    "User: what is the weather?\nAssistant: the weather is whatever it was.",
] * 4
TEMPLATE = (
    "{{ bos_token if bos_token is defined else '' }}{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|begin_of_sentence|>", "<|end_of_sentence|>", "<|im_start|>", "<|im_end|>")
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def blocks() -> None:
    """One file with a tensor of each type, and digests of what gguf-py expands them to."""
    quantize = cast(Any, _ggml.libggml).ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    random = np.random.default_rng(5)
    values = (random.standard_normal((ROWS, COLUMNS)) * 0.05).astype(np.float32)
    values[:, ::97] *= 8
    values[1, :256] = 0
    values[2] *= np.float32(1e-4)
    importance = np.ones(COLUMNS, dtype=np.float32)
    at = FIXTURES / "gguf_types"
    at.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(at / "types.gguf", "llama")
    digests: dict[str, str] = {}
    for name in BLOCKS:
        kind = gguf.GGMLQuantizationType[name]
        size = COLUMNS // gguf.GGML_QUANT_SIZES[kind][0] * gguf.GGML_QUANT_SIZES[kind][1]
        packed = np.zeros((ROWS, size), dtype=np.uint8)
        args = (ctypes.c_int64(0), ctypes.c_int64(ROWS), ctypes.c_int64(COLUMNS))
        written = quantize(int(kind), _pointer(values), _pointer(packed), *args, _pointer(importance))
        assert written == packed.nbytes, name
        writer.add_tensor(name, packed, raw_dtype=kind)
        digests[name] = digest(gguf.quants.dequantize(packed, kind))
    for name, dtype in (("F32", np.float32), ("F16", np.float16)):
        writer.add_tensor(name, values.astype(dtype))
        digests[name] = digest(values.astype(dtype))
    _finish(writer)
    _write(at / "oracle.json", {"rows": ROWS, "columns": COLUMNS, "sha256": digests})


def digest(values: np.ndarray[Any, Any]) -> str:
    """Of the numbers as little-endian FP32, no zero negative."""
    return hashlib.sha256((values.astype("<f4") + np.float32(0)).tobytes()).hexdigest()


def _pointer(array: np.ndarray[Any, Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def byte_level(directory: Path, pre: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 320 tokens and a few control tokens, as Llama 3 and Qwen have them."""
    cut = r"\p{N}{1,3}" if pre == "llama-bpe" else r"\p{N}"
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + cut + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    core = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        core.normalizer = normalizers.NFC()
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    cut_first = pre_tokenizers.Split(Regex(pattern), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([cut_first, level])
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(["<|begin_of_text|>"] if pre == "llama-bpe" else [])]
    core.add_special_tokens(special)
    core.add_tokens(["<think>", "</think>"])
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    if pre == "llama-bpe":
        bos = "<|begin_of_text|>"
        named["bos_token"] = bos
        frame = {"single": f"{bos} $A", "pair": f"{bos} $A $B", "special_tokens": [(bos, core.token_to_id(bos))]}
        core.post_processor = cast(Any, processors.TemplateProcessing)(**frame)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=core, chat_template=TEMPLATE, **named)
    wrapped.save_pretrained(directory)
    return wrapped


def sentence_piece(directory: Path, prefix: bool) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece BPE model of 400 pieces with byte fallback, as Llama 2 has it, or, without prefix, ERNIE."""
    lines = directory / "corpus.txt"
    lines.write_text("\n".join(line.replace("\n", " ") for line in CORPUS), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(lines), model_prefix=str(directory / "tokenizer"), vocab_size=400, model_type="bpe",
        byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=prefix, user_defined_symbols=[*SPECIAL, "<think>"], allow_whitespace_only_pieces=True,
        minloglevel=2,
    )  # fmt: skip
    config = {"add_prefix_space": prefix, "chat_template": TEMPLATE, "bos_token": "<s>", "eos_token": "</s>"}
    processor = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    added = {text: text in SPECIAL for text in (*SPECIAL, "<think>")}
    decoder = {
        str(cast(Any, processor).piece_to_id(text)): {"content": text, "special": special}
        for text, special in added.items()
    }
    config |= {"unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": decoder}
    _write(directory / "tokenizer_config.json", config)
    return processor


def model(name: str, llama: Path, kind: str, pre: str, **changes: Any) -> None:
    """A tiny model with its tokenizer, converted to F16, with what transformers and llama.cpp make of it."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        if pre.startswith("spm"):
            processor = sentence_piece(directory, prefix=pre == "spm-prefix")
            encode = cast(Callable[[str], list[int]], cast(Any, processor).encode)
            size = processor.get_piece_size()
        else:
            wrapped = byte_level(directory, pre)
            encode = cast(Callable[[str], list[int]], partial(wrapped.encode, add_special_tokens=False))
            size = len(wrapped)
        base = tiny(kind, torch.float32, **(SMALL | {"vocab_size": size} | changes))
        for parameter in base.parameters():
            exact = parameter.data.bfloat16().float()  # held by BF16 and by F16
            parameter.data.copy_(torch.where(exact.abs() < 1e-4, 0.0, exact))
        base.save_pretrained(directory)
        at = FIXTURES / name
        at.mkdir(parents=True, exist_ok=True)
        convert(llama, directory, at / "model.gguf", pre)
        logits(base, at, size)
        tokens(at, encode)


def convert(llama: Path, source: Path, to: Path, pre: str) -> None:
    """llama.cpp's converter; what it recognises published tokenizers by is told to it."""
    sys.path.insert(0, str(llama))
    from conversion import TextModel, get_model_class  # pyright: ignore

    text_model = cast(Any, TextModel)
    text_model.get_vocab_base_pre = lambda self, tokenizer: pre
    config = json.loads((source / "config.json").read_text())
    kind = cast(Any, get_model_class)(config["architectures"][0])
    with torch.inference_mode():
        kind(source, gguf.LlamaFileType.MOSTLY_F16, to).write()


def logits(base: PreTrainedModel, at: Path, size: int) -> None:
    ids = torch.randint(0, size, (12,), generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        theirs = cast(Any, base)(input_ids=ids[None]).logits[0].float()
    run = llama_cpp.Llama(model_path=str(at / "model.gguf"), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    run.eval(ids.tolist())
    ran = torch.from_numpy(np.array(run.scores[: len(ids)]))
    print(f"{at.name}: transformers and llama.cpp differ by {float((theirs - ran).abs().max()):.2g}")
    save_file({"ids": ids, "transformers": theirs, "llama_cpp": ran.half()}, at / "oracle.safetensors")


def tokens(at: Path, encode: Callable[[str], list[int]]) -> None:
    run = llama_cpp.Llama(model_path=str(at / "model.gguf"), vocab_only=True, verbose=False)
    rows = [{"text": text, "ids": list(encode(text)), "llama_cpp": _theirs(run, text)} for text in TEXTS]
    _write(at / "tokens.json", rows)


def _theirs(run: llama_cpp.Llama, text: str) -> list[int]:
    return run.tokenize(text.encode(), add_bos=False, special=True) if text else []


def _write(to: Path, value: object) -> None:
    to.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    torch.set_num_threads(1)
    llama = Path(sys.argv[1])
    blocks()
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    model("gguf_llama", llama, "llama", "llama-bpe", rope_parameters=rope, head_dim=32)
    model("gguf_llama_spm", llama, "llama", "spm-prefix", tie_word_embeddings=True)
    model("gguf_qwen2", llama, "qwen2", "qwen2", tie_word_embeddings=True)
    model("gguf_qwen3", llama, "qwen3", "qwen2", num_key_value_heads=2, tie_word_embeddings=True)
    model("gguf_qwen3_moe", llama, "qwen3_moe", "qwen2", norm_topk_prob=True, tie_word_embeddings=True)
    model("gguf_ernie", llama, "ernie4_5", "spm", tie_word_embeddings=True, head_dim=32)
    moe = {"moe_layer_start_index": 1, "moe_num_shared_experts": 2, "num_key_value_heads": 1}
    model("gguf_ernie_moe", llama, "ernie4_5_moe", "spm", tie_word_embeddings=True, **moe)


if __name__ == "__main__":
    main()
