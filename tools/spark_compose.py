"""Questions whose answer is a command put together from parts: verb, model, precision, cache, context and so on.

Knows how a command is asked for; the follow-ups change one part of the command that was said before.
"""

import random
from dataclasses import replace

from spark_command import CONTEXTS, KV, PROMPTS, WEIGHTS, Command, describe, pick_model
from spark_grammar import expand

_VERBS = {
    "chat": "{chat with|chat with|talk to|run|use|start|load|open|try|launch|have a chat with}",
    "generate": "{generate text with|get one answer from|generate with|run one prompt on|ask one question to|use "
    "generate with}",
    "bench": "{benchmark|bench|measure the speed of|test the speed of|see how fast i can run|time}",
    "eval": "{evaluate|measure the quality of|test the quality of|eval|measure the perplexity of|check the quality of}",
}


def _modifiers(rng: random.Random, command: Command) -> str:
    said: list[str] = []
    if command.weights:
        said.append(rng.choice(("in ", "with ", "with ", "as ", "using ")) + expand(rng, WEIGHTS[command.weights]))
    if command.kv:
        said.append("with " + expand(rng, KV[command.kv]))
    if command.ctx:
        said.append(
            "with "
            + rng.choice(
                ("a {} context", "{} context", "a context of {}", "{} tokens of context", "context {}")
            ).format(command.ctx)
        )
    if command.temp:
        said.append(
            rng.choice(("with temperature {}", "at temperature {}", "with temp {}", "with a temperature of {}")).format(
                command.temp
            )
        )
    if command.seed:
        said.append(rng.choice(("with seed {}", "with the seed {}", "using seed {}")).format(command.seed))
    if command.device:
        said.append(rng.choice(("on the cpu", "on cpu", "on my cpu", "on the processor")))
    rng.shuffle(said)
    text = ""
    for i, part in enumerate(said):
        if i:
            part = part.removeprefix("with ") if rng.random() < 0.5 else part
            text += rng.choice((" and ", ", ", " ", " and "))
        else:
            text += " "
        text += part
    return text


def compose(rng: random.Random, *, wild: bool = False) -> tuple[str, str, Command]:
    """A question for a command, its answer, and the command."""
    verb = rng.choices(("chat", "generate", "bench", "eval"), (70, 12, 10, 8))[0]
    model, said = pick_model(rng, wild=wild)
    command = Command(verb, model)
    if rng.random() < 0.72:
        options = list(WEIGHTS)
        command = replace(command, weights=rng.choices(options, [30, 20, 10] + [3] * (len(options) - 3))[0])
    extras: dict[str, str] = {}
    if rng.random() < 0.35 and command.weights not in ("--quant W4A16C8", "--quant W8A8C8"):
        extras["kv"] = rng.choice(list(KV))
    if rng.random() < 0.22:
        extras["ctx"] = rng.choice(CONTEXTS)
    if verb in ("chat", "generate") and rng.random() < 0.15:
        extras["temp"] = rng.choice(("0", "0.2", "0.5", "0.7", "1", "0.9", "0.3"))
    if verb in ("chat", "generate") and rng.random() < 0.08:
        extras["seed"] = str(rng.randrange(1, 100))
    if rng.random() < 0.10:
        extras["device"] = "cpu"
    command = replace(command, **extras)
    quoted = ""
    if verb == "generate":
        command = replace(command, prompt=rng.choice(PROMPTS))
        if rng.random() < 0.6:
            quoted = rng.choice((' with the prompt "{}"', ' and the prompt "{}"', ', prompt "{}"')).format(
                command.prompt
            )
        else:
            command = replace(command, prompt="your prompt")
    ask = f"{expand(rng, _VERBS[verb])} {said}{_modifiers(rng, command)}{quoted}"
    draw = rng.random()
    if draw < 0.62:
        ask = f"{expand(rng, '$how')} {ask}"
    elif draw < 0.75:
        ask = (
            rng.choice(
                ("what is the command to ", "command to ", "give me the command to ", "which command do i need to ")
            )
            + ask
        )
    return ask, f"Run `{command.text}`.", command


