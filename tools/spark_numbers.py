"""Questions about numbers: small sums, units, and how much memory a model or a cache needs.

Everything is computed here, so it is true; the ranges are small enough for a model of 5 M parameters.
"""

import random
from dataclasses import dataclass

from spark_grammar import expand

SIZES = ("0.3", "0.5", "0.6", "1", "1.5", "2", "3", "4", "7", "8", "13", "14", "21", "32", "70", "300")
BUDGETS = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)
BYTES = {"BF16": 2.0, "wint8": 1.0, "fp8": 1.0, "wint4": 0.55}
_NAMED = {
    "BF16": "{bf16|BF16|16 bits|full precision}",
    "wint8": "{wint8|8 bits|int8|8 bit}",
    "fp8": "{fp8|FP8}",
    "wint4": "{wint4|4 bits|int4|4 bit|4-bit}",
}
_KIB = {"ERNIE 0.3B": 18, "ERNIE 21B": 56}
_KV_BITS = {"BF16": 16.0, "int8": 8.5, "k8v4": 6.5, "int4": 4.5}


@dataclass(frozen=True)
class Size:
    """A model size in billions that the dialogue is about."""

    billions: str


def short(value: float) -> str:
    """Two significant digits, without a useless point."""
    if value >= 10:
        return str(round(value))
    return f"{value:.1f}".removesuffix(".0") if value >= 1 else f"{value:.2f}".rstrip("0")


def arithmetic(rng: random.Random) -> tuple[str, str]:
    """A small sum; a larger one is declined."""
    kind, draw = rng.choices("+-*", (55, 25, 20))[0], rng.random()
    if draw < 0.12:
        a, b = (
            rng.choice((rng.randrange(21, 100), rng.randrange(100, 5000))),
            rng.choice((rng.randrange(21, 100), rng.randrange(100, 5000))),
        )
    elif kind == "*":
        a, b = rng.randrange(11), rng.randrange(11)
    elif kind == "-":
        b = rng.randrange(11)
        a = b + rng.randrange(11)
    elif draw < 0.2:
        a, b = 10 * rng.randrange(1, 10), 10 * rng.randrange(1, 10)
    else:
        top = 10 if draw < 0.7 else 20
        a, b = rng.randrange(top + 1), rng.randrange(top + 1)
    result = {"+": a + b, "-": a - b, "*": a * b}[kind]
    big = draw < 0.12
    word = {"+": "{+|+|+|plus|and}", "-": "{-|-|minus}", "*": "{*|x|times}"}[kind]
    tight = f"{a}{kind}{b}"
    draw = rng.random()
    if draw < 0.30:
        ask = f"{rng.choice(('what is ', 'whats ', 'calculate ', 'how much is ', 'compute ', 'what is '))}{tight}"
    elif draw < 0.45:
        ask = tight + rng.choice(("", "", " =", "="))
    elif draw < 0.55 and kind == "+":
        ask = rng.choice((f"add {a} and {b}", f"the sum of {a} and {b}", f"can you add {a} and {b}"))
    else:
        ask = expand(
            rng, f"{{what is|what's|how much is|calculate|compute|do you know what|can you tell me|}} {a} {word} {b}"
        )
    if big:
        return ask, "That is too hard for me. I only know small sums, such as 7 + 5 = 12."
    return ask, f"{a} {kind} {b} = {result}."


def memory(rng: random.Random, size: Size | None = None) -> tuple[str, str, Size]:
    """How much memory a model of some size needs with some weights; with `size`, a follow-up about it."""
    recipe = rng.choice(list(BYTES))
    said = expand(rng, _NAMED[recipe])
    if size:
        ask = expand(rng, f"{{and|what about|how about|and now}} {{in|with}} {said}")
    else:
        size = Size(rng.choice(SIZES))
        b = rng.choice((f"{size.billions}b", f"{size.billions}B", f"{size.billions} billion parameter"))
        ask = expand(rng, rng.choice((
            f"how much {{memory|ram|space}} {{does|will|would}} a {b} model {{need|use|take}} {{in|with}} {said}",
            f"how {{big|large}} is a {b} model {{in|with}} {said}", f"{{memory|ram|size}} {{of|for}} a {b} model "
                f"{{in|with}} {said}",
            f"a {b} model {{in|with}} {said} needs how much {{memory|ram}}",
            f"how many {{GB|gb|gigabytes}} is a {b} model {{in|with}} {said}",
        )))  # fmt: skip
    need = float(size.billions) * BYTES[recipe]
    return ask, f"A {size.billions}B model needs about {short(need)} GB with {recipe}, plus the KV cache.", size


def fits(rng: random.Random) -> tuple[str, str, Size]:
    """Whether a model fits in so many GB, and with which weights."""
    size, budget = Size(rng.choice(SIZES)), rng.choice(BUDGETS)
    b = rng.choice((f"{size.billions}b", f"{size.billions}B"))
    ask = expand(rng, rng.choice((
        f"{{does|will|can}} a {b} model fit {{in|into|on}} {budget} {{GB|gb}}",
        f"{{can i|is it possible to}} run a {b} model {{with|in|on}} {budget} {{GB|gb}}",
        f"i have {budget} {{GB|gb}}, {{does a {b} model fit|can i run a {b} model|will a {b} model fit}}",
        f"is {budget} {{GB|gb}} enough for a {b} model", f"{b} model {{in|on}} {budget} {{GB|gb}}",
    )))  # fmt: skip
    if size.billions == "21" and rng.random() < 0.5:
        ask = ask.replace("a 21b model", "ernie 21b").replace("a 21B model", "ERNIE 21B")
    for recipe, flag in (("BF16", ""), ("wint8", "--wint8"), ("wint4", "--wint4")):
        need = float(size.billions) * BYTES[recipe]
        if need < budget * 0.95:
            how = f"with `{flag}`" if flag else "even in BF16"
            return ask, f"Yes, {how}: about {short(need)} GB, plus the KV cache.", size
    need = float(size.billions) * BYTES["wint4"]
    return ask, f"No: even with `--wint4` it needs about {short(need)} GB.", size


