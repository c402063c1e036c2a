"""A tiny text grammar: templates with alternatives, and the noise of people typing.

Knows strings and a random generator, nothing of qrun. `expand("{hi|hello} there")` picks one alternative; braces
nest, an empty alternative drops the part, and `$name` inserts a shared fragment from `FRAGMENTS`.
"""

import random
import re

FRAGMENTS = {
    "how": "{how do i|how do i|how can i|how to|how do you|how would i|how should i|what is the way to|what's the "
    "way to|"
    "tell me how to|show me how to|i want to|i would like to|i need to|can you tell me how to|can you show me how to|"
    "what do i type to|what is the command to|what's the best way to|is there a way to|can i|could i|help me|"
    "please show me how to|could you tell me how to|where do i|can you help me|what should i do to|how does one}",
    "what": "{what is|what is|what's|whats|what are|explain|tell me about|describe|define|can you explain|what do "
    "you know"
    " about|could you explain|give me a summary of|i do not understand|i don't understand|please explain}",
    "can": "{can i|can qrun|is it possible to|does qrun let me|is there a way to|am i able to|may i|can you|could i}",
    "does": "{does qrun|can qrun|will qrun|does this program|does it|can it}",
    "why": "{why|why is that|how come|what is the reason|why so|what for|and why|why would i}",
    "model": "{a model|my model|the model|a checkpoint|my checkpoint|an llm|a language model|models}",
    "run": "{run|start|use|launch|load|open|try}",
}

GREETINGS = ("hi, ", "hello, ", "hey, ", "hi! ", "hello! ", "hey spark, ", "spark, ", "ok, ", "ok so ", "so ", "um, ")
OPENERS = (
    "quick question: ", "question: ", "please, ", "i am new here, ", "i'm new to this, ", "sorry, ", "one more thing: ",
    "another question: ", "now ", "and ", "also, ", "next, ", "i was wondering, ", "just curious, ", "well, ",
)  # fmt: skip
CLOSERS = (
    " please",
    " thanks",
    ", please",
    " in qrun",
    " with qrun",
    " here",
    " for me",
    ", thank you",
    " then",
    " exactly",
)
_INNER = re.compile(r"\{([^{}]*)\}")
_NAME = re.compile(r"\$([a-z]+)")


def expand(rng: random.Random, template: str) -> str:
    """Return one random expansion of `template`."""
    text = _NAME.sub(lambda m: FRAGMENTS[m[1]], template)
    while True:
        text, hits = _INNER.subn(lambda m: rng.choice(m[1].split("|")), text)
        if not hits:
            return re.sub(r" {2,}", " ", text).strip()


def misspell(rng: random.Random, text: str) -> str:
    """Swap, drop, double or replace one letter inside a plain word; names, flags and numbers stay as they are."""
    words = text.split(" ")
    plain = [i for i, w in enumerate(words) if len(w) > 4 and w.isalpha() and w.islower()]
    if not plain:
        return text
    i = rng.choice(plain)
    word, at = words[i], rng.randrange(1, len(words[i]) - 1)
    kind = rng.randrange(4)
    if kind == 0:
        word = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    elif kind == 1:
        word = word[:at] + word[at + 1 :]
    elif kind == 2:
        word = word[:at] + word[at] + word[at:]
    else:
        word = word[:at] + rng.choice("aeioustrn") + word[at + 1 :]
    words[i] = word
    return " ".join(words)


def as_typed(rng: random.Random, question: str, *, mark: bool = True) -> str:
    """Dress a lower-case question the way different people type it: openers, capitals, punctuation, typos."""
    text = question
    draw = rng.random()
    if draw < 0.08:
        text = rng.choice(GREETINGS) + text
    elif draw < 0.15:
        text = rng.choice(OPENERS) + text
    if rng.random() < 0.07 and text[-1].isalpha():
        text += rng.choice(CLOSERS)
    if rng.random() < 0.10:
        text = misspell(rng, text)
    style = rng.random()
    if style < 0.50:
        text = text[0].upper() + text[1:]
        text = re.sub(r"\bi\b(?!/)", "I", text) if rng.random() < 0.9 else text
    elif style > 0.985:
        text = text.upper() if "--" not in text and "/" not in text and "`" not in text else text
    if text[-1] not in "?!.\"'`" and mark:
        asks = re.match(
            r"(?i)(.*, |.*: )?(how|what|whats|can|could|is|are|does|do|why|which|where|when|will|may|am|"
            r"who)\b",
            text,
        )
        if asks:
            text += "?" if rng.random() < 0.68 else ("??" if rng.random() < 0.03 else "")
        elif rng.random() < 0.45:
            text += "."
    return text