_AND = "{and|what about|how about|now|and now|the same|same|ok, and|but}"


def follow_up(rng: random.Random, command: Command, *, wild: bool = False) -> tuple[str, str, Command]:
    """A question that changes one part of `command`, its answer, and the new command."""
    kind = rng.choices(
        ("weights", "kv", "ctx", "smaller", "cpu", "model", "verb", "explain", "temp"), (20, 14, 9, 18, 9, 13, 8, 12, 5)
    )[0]
    new = command
    if kind == "explain":
        ask = (
            "{what does that do|what does this do|what does it do|explain the command|explain that|"
            "what does the command do|what will happen|explain this command}"
        )
        return expand(rng, ask), describe(command), command
    if kind == "smaller":
        ask = expand(
            rng,
            "{how do i|can i|how can i|i want to} {make it|make that|get it} {smaller|even smaller|use "
            "less memory|fit|fit in less memory|lighter}",
        )
        if rng.random() < 0.2:
            ask = rng.choice(
                (
                    "it does not fit",
                    "that is too big",
                    "it is too big for my machine",
                    "i do not have enough memory for that",
                    "smaller please",
                )
            )
        if command.weights != "--wint4" and not command.weights.startswith("--quant"):
            new = replace(command, weights="--wint4")
            return ask, f"Use 4-bit weights: `{new.text}`.", new
        if command.kv != "int4" and "C8" not in command.weights:
            new = replace(command, kv="int4")
            return ask, f"Make the cache smaller too: `{new.text}`.", new
        new = replace(command, ctx="4k")
        return ask, f"A small context helps too: `{new.text}`.", new
    if kind == "cpu":
        ask = expand(rng, f"{_AND} {{on the cpu|on cpu|on my cpu|without a gpu|on the processor|with no gpu}}")
        new = replace(command, device="cpu")
        return ask, f"Add `--device cpu`: `{new.text}`. The CPU is the only backend in this release anyway.", new
    if kind == "weights":
        new = replace(command, weights=rng.choices(list(WEIGHTS), [25, 22, 14] + [3] * (len(WEIGHTS) - 3))[0])
        if "C8" in new.weights:
            new = replace(new, kv="")
        ask = expand(rng, f"{_AND} {{in|with|as|using}} {WEIGHTS[new.weights]}")
    elif kind == "kv":
        new = replace(command, kv=rng.choice(list(KV)))
        if "C8" in new.weights:
            new = replace(new, weights="--wint4")
        ask = expand(rng, f"{_AND} {{with|with|using}} {KV[new.kv]}")
    elif kind == "ctx":
        new = replace(command, ctx=rng.choice(CONTEXTS))
        ask = expand(
            rng, f"{_AND} with {{a {new.ctx} context|{new.ctx} context|{new.ctx} tokens|a context of {new.ctx}}}"
        )
    elif kind == "temp" and command.verb in ("chat", "generate"):
        new = replace(command, temp=rng.choice(("0", "0.2", "0.5", "0.7", "1")))
        ask = expand(rng, f"{_AND} {{with|at}} {{temperature|temp}} {new.temp}")
    elif kind == "verb":
        new = replace(command, verb=rng.choice(("chat", "bench", "eval")), prompt="", temp="", seed="")
        does = {
            "chat": "{chat with|talk to}",
            "bench": "{benchmark|bench|measure the speed of}",
            "eval": "{evaluate|measure the quality of|eval}",
        }
        ask = expand(rng, "$how " + does[new.verb] + " {it|that}")
    else:
        model, said = pick_model(rng, wild=wild)
        new = replace(command, model=model)
        ask = expand(rng, f"{_AND} {{for|with}} ") + " " + said
        if "/" in model and rng.random() < 0.4:
            ask = (
                expand(rng, "{my model is in|the model is in|it is in|the directory is|my directory is|the path is}")
                + " "
                + model
            )
    return ask, f"Run `{new.text}`.", new