def advise(rng: random.Random) -> tuple[str, str, str]:
    """Which model to run in so many GB: the question, the answer and the command."""
    budget = rng.choice((2, 4, 6, 8, 16, 24, 32, 48, 64, 128))
    ask = expand(rng, rng.choice((
        f"{{i have|my machine has|my laptop has|my computer has|there are}} {budget} {{GB|gb}}{{ of ram| of memory|"
        f"}}, {{what can i run|which model should i use|what should i use|which model fits}}",
        f"{{which|what}} model {{fits in|can i run in|can i run with|should i use with|for|runs in}} {budget} {{GB|"
        f"gb}}{{ of ram| of memory|}}",
        f"{{what can i run|which model should i run|which ernie fits|what fits|the best model}} {{with|in|on}} "
        f"{budget} {{GB|gb}}{{ of ram| of memory|}}",
    )))  # fmt: skip
    if budget < 16:
        command = "qrun chat ernie:0.3b"
        return ask, f"With {budget} GB run `{command}`. The 21B model needs about 12 GB.", command
    command = "qrun chat ernie:21b --wint4"
    return ask, f"With {budget} GB run `{command}`. It needs about 12 GB, plus the KV cache.", command


def kv_memory(rng: random.Random) -> tuple[str, str]:
    """The size of a KV cache."""
    model, kv, tokens = rng.choice(list(_KIB)), rng.choice(list(_KV_BITS)), rng.choice((4, 8, 16, 32, 128))
    mib = _KIB[model] * tokens * _KV_BITS[kv] / 16
    told = f"{short(mib / 1024)} GiB" if mib >= 1000 else f"{short(mib)} MiB"
    said = rng.choice((model, model.lower()))
    name = rng.choice((kv, kv.lower()))
    ask = rng.choice((
        f"how much memory does a {tokens}k context of {said} need in {name}",
        f"how big is the kv cache of {said} at {tokens}k in {name}",
        f"kv cache size of {said} with {tokens}k context and {name}", f"how large is a {tokens}k {name} cache for "
            f"{said}",
    ))  # fmt: skip
    bits = short(_KV_BITS[kv])
    return ask, f"About {told}: {model} keeps {_KIB[model]} KiB a token in BF16, and {kv} takes {bits} of 16 bits."


def units(rng: random.Random) -> tuple[str, str]:
    """Bits, bytes, and their multiples."""
    n = rng.choice((1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 20, 32, 64))
    how = "{how many|how many|what is the number of} "
    kind = rng.randrange(8)
    if kind == 0:
        return expand(
            rng, how + f"bits {{are in|are|is|in|has}} {n} byte{'s' * (n != 1)}"
        ), f"{n} byte{'s' * (n != 1)} = {8 * n} bits."
    if kind == 1:
        return expand(
            rng, how + f"bytes {{are|is|are in|in}} {8 * n} bits"
        ), f"{8 * n} bits = {n} byte{'s' * (n != 1)}."
    if kind in (2, 3):
        small, big = rng.choice((("MB", "GB"), ("KB", "MB"), ("GB", "TB"), ("MiB", "GiB"), ("KiB", "MiB")))
        factor = 1024 if "i" in big else 1000
        said = (small, big) if factor == 1024 or rng.random() < 0.5 else (small.lower(), big.lower())
        ask = rng.choice(
            (
                how + f"{said[0]} {{are in|are|is|in|has}} {n} {said[1]}",
                f"{{convert|what is}} {n} {said[1]} {{to|in}} {said[0]}",
                f"{n} {said[1]} in {said[0]}",
            )
        )
        return expand(rng, ask), f"{n} {big} = {n * factor} {small}."
    if kind == 4:
        name, zeros = rng.choice(
            (
                ("KB", "1,000"),
                ("MB", "1,000,000"),
                ("GB", "1,000,000,000"),
                ("KiB", "1,024"),
                ("MiB", "1,048,576"),
                ("GiB", "1,073,741,824"),
            )
        )
        said = name if "i" in name or rng.random() < 0.5 else name.lower()
        return expand(rng, how + f"bytes {{are in|are|is|in|has}} {{a|one|1}} {said}"), f"1 {name} = {zeros} bytes."
    if kind == 5:
        k = rng.choice((1, 2, 4, 8, 16, 32, 64, 128))
        return expand(
            rng,
            f"{{how many tokens {{is|are|are in}} {k}k|what does {k}k mean|{k}k tokens is how many|"
            f"how much is a context of {k}k|what is -c {k}k}}",
        ), f"{k}k = {k * 1024} tokens."
    if kind == 6:
        ask = (
            "{what is the difference between {GB and GiB|gb and gib|a GB and a GiB}|{GB or GiB|"
            "gb vs gib|GiB or GB}|what is a {GiB|gib}}"
        )
        return expand(rng, ask), "1 GB = 1000 MB, and 1 GiB = 1024 MiB. A GiB is about 7 percent larger."
    bits = rng.choice((1, 2, 3, 4, 5, 6, 8, 16, 32))
    said = f"{bits} bit{'s' * (bits != 1)}{{| a weight| per weight| each}}"
    ask = "{how many|how much} {GB|gb} {is|are|takes|needs} {a|one} billion {weights|parameters} {at|in|with} " + said
    return expand(
        rng, ask
    ), f"{bits} bit{'s' * (bits != 1)} a weight are {short(bits / 8) if bits != 1 else '0.125'} GB for each billion."
