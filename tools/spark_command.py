"""A qrun command in parts, what people call the parts, and invented models to put in it.

Knows qrun's command line; the questions that lead to a command are made by `spark_compose`.
"""

import random
import re
from dataclasses import dataclass

from spark_grammar import expand

WEIGHTS = {
    "--wint4": "{4 bit|4 bits|4-bit|int4|wint4|4-bit weights|4 bit weights|int4 weights|--wint4|four bits}",
    "--wint8": "{8 bit|8 bits|8-bit|int8|wint8|8-bit weights|8 bit weights|int8 weights|--wint8|eight bits}",
    "--fp8": "{fp8|fp8 weights|float8|--fp8|8-bit floats|block fp8}",
    "--quant nf4": "{nf4|nf4 weights|the nf4 format|normal float 4}",
    "--quant mxfp4": "{mxfp4|mxfp4 weights}",
    "--quant nvfp4": "{nvfp4|nvfp4 weights}",
    "--quant w8a8": "{w8a8|8-bit weights and activations|int8 weights and activations}",
    "--quant W4@channel": "{fastdeploy's int4|W4@channel|channel-wise int4|fastdeploy's 4-bit scheme}",
    "--quant W4g32": "{4 bits in groups of 32|W4g32|group size 32}",
    "--quant W4g128": "{4 bits in groups of 128|W4g128|group size 128}",
    "--quant W4A16C8": "{W4A16C8|w4a16c8|the recipe W4A16C8}",
    "--quant W8A8C8": "{W8A8C8|w8a8c8|the recipe W8A8C8}",
    "--quant mix:experts=w4,dense=w8": "{4-bit experts and 8-bit dense layers|a mix of 4 and 8 bits|experts in 4 "
    "bits and dense in 8 bits}",
    "--quant bf16": "{bf16|bfloat16|full precision|16 bits|16 bit}",
}
KV = {
    "int8": "{an int8 cache|an 8-bit cache|int8 kv|8-bit kv|an 8 bit kv cache|kv int8|--kv int8|int8 kv cache}",
    "int4": "{an int4 cache|a 4-bit cache|int4 kv|4-bit kv|a 4 bit kv cache|kv int4|--kv int4|int4 kv cache}",
    "fp8": "{an fp8 cache|fp8 kv|kv fp8|--kv fp8}",
    "k8v4": "{k8v4|a k8v4 cache|kv k8v4|8-bit keys and 4-bit values}",
}
SAID = {
    "--wint4": "4-bit weights",
    "--wint8": "8-bit weights",
    "--fp8": "fp8 weights",
    "--quant bf16": "16-bit weights",
}
ALIASES = {
    "ernie": "{ernie|ernie 4.5|ERNIE-4.5}",
    "ernie:0.3b": "{ernie 0.3b|the 0.3b ernie|ernie:0.3b|ERNIE 0.3B|the small ernie|ernie 0.3 b}",
    "ernie:21b": "{ernie 21b|the 21b ernie|ernie:21b|ERNIE 21B|ernie 21 b|the 21b model}",
    "ernie:21b-thinking": "{the thinking ernie|ernie 21b thinking|ernie:21b-thinking|the 21b thinking model}",
    "ernie:300b": "{ernie 300b|the 300b ernie|ernie:300b|the largest ernie|the big ernie}",
    "qwen3:0.6b": "{qwen3 0.6b|qwen3:0.6b|the 0.6b qwen3|qwen 0.6b}",
}
_WORDS = [
    "llama", "mistral", "qwen", "qwen2", "qwen3", "ernie", "base", "chat", "instruct", "small", "big", "tiny",
    "mini", "test", "new", "old", "my", "best", "lab", "demo", "code", "moe", "a", "b", "v2", "v3", "run",
    "out", "final", "math",
    "story", "news", "data", "work", "home", "alpha", "beta", "fox", "owl", "river", "stone", "blue", "red", "seven",
    "x1", "z3", "k9", "7b", "8b", "1b", "3b", "14b",
]  # fmt: skip
_REAL = (
    "Llama-3.2-1B", "llama-3.1-8b", "Qwen3-0.6B", "Qwen3-8B", "qwen2.5-7b", "ERNIE-4.5-0.3B-PT",
    "ERNIE-4.5-21B-A3B-PT", "Mistral-7B-v0.3",
    "mistral-7b", "Qwen3-30B-A3B", "llama3", "tiny-random", "model", "checkpoint-500", "ernie-0.3b", "qwen3-4b",
    "Llama-3.2-3B-Instruct", "m1",
)  # fmt: skip
_ROOTS = ("~/models/", "/data/", "./", "models/", "~/", "/mnt/models/", "checkpoints/", "/home/me/", "../",
"/models/", "~/llm/", "/srv/", "/opt/", "/tmp/",
          "~/Downloads/", "./checkpoints/", "/opt/models/")  # fmt: skip
