"""What `qrun quantize` does about plans: one from a file, or one for a size, measured, shown and saved.

It reads options and prints; how a plan is chosen is `qrun.quantize.budget`'s affair.
"""

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qrun import paths
from qrun.cli import card as cards
from qrun.cli.console import Console
from qrun.cli.fit_cmd import parse_memory
from qrun.cli.options import MODEL_PANEL, WEIGHTS, parse_size
from qrun.cli.table import markdown
from qrun.errors import UsageError
from qrun.recipe import ActivationType, Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from qrun.checkpoint import Checkpoint
    from qrun.models.config import ModelConfig
    from qrun.quantize.budget import Line, Report
    from qrun.quantize.calibration import Calibration
    from qrun.quantize.plan import Plan
    from qrun.quantize.probe import Progress

HEADER = ("weights", "layers", "scheme", "size", "KL alone")
WINDOWS = 8
"""Windows of the text that costs are measured on, of those that nothing is fitted to."""
FITTED = 24
"""Windows that weights are rounded by when their costs are measured."""
CACHES = ("bf16", "int8", "int4")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Which precision each weight gets, where it is not one for all."""

    plan: Annotated[
        Path | None,
        typer.Option(
            "--plan",
            metavar="FILE",
            help="A TOML file with the precision of each weight, or FastDeploy's config (.json), in place of --quant.",
            rich_help_panel=MODEL_PANEL,
        ),
        WEIGHTS,
    ] = None
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar="BITS",
            help="Choose the precision of each block for an average of so many bits, as 3.5bpw, all weights counted.",
            rich_help_panel=MODEL_PANEL,
        ),
        WEIGHTS,
    ] = None
    fit: Annotated[
        str | None,
        typer.Option(
            "--fit",
            metavar="SIZE",
            help="Choose it, and the cache's, so that the model with its cache fits this memory, as 24GiB.",
            rich_help_panel=MODEL_PANEL,
        ),
        WEIGHTS,
    ] = None
    ctx_size: Annotated[
        str,
        typer.Option(
            "-c",
            "--ctx-size",
            metavar="TOKENS",
            help="The context that must fit beside the weights with --fit: 4096, 32k.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = "4096"
    device: Annotated[
        Literal["auto", "cuda", "xpu", "cpu"],
        typer.Option(
            "--device", help="What the memory of --fit is of: cuda, or cpu, which auto is.", rich_help_panel=MODEL_PANEL
        ),
    ] = "auto"
    among: Annotated[
        str | None,
        typer.Option(
            "--among",
            metavar="LIST",
            help="What to choose from, as --quant writes it after W; vLLM has kernels for 4,4g32,8,16 alone.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None
    act: Annotated[
        Literal["16", "int8", "auto"],
        typer.Option(
            "--act",
            help="Activations of a chosen plan; auto is int8 if that costs next to nothing.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = "16"
    save_plan: Annotated[
        Path | None,
        typer.Option(
            "--save-plan",
            metavar="FILE",
            help="Write the plan as TOML, to be edited and given with --plan.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None

    @property
    def chooses(self) -> bool:
        """Whether schemes are to be chosen for a size."""
        return self.budget is not None or self.fit is not None

    def check(self, quant: str | None, kv: str | None) -> None:
        """Refuse what does not go together, and sizes that do not parse.

        Raises:
            UsageError: none or several of the ways to say what the weights become, or one of them is wrong.
        """
        given = {"--quant": quant, "--plan": self.plan, "--budget": self.budget, "--fit": self.fit}
        named = [option for option, value in given.items() if value is not None]
        if not named:
            raise UsageError("say how to quantize: --quant wint4, for example, --budget 3.5bpw, or --plan FILE")
        if len(named) > 1:
            raise UsageError(f"{' and '.join(named)} each say what the weights become: give one of them")
        if self.plan is not None and kv is not None:
            raise UsageError("--plan says what the cache and the weights are: leave --kv out")
        if self.save_plan is not None and not self.save_plan.absolute().parent.is_dir():
            raise UsageError(f"there is no directory for --save-plan {self.save_plan}: make it first")
        Recipe.parse("bf16", kv)
        self.schemes()
        if self.budget is not None:
            parse_bits(self.budget)
        if self.fit is not None:
            parse_memory(self.fit, "--fit")
            self.context()

    def schemes(self) -> list[str]:
        """Terms of what to choose from; empty for the usual. Raises UsageError."""
        terms = [] if self.among is None else [term.strip() for term in self.among.split(",")]
        for term in terms:
            Recipe.parse(f"mix:dense={term}")
        return terms

    def context(self) -> int:
        """Tokens, or -1 for all that the model has. Raises UsageError."""
        return -1 if self.ctx_size.lower() == "max" else parse_size(self.ctx_size)


def parse_bits(text: str) -> float:
    """Return the bits per weight that `text` names: `3.5bpw` or `3.5`.

    Raises:
        UsageError: it names none, or more than a weight can have.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:bpw|bits?)?", text.strip().lower())
    if match is None or not 0 < float(match[1]) <= 32:
        raise UsageError(f"--budget {text!r} is no size: give bits per weight, as 3.5bpw")
    return float(match[1])


