"""Real small tokenizers in the manner of the published families, their templates, and an engine that plays a script."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from qrun.errors import SnapshotError

CORPUS = [
    "User: Hello there, how are you today?\nAssistant: I am fine, thank you. The number is 12345.\n",
    "def main():\n    return [0, 1, 2]\n\nprint(main())\n",
    "Grüße aus Zürich – naïve café, 你好世界 こんにちは 😀 👩‍👩‍👧‍👦",
    "system user assistant <think> answer </think> response the quick brown fox jumps over the lazy dog " * 3,
]

ERNIE = """\
{%- if not add_generation_prompt is defined -%}{%- set add_generation_prompt = true -%}{%- endif -%}
{{- cls_token -}}
{%- for message in messages -%}
    {%- if message["role"] == "user" -%}
        {{- "User: " + message["content"] + "\\n" -}}
    {%- elif message["role"] == "assistant" -%}
        {{- "Assistant: " + message["content"] + "<|end_of_sentence|>" -}}
    {%- elif message["role"] == "system" -%}
        {{- message["content"] + "\\n" -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "Assistant: " -}}
{%- endif -%}
"""

ERNIE_THINKING = """\
{%- for message in messages %}
    {%- set text = message.content %}
    {%- if message.role == "assistant" %}
        {%- set text = "<response>\\n" + text + "\\n</response>" %}
    {%- endif %}
    {{- "<|im_start|>" + message.role + "\\n" + text + "<|im_end|>\\n\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n<think>\\n" }}
{%- endif %}
"""

LLAMA3 = """\
{% set loop_messages = messages %}
{% for message in loop_messages %}
    {% set header = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' %}
    {% set content = header + message['content'] | trim + '<|eot_id|>' %}
    {% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}
{{- content -}}
{% endfor %}
{% if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{% endif %}
"""

MISTRAL = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + message['content'] + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""

QWEN2 = """\
{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if tools %}{{- tools | tojson }}{%- endif %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

QWEN3 = """\
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" %}{%- set ns.last = index %}{%- break %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- set reasoning = message.reasoning_content if message.reasoning_content is string else '' %}
        {%- if not reasoning and '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last %}
            {%- set content = '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') %}
        {%- endif %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

DEEPSEEK_R1 = """\
{{- bos_token }}
{%- for message in messages if message.role == 'system' %}{{- message.content }}{%- endfor %}
{%- for message in messages if message.role != 'system' %}
    {%- if message.role == 'user' %}
        {{- '<｜User｜>' + message.content }}
    {%- else %}
        {{- '<｜Assistant｜>' + message.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜><think>\\n' }}{%- endif %}
"""

_BYTE_SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>",
)  # fmt: skip
_PIECE_SPECIALS = ("<unk>", "<s>", "</s>", "<|begin_of_sentence|>", "<|end_of_sentence|>", "<|im_start|>", "<|im_end|>")


@cache
def _byte_level() -> str:
    core = Tokenizer(models.BPE())
    pattern = r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in _BYTE_SPECIALS])
    tags = ("<think>", "</think>", "<｜User｜>", "<｜Assistant｜>")
    core.add_tokens([AddedToken(text, normalized=False) for text in tags])
    return core.to_str()


@cache
def _pieces(prefix: bool) -> str:
    """SentencePiece BPE with byte fallback: with a prefix space as Llama 2 and Mistral, or without as ERNIE-4.5."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("▁?[^▁\n]+|\n|▁"), "isolated")
    text = [line for line in CORPUS if line.isascii()]
    specials = [*_PIECE_SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
    trained.train_from_iterator(text, trainers.BpeTrainer(vocab_size=560, special_tokens=specials, show_progress=False))
    state = json.loads(trained.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in _PIECE_SPECIALS]
    core = Tokenizer.from_str(json.dumps(state))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False) if prefix else None
    core.normalizer = None if prefix else normalizers.Replace(" ", "▁")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)
    if prefix:
        core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))])
    return core.to_str()