CONTEXTS = ("2k", "4k", "8k", "16k", "32k", "64k", "128k")
PROMPTS = (
    "Say hello", "Tell me a joke", "What is a token?", "Write a poem", "Who are you?", "Name three colours",
    "Explain quantization",
    "Why is the sky blue?", "Summarise this", "Translate to French", "List five animals", "Hello", "What is qrun?",
    "Count to ten",
)  # fmt: skip


@dataclass(frozen=True)
class Command:
    """A qrun command in parts; `text` writes it with the flags in one fixed order."""

    verb: str = "chat"
    model: str = ""
    weights: str = ""
    kv: str = ""
    ctx: str = ""
    temp: str = ""
    seed: str = ""
    device: str = ""
    prompt: str = ""

    @property
    def text(self) -> str:
        """The command line."""
        parts = ["qrun", self.verb, self.model, self.weights]
        named = (
            ("--kv", self.kv),
            ("-c", self.ctx),
            ("--temp", self.temp),
            ("--seed", self.seed),
            ("--device", self.device),
        )
        parts += [f"{flag} {value}" for flag, value in named if value]
        parts += [f'-p "{self.prompt}"'] if self.prompt else []
        return " ".join(p for p in parts if p)


def parse(example: str) -> Command | None:
    """Return the command written in an example when it is one that follow-ups can change."""
    found = re.fullmatch(
        r"qrun (chat|bench|eval)( [\w:~./]+)?( --wint[48]| --fp8| --quant \S+)?( --kv \w+)?( -c "
        r"\w+)?",
        example,
    )
    if not found:
        return None
    verb, model, weights, kv, ctx = ((g or "").strip() for g in found.groups())
    return Command(verb, model, weights, kv.removeprefix("--kv "), ctx.removeprefix("-c "))


def _wild_path(rng: random.Random) -> str:
    """A directory of letters and digits that can only be copied, not guessed."""

    def letters() -> str:
        return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randrange(2, 7)))

    def piece() -> str:
        words = (rng.choice(_WORDS), letters(), letters().capitalize())
        return rng.choice((*words, str(rng.randrange(100)), f"{rng.randrange(10)}.{rng.randrange(10)}"))

    name = rng.choice("-_-.").join(piece() for _ in range(rng.randrange(1, 5)))
    return rng.choice((rng.choice(_ROOTS), f"~/{letters()}/", f"/{letters()}/{rng.choice(_WORDS)}/")) + name


def path(rng: random.Random, *, wild: bool = False) -> str:
    """An invented checkpoint directory."""
    if wild and rng.random() < 0.7:
        return _wild_path(rng)
    draw = rng.random()
    if draw < 0.3:
        name = rng.choice(_REAL)
    elif draw < 0.45:
        name = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randrange(2, 8))) + rng.choice(
            ("", "", "-7b", "2", "_v1")
        )
    else:
        name = rng.choice(("-", "_", "-")).join(rng.sample(_WORDS, rng.choice((1, 1, 2, 2, 3))))
    return rng.choice(_ROOTS) + name


def pick_model(rng: random.Random, *, wild: bool = False) -> tuple[str, str]:
    """A model as (what the command says, how a person says it)."""
    draw = rng.random()
    if draw < 0.45:
        where = path(rng, wild=wild)
        kind = rng.choice(
            (
                "my model",
                "the model",
                "a model",
                "the checkpoint",
                "my llama",
                "my qwen",
                "a qwen3",
                "my mistral",
                "my ernie",
                "the llama",
            )
        )
        return where, rng.choice(
            (where, f"{kind} in {where}", f"{kind} at {where}", f"{kind} from {where}", f"the directory {where}")
        )
    if draw < 0.53:
        name = f"{rng.choice(_WORDS)}{rng.choice(('', 'lab', 'ai'))}/{'-'.join(rng.sample(_WORDS, 2))}"
        return name, rng.choice((name, f"{name} from the hub", f"the hub model {name}"))
    if draw < 0.60:
        return "DIR", rng.choice(("my model", "my own model", "a model", "my checkpoint"))
    alias = rng.choice(list(ALIASES))
    return alias, expand(rng, ALIASES[alias])


def describe(command: Command) -> str:
    """Say in words what a command does."""
    model = command.model or "the embedded model"
    start = {
        "chat": f"It starts a chat with {model}", "generate": f"It writes one answer with {model}",
        "bench": f"It measures the speed of {model}", "eval": f"It measures the quality of {model}",
    }[command.verb]  # fmt: skip
    parts = [SAID.get(command.weights, command.weights.removeprefix("--quant ")) if command.weights else ""]
    parts += [f"a cache in {command.kv}" if command.kv else "", f"a context of {command.ctx}" if command.ctx else ""]
    parts += [f"temperature {command.temp}" if command.temp else "", f"seed {command.seed}" if command.seed else ""]
    parts = [p for p in parts if p]
    listed = ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1] if parts else ""
    return start + (f", with {listed}" if listed else "") + (", on the CPU." if command.device else ".")