def make_plan(
    options: PlanOptions, checkpoint: "Checkpoint", config: "ModelConfig", text: "Calibration", *, tied: bool,
    label: str, kv: str | None, gptq: bool, progress: "Progress",
) -> "tuple[Plan, Report]":  # fmt: skip
    """Return the plan that is chosen for a size, by what rounding costs on a text, with GPTQ or without.

    Raises:
        QrunError: nothing fits, or the model cannot be measured here.
    """
    from qrun.fit import find_place
    from qrun.quantize.budget import CANDIDATES, Budget, plan_for_budget

    if options.budget is not None:
        budget = Budget(bits=parse_bits(options.budget))
    else:
        assert options.fit is not None, "one of the two was given"
        memory, context = parse_memory(options.fit, "--fit"), options.context()
        budget = Budget(
            memory=memory,
            context=config.positions if context < 0 else min(context, config.positions),
            device=find_place(options.device, memory=memory).device,
        )
    allowed: dict[str, tuple[ActivationType, ...]] = {"16": ("16",), "int8": ("int8",), "auto": ("16", "int8")}
    return plan_for_budget(
        checkpoint, config, text.ids[text.train :][:WINDOWS], budget,
        candidates=options.schemes() or CANDIDATES,
        plain=("embedding", "lm_head") if tied else ("embedding",),
        kvs=(kv,) if kv is not None else CACHES if options.fit is not None else CACHES[:1],
        activations=allowed[options.act], fitted=_spread(text.ids[: text.train], FITTED) if gptq else None,
        label=label, notes=paths.cache_dir() / "sensitivity", progress=progress,
    )  # fmt: skip


def _spread(windows: "Tensor", most: int) -> "Tensor":
    return windows[:: -(-len(windows) // most)]


def read_plan(path: Path, config: "ModelConfig", *, tied: bool, label: str) -> "Plan":
    """Return the plan in a file: ours, or FastDeploy's config where its name ends in .json.

    Raises:
        UsageError: it is none, or another model's.
    """
    from qrun.quantize import fastdeploy
    from qrun.quantize.plan import Plan

    if path.suffix.lower() == ".json":
        return fastdeploy.read_plan(path, config, tied=tied, label=label)
    return Plan.read(path, config, tied=tied)


def warn_of_tables(console: Console, plan: "Plan") -> None:
    """Say so where a plan gives a scheme to what stays as it is in a directory."""
    if plan.schemes["model.embed_tokens"].type not in ("bf16", "fp32"):
        table = "head, which is the embedding," if plan.tied else "embedding"
        console.warn(f"the {table} stays as it is, whatever the plan says: other engines cannot read it quantized")


def tell_plan(console: Console, plan: "Plan", report: "Report") -> None:
    """Write a chosen plan to stderr: what each kind of weights gets, and what that costs."""
    from qrun.quantize.rules import ranges

    groups: dict[tuple[str, str], list[Line]] = {}
    for line in report.lines:
        groups.setdefault((line.unit.kind, str(line.scheme)), []).append(line)
    rows = [
        (
            kind,
            ranges(line.unit.layer for line in lines if line.unit.layer is not None) or "-",
            scheme,
            cards.size(sum(line.nbytes for line in lines)),
            f"{sum(line.cost for line in lines):.5f}",
        )
        for (kind, scheme), lines in sorted(groups.items(), key=lambda item: item[0][0])
    ]
    console.note(*(text.rstrip("\n") for text in markdown(HEADER, rows, left=3)))
    console.heading(
        f"plan for {report.budget}", f"  {report.bits:.2f} bits a weight, activations {plan.activations}, KV {plan.kv}"
    )
    console.note(
        f"KL {report.measured:.5f} nats a token from the original, over {report.tokens} tokens; the blocks alone add "
        f"up to {report.predicted:.5f}"
    )
