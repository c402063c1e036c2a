"""Which model, at which precision, where: the options of every command. Knows typer, but neither torch nor a model.

They live in dataclasses; `qrun.cli.spread` turns those into a command's signature.
"""

import dataclasses
import re
from typing import Annotated, Any, Literal

import typer

from qrun.cli import complete
from qrun.cli.spread import Rival
from qrun.errors import UsageError
from qrun.recipe import Recipe

EMBEDDED = "spark"
"""The model that ships in the package, and the default of every command."""

MODEL_PANEL = "Model and precision"
OUTPUT_PANEL = "Output"


WEIGHTS = Rival("weights")
SUGAR = ("wint8", "wint4", "wint2", "fp8")
"""Recipes that have a flag of their own, which excludes --quant."""


def _sugar(name: str, note: str = "") -> Any:
    text = f"The same as --quant {name}{note}."
    return typer.Option(f"--{name}", help=text, envvar=[], rich_help_panel=MODEL_PANEL)


def parse_size(text: str) -> int:
    """Return the number of tokens that `text` names: `4096`, `32k` (times 1024) or `1m` (times 1024 squared).

    Raises:
        UsageError: the text is not a positive size.
    """
    match = re.fullmatch(r"(\d+)([km]?)", text.strip().lower())
    size = int(match[1]) * {"": 1, "k": 1024, "m": 1024**2}[match[2]] if match else 0
    if size < 1:
        raise UsageError(f"--ctx-size {text!r} is not a size: give tokens like 4096, 32k or 1m, or max")
    return size


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, at which precision, where."""

    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            autocompletion=complete.models,
            help="A checkpoint directory, a GGUF file, a name such as ernie or qwen3:0.6b, an org/name on the hub, or "
            "spark, the model that ships with qrun.",
        ),
    ] = EMBEDDED
    quant: Annotated[
        str | None,
        typer.Option(
            "--quant",
            metavar="RECIPE",
            autocompletion=complete.quants,
            help="Precision of weights, activations and cache: auto (the default: bf16, or as the checkpoint is "
            "quantized already), bf16, wint8, wint4, fp8, w8a8, nf4, mxfp4, nvfp4, trellis, W4A16C8, W4g32, or per "
            "role, as in mix:experts=w4,dense=w8.",
            rich_help_panel=MODEL_PANEL,
        ),
        WEIGHTS,
    ] = None
    wint8: Annotated[bool, _sugar("wint8"), WEIGHTS] = False
    wint4: Annotated[bool, _sugar("wint4"), WEIGHTS] = False
    wint2: Annotated[bool, _sugar("wint2", ": tiny, and poor"), WEIGHTS] = False
    fp8: Annotated[bool, _sugar("fp8"), WEIGHTS] = False
    kv: Annotated[
        str | None,
        typer.Option(
            "--kv",
            metavar="FORMAT",
            autocompletion=complete.kvs,
            help="Format of the KV cache: bf16, int8, int4, fp8, or keys and values apart, as in k8v4.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None
    ctx_size: Annotated[
        str | None,
        typer.Option(
            "-c",
            "--ctx-size",
            metavar="TOKENS",
            help="Length of the context: 4096, 32k, or max for all the model has.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None
    device: Annotated[
        Literal["auto", "cuda", "xpu", "cpu"],
        typer.Option(
            "--device",
            help="Where to run; auto is an NVIDIA GPU that can be used, else an Intel one, else the CPU.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = "auto"
    xpu_tier: Annotated[
        Literal["native", "ipex", "triton", "torch"] | None,
        typer.Option(
            "--xpu-tier",
            help="On an Intel GPU, whose kernels come first: torch's own (native), IPEX's, Triton's or none (torch). "
            "When not given, in this order, as far as they prove right.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None
    xpu_graph: Annotated[
        bool,
        typer.Option(
            "--xpu-graph",
            help="On an Intel GPU, record the decode step as a graph, where all of it runs on Triton's kernels.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = False
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads", metavar="N", help="CPU threads; every core when not given.", rich_help_panel=MODEL_PANEL
        ),
    ] = None
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Refuse to run any operation on a slower fallback kernel: exit code 5.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = False
    offline: Annotated[
        bool,
        typer.Option("--offline", help="Use only what is already on this machine.", rich_help_panel=MODEL_PANEL),
    ] = False
    cache: Annotated[
        bool,
        typer.Option(
            "--cache/--no-cache",
            help="Keep the quantized weights on disk, so that the next start need not quantize again.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = True
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Print nothing but text and errors.", rich_help_panel=OUTPUT_PANEL)
    ] = False
    verbose: Annotated[
        bool,
        typer.Option(
            "-v", "--verbose", help="Also say which kernel runs each operation.", rich_help_panel=OUTPUT_PANEL
        ),
    ] = False

    def precision(self) -> str:
        """Return the precision that was asked for, as typed.

        Raises:
            UsageError: two options name a precision of the weights.
        """
        names = [name for name in SUGAR if getattr(self, name)]
        asked = [f"--{name}" for name in names]
        if self.quant is not None:
            names.append(self.quant)
            asked.append(f"--quant {self.quant}")
        if len(asked) > 1:
            raise UsageError(f"{' and '.join(asked)} contradict each other: give one of them")
        return names[0] if names else "auto"

    def recipe(self) -> Recipe:
        """Return the recipe the options ask for.

        Raises:
            UsageError: two options name a precision of the weights, or one of them does not parse.
        """
        return Recipe.parse(self.precision(), kv=self.kv)

    def context(self) -> int | None:
        """Return the context length in tokens, -1 for all the model has, or None for the loader's choice.

        Raises:
            UsageError: `--ctx-size` does not parse.
        """
        if self.ctx_size is None:
            return None
        return -1 if self.ctx_size.lower() == "max" else parse_size(self.ctx_size)

    def on(self, model: str) -> "ModelOptions":
        """Return the same options for another model."""
        return dataclasses.replace(self, model=model)

    def check(self) -> None:
        """Refuse what can be refused before anything is imported or read.

        Raises:
            UsageError: an option is wrong, or two contradict each other.
        """
        self.recipe()
        self.check_place()

    def check_place(self) -> None:
        """Refuse an impossible context or number of threads, and what another device has.

        Raises:
            UsageError: one of them is impossible.
        """
        self.context()
        for flag, given in (("--xpu-tier", self.xpu_tier is not None), ("--xpu-graph", self.xpu_graph)):
            if given and self.device in ("cpu", "cuda"):
                raise UsageError(f"{flag} is for Intel GPUs: give --device xpu, or leave it out")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"--threads {self.threads} is impossible: give 1 or more")

    def load_arguments(self) -> dict[str, Any]:
        """Return what `qrun.load` takes of these, all but model and recipe."""
        return {
            "device": self.device,
            "strict": self.strict,
            "offline": self.offline,
            "cache": self.cache,
            "threads": self.threads,
            "xpu_tier": self.xpu_tier,
            "xpu_graph": self.xpu_graph,
        } | ({} if self.ctx_size is None else {"context": self.context()})


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepOptions(ModelOptions):
    """The same for a command that makes a table: `--quant` and `--kv` may be lists with commas."""

    def recipes(self, default: str = "auto") -> list[Recipe]:
        """Return the recipes to go through; the commas inside a `mix:` belong to it.

        Raises:
            UsageError: one of them does not parse.
        """
        asked = self.precision()
        parts: list[str] = []
        for part in (default if asked == "auto" and self.quant is None else asked).split(","):
            if parts and parts[-1].lower().startswith("mix:") and "=" in part and ":" not in part:
                parts[-1] += f",{part}"
            else:
                parts.append(part)
        return [Recipe.parse(part) for part in parts]

    def kvs(self) -> list[str | None]:
        """Return the cache formats to go through; None is the recipe's own.

        Raises:
            UsageError: one of them does not parse.
        """
        if self.kv is None:
            return [None]
        for name in self.kv.split(","):
            Recipe.parse(kv=name)
        return list(self.kv.split(","))

    def check(self) -> None:
        """Refuse what can be refused before anything is imported or read.

        Raises:
            UsageError: an option is wrong, or two contradict each other.
        """
        self.recipes()
        self.kvs()
        self.check_place()
