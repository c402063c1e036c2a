"""How to pick tokens and when to stop: the options of `chat` and `generate`. Knows typer, not how a token is picked."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qrun.errors import UsageError

if TYPE_CHECKING:
    from qrun.sampler import Sampling

SAMPLING_PANEL = "Sampling and length"


def _sampling_option(*names: str, metavar: str, help: str) -> Any:
    return typer.Option(*names, metavar=metavar, help=help, rich_help_panel=SAMPLING_PANEL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How to pick tokens and when to stop. What is not given comes from the model's `generation_config.json`."""

    system: Annotated[
        str | None, _sampling_option("-s", "--system", metavar="TEXT", help="The system prompt: who the model is.")
    ] = None
    max_tokens: Annotated[
        int | None,
        _sampling_option("-n", "--max-tokens", metavar="N", help="Stop each answer after N tokens."),
    ] = None
    temp: Annotated[
        float | None,
        _sampling_option(
            "--temp", "--temperature", metavar="T", help="0 always takes the likeliest token; 1 is lively."
        ),
    ] = None
    top_k: Annotated[
        int | None, _sampling_option("--top-k", metavar="K", help="Choose among the K likeliest tokens; 0 is off.")
    ] = None
    top_p: Annotated[
        float | None,
        _sampling_option("--top-p", metavar="P", help="Choose among the likeliest tokens that sum to P; 1 is off."),
    ] = None
    min_p: Annotated[
        float | None,
        _sampling_option("--min-p", metavar="P", help="Drop tokens less likely than P times the best; 0 is off."),
    ] = None
    repeat_penalty: Annotated[
        float | None,
        _sampling_option("--repeat-penalty", metavar="X", help="Divide the logits of seen tokens by X; 1 is off."),
    ] = None
    presence_penalty: Annotated[
        float | None,
        _sampling_option("--presence-penalty", metavar="X", help="Subtract X from tokens already written; 0 is off."),
    ] = None
    frequency_penalty: Annotated[
        float | None,
        _sampling_option("--frequency-penalty", metavar="X", help="Subtract X for each time it was written; 0 is off."),
    ] = None
    seed: Annotated[
        int | None,
        _sampling_option(
            "--seed", metavar="N", help="Make the answer reproducible. Random when not given, and printed."
        ),
    ] = None
    stop: Annotated[
        list[str] | None,
        _sampling_option("--stop", metavar="TEXT", help="Stop before this text; may be given several times."),
    ] = None
    overflow: Annotated[
        Literal["stop", "roll"],
        typer.Option(
            "--overflow",
            help="When the context is full: stop, or roll on by forgetting the oldest turns.",
            rich_help_panel=SAMPLING_PANEL,
        ),
    ] = "stop"
    loop_guard: Annotated[
        bool,
        typer.Option(
            "--loop-guard/--no-loop-guard",
            help="Stop an answer that repeats itself without end.",
            rich_help_panel=SAMPLING_PANEL,
        ),
    ] = True
    think: Annotated[
        bool | None,
        typer.Option(
            "--think/--no-think",
            help="Ask a thinking model to reason first, or not to; its own habit when not given.",
            rich_help_panel=SAMPLING_PANEL,
        ),
    ] = None

    def overrides(self) -> dict[str, float | int]:
        """Return the sampling fields that were given, by their names in `qrun.sampler.Sampling`."""
        given = {
            "temperature": self.temp,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repeat_penalty": self.repeat_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "seed": self.seed,
        }
        return {name: value for name, value in given.items() if value is not None}

    def sampling(self, generation_config: Mapping[str, Any]) -> "Sampling":
        """Return the model's own sampling with the given options on top.

        Raises:
            UsageError: a value is impossible.
        """
        from qrun.sampler import Sampling

        return dataclasses.replace(Sampling.from_generation_config(generation_config), **self.overrides())

    def check(self) -> None:
        """Refuse impossible values before a model is loaded.

        Raises:
            UsageError: a value is out of range.
        """
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UsageError(f"--max-tokens {self.max_tokens} is impossible: give 1 or more")
        if self.stop and "" in self.stop:
            raise UsageError("--stop is empty: every text contains it")
        self.sampling({})
