"""The command line on an engine that plays a script: in this process, or as a program of its own for real terminals.

python tests/cli_doubles.py chat        # qrun chat, with answers that need no model and no torch
"""

import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from text_doubles import Played, ScriptedEngine, write_family

from qrun.errors import DoesNotFitError, ModelNotFoundError, StrictError
from qrun.recipe import Recipe
from qrun.runcard import RoleLine, RunCard
from qrun.tokenizer import Tokenizer


@dataclass(frozen=True)
class Bound:
    """A binding of the run card, without torch."""

    op: str
    scheme: str
    kernel: str
    fallback: bool


MARKDOWN = """\
# A heading
Some **bold text**, `code` and a [link](https://qrun.example/a_b) in a line that is long enough to be broken once.

- first *item*
- second item, which goes on and on until the edge of the terminal makes it go on below
```python
def main():
    return "a string"  # a comment
```
| name | size |
|------|-----:|
| 中文 | 12 |

> quoted 2 * 3 * 4
"""

CARD = RunCard(
    model="double",
    family="ernie4_5",
    parameters=5_100_000,
    active_parameters=2_000_000,
    recipe="W4A16C16",
    roles=[RoleLine("dense", "int4 g64", 8, 2_000_000), RoleLine("lm_head", "int8 channel", 1, 500_000)],
    activations="16",
    kv="bf16",
    kv_bytes_per_token=2560,
    context=4096,
    backend="cpu",
    device="CPU, 2 threads",
    bindings=[Bound("qkv", "int4 g64", "numba int4 dot", False), Bound("o", "nf4 g64", "torch", True)],
    weight_bytes=2_500_000,
    predicted_peak=600_000_000,
    measured_peak=450_000_000,
    load_seconds=1.25,
    quantize_seconds=0.5,
    from_store=False,
)


@dataclass
class PlayedWords(Played):
    """A reply with a pause before each token, and a time that its prompt takes to read, in seconds."""

    pause: float = 0.0
    reading: float = 0.0

    def __next__(self) -> int:
        if self.reading and not self.prefilled:
            while self.prefilled < len(self.prompt):
                self.prefilled += 1
                time.sleep(self.reading / len(self.prompt))
        time.sleep(self.pause)
        return super().__next__()


@dataclass
class WordEngine(ScriptedEngine):
    """Answers a prompt by what stands in it.

    `long` goes on for minutes, `escape` sends one, `think` reasons first, `markdown` is formatted, `novel` takes two
    seconds to be read; what stands behind `verbatim ` is the answer.
    """

    card: RunCard = CARD
    recipe: Recipe = field(default_factory=Recipe.parse)
    loaded_with: dict[str, Any] = field(default_factory=dict)
    chosen: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokenizer = Tokenizer.from_dir(self.source)

    def set_kv(self, kv: str) -> None:
        self.recipe = self.recipe.with_kv(kv)
        self.card = replace(self.card, kv=kv, kv_bytes_per_token=720)

    def generate(
        self,
        ids: Sequence[int],
        *,
        max_tokens: int | None = None,
        sampling: Any = None,
        stop_ids: Collection[int] = (),
        loop_guard: bool = True,
        constraint: Any = None,
        logprobs: int | None = None,
    ) -> Played:
        asked = self.tokenizer.decode(ids).rpartition("user\n")[2].removesuffix("\nassistant\n")
        answer, pause, reading = f"You said: {asked}", 0.0, 0.0
        if "long" in asked:
            answer, pause = "word " * 20_000, 0.01
        elif "flood" in asked:
            answer = "flood " * 20_000
        elif "escape" in asked:
            answer = "\x1b[31mred\x07\r\x9b2J"
        elif "markdown" in asked:
            answer, pause = MARKDOWN, 0.004
        elif "novel" in asked:
            answer, reading = "read", 2.0
        elif "verbatim " in asked:
            answer = asked.partition("verbatim ")[2]
        elif "think" in asked:
            answer = "<think>hm</think>done"
        self.chosen.append(sampling)
        tokens = [*self.tokenizer.encode(answer, special=False), next(iter(stop_ids))]
        self.prompts.append(list(ids))
        played = PlayedWords(self, list(ids), tokens, max_tokens, frozenset(stop_ids), pause=pause, reading=reading)
        played.constraint, played.alternatives = constraint, logprobs
        played.stats.seed = 7 if sampling is None or sampling.seed is None else sampling.seed
        self.played.append(played)
        return played


def load(model: str, *, quant: Recipe, progress: Any = None, **options: Any) -> WordEngine:
    """Stand in for `qrun.load`; some model names are errors."""
    errors = {"nosuch": ModelNotFoundError, "toobig": DoesNotFitError, "slow": StrictError, "bug": KeyError}
    if model in errors:
        raise errors[model](f"{model}: no.\nSecond \x1b[31mline")
    if model == "sleepy":
        print("asleep", file=sys.stderr, flush=True)
        time.sleep(60)
    progress("loading", 1, 2)
    folder = Path(tempfile.mkdtemp(prefix="qrun-test-"))
    engine = WordEngine(write_family("qwen3", folder), context=4096)
    engine.card = replace(CARD, model=model, recipe=quant.label)
    engine.recipe, engine.loaded_with = quant, {"quant": quant, **options}
    return engine


if __name__ == "__main__":
    import qrun

    setattr(qrun, "load", load)  # noqa: B010 - a name the package makes on demand
    from qrun.cli.main import run

    run()
