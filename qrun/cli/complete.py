"""What the shell completes while a command is typed: models, recipes, cache formats. Lists directories, reads no file.

Knows the names there are, but not whether a model would load. `mended_words` undoes what bash does to them.
"""

import contextlib
import io
import os
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

from qrun.aliases import ALIASES, known_names

QUANTS = (
    ("auto", "16-bit weights, or as the checkpoint is quantized already"),
    ("bf16", "16-bit weights: nothing is quantized"),
    ("wint8", "8-bit weights: half the memory, hardly any loss"),
    ("wint4", "4-bit weights: about 3.6 times smaller"),
    ("fp8", "8-bit floating point in 128x128 blocks"),
    ("w8a8", "8-bit weights and activations"),
    ("nf4", "4-bit weights on a normal-distribution codebook"),
    ("mxfp4", "4-bit floating point, one power-of-two scale per 32"),
    ("nvfp4", "4-bit floating point, one fp8 scale per 16"),
    ("trellis", "2 bits each, 64 values by the neighbours' bits"),
)
KV_FORMATS = (
    ("bf16", "16-bit cache"),
    ("int8", "half the cache"),
    ("int4", "a quarter of the cache, rotated"),
    ("fp8", "8-bit floating point"),
    ("k8v4", "int8 keys, int4 values"),
)
SPARK = ("spark", "the model that ships with qrun")

Choices = list[tuple[str, str]]
"""What may stand there, each with a note that zsh and fish show."""


def quants(incomplete: str) -> Choices:
    """Complete a recipe, or the last one of a list with commas."""
    return [] if "mix:" in incomplete.lower() else _listed(QUANTS, incomplete)


def kvs(incomplete: str) -> Choices:
    """Complete a cache format, or the last one of a list with commas."""
    return _listed(KV_FORMATS, incomplete)


def models(incomplete: str) -> Choices:
    """Complete a model: spark, a short name, what the hub's cache holds, a directory with a `config.json`."""
    names = [SPARK, *((name, _meaning(name)) for name in known_names())]
    found = [choice for choice in (*names, *_cached()) if choice[0].startswith(incomplete)]
    return found + [(path, "a directory") for path in _directories(incomplete)]


def _listed(choices: Iterable[tuple[str, str]], incomplete: str) -> Choices:
    head, comma, last = incomplete.rpartition(",")
    return [(head + comma + name, note) for name, note in choices if name.startswith(last.lower())]


def _meaning(name: str) -> str:
    return ALIASES[name].repo if name in ALIASES else "the largest of its family that fits"


def _cached() -> Iterator[tuple[str, str]]:
    """The repositories in the hub's cache, where its variables put that; importing the hub's client takes too long."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    home = Path(os.environ.get("HF_HOME") or cache / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    for folder in sorted(hub.glob("models--*--*/snapshots")):
        yield "/".join(folder.parent.name.split("--")[1:]), "in the hub cache"


def _directories(incomplete: str) -> Iterator[str]:
    """The model directories that begin with what was typed, as it was typed."""
    place, slash, start = incomplete.rpartition("/")
    with contextlib.suppress(OSError, RuntimeError):  # no such place, or no home to expand
        for path in sorted(Path(place + slash or ".").expanduser().iterdir()):
            if path.name.startswith(start) and (path / "config.json").is_file():
                yield place + slash + path.name


@contextlib.contextmanager
def mended_words() -> Generator[None]:
    """Glue the words that bash broke at `:` and `=` while the body completes; its output gets what bash expects.

    Bash takes `qwen3:4` for three words, and replaces only the last of them.
    """
    broken, last = os.environ.get("COMP_WORDS", "").split("\n"), int(os.environ.get("COMP_CWORD") or 0)
    words: list[str] = []
    glue = False
    for word in broken[: last + 1]:
        mark = word in (":", "=")
        if words and (mark or glue):
            words[-1] += word
        else:
            words.append(word)
        glue = mark
    if len(broken) > 1:
        os.environ |= {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
    typed = words[-1]
    known = typed[: max(typed.rfind(":"), typed.rfind("=")) + 1]
    found = io.StringIO()
    try:
        with contextlib.redirect_stdout(found):
            yield
    finally:
        print("\n".join(line.removeprefix(known) for line in found.getvalue().splitlines()))
