"""The programs that `vs_llamacpp.py` compares, each behind the same two calls: read a prompt, make tokens.

Each runs in a process of its own (`python contenders.py KIND FILE VARIANT THREADS CONTEXT`), loaded once and idle
between turns: a line `pp 512` or `tg 64` on stdin is one timed turn, answered by a line of JSON on stdout.
"""

import json
import sys
import time
from abc import ABC, abstractmethod
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from qrun.api import load
from qrun.bench import Test, bytes_per_token, measure
from qrun.resident import peak


class Contender(ABC):
    """A loaded model. ``bytes_per_token``: what a decode step must read of the weights."""

    name: str
    bytes_per_token: float

    @abstractmethod
    def read(self, tokens: int) -> float:
        """Seconds to process a prompt of so many tokens from an empty cache, up to the last one's logits."""

    @abstractmethod
    def make(self, tokens: int) -> float:
        """Seconds to make so many tokens, one by one, behind a prompt of one."""


class LlamaCpp(Contender):
    """llama.cpp through its C interface, as its own llama-bench drives it: random tokens, no sampling, F16 cache."""

    def __init__(self, path: Path, variant: str, threads: int, context: int) -> None:
        c: Any = import_module("llama_cpp")
        self._c = c
        self._quiet = c.llama_log_callback(_say_nothing)  # kept, for the library holds no reference
        c.llama_log_set(self._quiet, None)
        c.llama_backend_init()
        self.name = f"llama.cpp {variant}"
        self.bytes_per_token = float(path.stat().st_size)
        self._model = c.llama_model_load_from_file(str(path).encode(), c.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        settings = c.llama_context_default_params()
        settings.n_ctx = context
        settings.n_batch = settings.n_ubatch = 512
        settings.n_threads = settings.n_threads_batch = threads
        self._context = c.llama_init_from_model(self._model, settings)
        self._batch = c.llama_batch_init(512, 0, 1)
        self._vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self._model))

    def _decode(self, tokens: list[int], start: int) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = start + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = i == len(tokens) - 1
        if self._c.llama_decode(self._context, batch):
            raise SystemExit("llama_decode failed")
        self._c.llama_synchronize(self._context)

    def _clear(self) -> None:
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)

    def read(self, tokens: int) -> float:
        self._clear()
        ids = _random_ids(self._vocab, tokens)
        begun = time.perf_counter()
        for start in range(0, tokens, 512):
            self._decode(ids[start : start + 512], start)
        return time.perf_counter() - begun

    def make(self, tokens: int) -> float:
        self._clear()
        ids = _random_ids(self._vocab, tokens + 1)
        self._decode(ids[:1], 0)
        begun = time.perf_counter()
        for position in range(1, tokens + 1):
            self._decode([ids[position]], position)
        return time.perf_counter() - begun


def _say_nothing(level: int, text: bytes, data: object) -> None:
    """llama.cpp's log, unread."""


class Transformers(Contender):
    """Hugging Face transformers in eager torch, its static settings left alone; greedy."""

    def __init__(self, path: Path, variant: str, threads: int, context: int) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        auto: Any = AutoModelForCausalLM
        self._model = auto.from_pretrained(path, dtype=getattr(torch, variant)).eval()
        self.name = f"transformers {variant}"
        self.bytes_per_token = float(sum(weight.nbytes for weight in self._model.parameters()))

    @torch.inference_mode()
    def read(self, tokens: int) -> float:
        ids = torch.tensor([_random_ids(self._model.config.vocab_size, tokens)])
        begun = time.perf_counter()
        self._model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - begun

    @torch.inference_mode()
    def make(self, tokens: int) -> float:
        out = self._model(input_ids=torch.tensor([[1]]), use_cache=True, logits_to_keep=1)
        begun = time.perf_counter()
        for _ in range(tokens):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            out = self._model(input_ids=token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - begun


class Qrun(Contender):
    """qrun itself, through the same code as `qrun bench`; greedy."""

    def __init__(self, path: Path, variant: str, threads: int, context: int) -> None:
        self._engine = load(path, quant=variant, context=context, threads=threads)
        self.name = f"qrun {variant}"
        self.bytes_per_token = bytes_per_token(self._engine)
        self._turn = 0

    def _measure(self, kind: Any, tokens: int) -> float:
        self._turn += 1
        return measure(self._engine, Test(kind, tokens), turn=self._turn).seconds

    def read(self, tokens: int) -> float:
        return self._measure("pp", tokens)

    def make(self, tokens: int) -> float:
        return self._measure("tg", tokens)


KINDS: dict[str, type[LlamaCpp] | type[Transformers] | type[Qrun]] = {
    "llama.cpp": LlamaCpp,
    "transformers": Transformers,
    "qrun": Qrun,
}


def _random_ids(vocab: int, count: int) -> list[int]:
    noise: Any = torch.randint(vocab, (count,))
    ids: list[int] = noise.tolist()
    return ids


def _serve(kind: str, path: str, variant: str, threads: str, context: str) -> None:
    begun = time.perf_counter()
    contender = KINDS[kind](Path(path), variant, int(threads), int(context))
    ready = {"bytes_per_token": contender.bytes_per_token, "load_seconds": time.perf_counter() - begun}
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        test, tokens = line.split()
        seconds = contender.read(int(tokens)) if test == "pp" else contender.make(int(tokens))
        print(json.dumps({"seconds": seconds, "peak": peak()}), flush=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