FAMILIES: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "ernie": ("pieces", ERNIE, {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<|begin_of_sentence|>",
                                "sep_token": "<|end_of_sentence|>", "pad_token": "<unk>", "unk_token": "<unk>"}),
    "deepseek-r1": ("bytes", DEEPSEEK_R1, {"bos_token": "<｜begin▁of▁sentence｜>",
                                           "eos_token": "<｜end▁of▁sentence｜>"}),
    "ernie-thinking": ("pieces", ERNIE_THINKING, {"bos_token": "<s>", "eos_token": "</s>"}),
    "llama3": ("bytes", LLAMA3, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
    "mistral": ("prefix", MISTRAL, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "qwen2": ("bytes", QWEN2, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
    "qwen3": ("bytes", QWEN3, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
}  # fmt: skip


def write_family(name: str, directory: Path, *, where: str = "jinja") -> Path:
    """A tokenizer directory as the family publishes it; the template in a file of its own, or in the config."""
    kind, template, config = FAMILIES[name]
    text = {"bytes": _byte_level, "pieces": lambda: _pieces(False), "prefix": lambda: _pieces(True)}[kind]()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    if where == "jinja":
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    elif where == "config":
        config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


@dataclass
class Numbers:
    prompt_tokens: int = 0
    reused_tokens: int = 0
    prefill_seconds: float = 0.0
    new_tokens: int = 0
    decode_seconds: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Held:
    """How likely a token was, and others at its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass
class Played:
    """One scripted reply."""

    engine: "ScriptedEngine"
    prompt: list[int]
    tokens: list[int]
    max_tokens: int | None
    stop_ids: frozenset[int]
    finish_reason: str | None = None
    stats: Numbers = field(default_factory=Numbers)
    constraint: Any = None
    alternatives: int | None = None
    logprobs: list[Held] = field(default_factory=list)
    prefilled: int = 0

    def __post_init__(self) -> None:
        self._work = self._play()

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        return next(self._work)

    def close(self) -> None:
        self._work.close()
        self.finish_reason = self.finish_reason or "cancelled"

    def _play(self) -> Iterator[int]:
        engine = self.engine
        shared = 0
        for mine, theirs in zip(engine.cached_ids, self.prompt[:-1], strict=False):
            if mine != theirs:
                break
            shared += 1
        self.stats.prompt_tokens, self.stats.reused_tokens = len(self.prompt), shared
        engine.cached_ids = list(self.prompt)
        self.prefilled = len(self.prompt)
        for token in self.tokens:
            if token == engine.INTERRUPT:
                raise KeyboardInterrupt
            if token in self.stop_ids:
                self.finish_reason = "stop"
                return
            self.stats.new_tokens += 1
            if self.constraint is not None:
                self.constraint.push(token)
            if self.alternatives is not None:
                self.logprobs.append(Held(token, -0.5, tuple((65 + n, -1.0 - n) for n in range(self.alternatives))))
            yield token
            if self.max_tokens is not None and self.stats.new_tokens >= self.max_tokens:
                self.finish_reason = "length"
            elif len(engine.cached_ids) >= engine.context:
                self.finish_reason = "context"
            if self.finish_reason:
                return
            engine.cached_ids.append(token)
        self.finish_reason = "loop"


@dataclass(frozen=True)
class Vocabulary:
    vocab: int = 100_000


@dataclass
class ScriptedEngine:
    """The engine interface, with a cache of ids that behaves as the real one's; replies are played from a script.

    A reply in the script is a list of ids, or a function that makes one from the prompt. A reply that ends without
    a stop id has the finish_reason "loop"; INTERRUPT in it is a Ctrl-C.
    """

    INTERRUPT = -1
    source: Path
    context: int = 4096
    script: list[list[int] | Callable[[list[int]], list[int]]] = field(default_factory=list)
    cached_ids: list[int] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    config: Vocabulary = field(default_factory=Vocabulary)
    generation_defaults: dict[str, Any] = field(default_factory=dict)
    played: list[Played] = field(default_factory=list)

    def snapshot(self, path: Path) -> None:
        path.write_text(json.dumps(self.cached_ids))

    def restore(self, path: Path) -> int:
        try:
            self.cached_ids = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise SnapshotError(f"{path}: no snapshot") from error
        return len(self.cached_ids)

    def generate(
        self,
        ids: Sequence[int],
        *,
        max_tokens: int | None = None,
        sampling: object = None,
        stop_ids: Collection[int] = (),
        loop_guard: bool = True,
        constraint: Any = None,
        logprobs: int | None = None,
    ) -> Played:
        self.prompts.append(list(ids))
        reply = self.script.pop(0)
        tokens = reply if isinstance(reply, list) else reply(list(ids))
        played = Played(self, list(ids), tokens, max_tokens, frozenset(stop_ids))
        played.constraint, played.alternatives = constraint, logprobs
        self.played.append(played)
        return played
