"""What only `generate` has: where prompts come from, how many at once, how answers are written. Knows no model."""

import dataclasses
from typing import Annotated, Any

import typer

from qrun.cli import prompt_cache
from qrun.cli.options import OUTPUT_PANEL
from qrun.cli.spread import Rival
from qrun.errors import UsageError
from qrun.logprobs import MOST

PROMPT_PANEL = "Prompt"
MANY_PANEL = "Many prompts, many answers"
FORM = Rival("form")


def _option(*names: str, panel: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, metavar=metavar, help=help, rich_help_panel=panel)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScriptOptions:
    """Where prompts come from, how many at once, how answers are written."""

    prompt: Annotated[
        str | None, _option("-p", "--prompt", metavar="TEXT", help="The prompt; - is stdin.", panel=PROMPT_PANEL)
    ] = None
    file: Annotated[
        list[str] | None, _option("-f", "--file", metavar="FILE", help="Read it from a file.", panel=PROMPT_PANEL)
    ] = None
    raw: Annotated[
        bool, _option("--raw", help="Continue the prompt as it is, no chat template.", panel=PROMPT_PANEL)
    ] = False
    prompt_cache: Annotated[
        str | None,
        _option(
            "--prompt-cache",
            metavar="FILE",
            help="Keep what was read of the prompt here; a later one that begins the same is read from there on.",
            panel=PROMPT_PANEL,
        ),
    ] = None
    batch: Annotated[
        str | None,
        _option(
            "--batch",
            metavar="FILE",
            help="Answer a file (- is stdin) with a prompt a line, or with requests as for --jsonl, several at once. "
            "Writes a JSON object a line, in the same order.",
            panel=MANY_PANEL,
        ),
        FORM,
    ] = None
    parallel: Annotated[
        int | None,
        _option("--parallel", metavar="N", help="How many of a batch run at once.", panel=MANY_PANEL),
    ] = None
    jsonl: Annotated[
        bool,
        _option(
            "--jsonl",
            help='Stay, and answer requests: {"id": 1, "prompt": "Hello"} and the like, a line each on stdin; events, '
            "a JSON object a line, on stdout.",
            panel=MANY_PANEL,
        ),
        FORM,
    ] = False
    candidates: Annotated[
        int | None,
        _option(
            "--candidates",
            metavar="N",
            help="N answers to the prompt, with seeds from --seed on: a line of --- between them, or a list in --json.",
            panel=MANY_PANEL,
        ),
    ] = None
    json: Annotated[
        bool,
        _option(
            "--json",
            help="Print one JSON object: text, finish_reason, usage, timings, seed, model, recipe.",
            panel=OUTPUT_PANEL,
        ),
        FORM,
    ] = False
    logprobs: Annotated[
        int | None,
        _option(
            "--logprobs",
            metavar="N",
            help="Add each token's log-probability, and the N likeliest ones there, to the JSON.",
            panel=OUTPUT_PANEL,
        ),
    ] = None

    def check(self, system: str | None) -> None:
        """Refuse impossible values and contradictions before a model is loaded.

        Raises:
            UsageError: an option is out of range, needs another, or contradicts it.
        """
        forms = {"--batch": self.batch is not None, "--jsonl": self.jsonl, "--json": self.json}
        given = [name for name, asked in forms.items() if asked]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} contradict each other: give one of them")
        many = given[0] if given and given[0] != "--json" else None
        single = {"--prompt": self.prompt, "--file": self.file, "--candidates": self.candidates}
        for name, value in single.items():
            if many and value is not None:
                raise UsageError(f"{many} and {name} contradict each other: prompts come a line each")
        if self.parallel is not None and self.batch is None:
            raise UsageError("--parallel needs --batch: there is nothing else to run together")
        if self.logprobs is not None and not given:
            raise UsageError("--logprobs needs --json, --jsonl or --batch: there is no place for them in a text")
        if self.prompt_cache is not None and (self.batch is not None or self.candidates is not None):
            raise UsageError("--prompt-cache is for one conversation: do without it in --batch and with --candidates")
        for name, value in {"--parallel": self.parallel, "--candidates": self.candidates}.items():
            if value is not None and value < 1:
                raise UsageError(f"{name} {value} is impossible: give 1 or more")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST:
            raise UsageError(f"--logprobs {self.logprobs} is impossible: give 0 to {MOST}")
        if self.raw and system:
            raise UsageError("--system and --raw contradict each other: raw text has no roles")
        if self.prompt_cache is not None:
            prompt_cache.check(self.prompt_cache)
