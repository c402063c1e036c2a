"""`qrun quantize`: a checkpoint written in another precision, for qrun and for other engines. The work is in
`qrun.quantize`."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from qrun.cli import card as cards
from qrun.cli import complete
from qrun.cli.console import Console
from qrun.cli.options import MODEL_PANEL, OUTPUT_PANEL, WEIGHTS
from qrun.cli.quantize_plan import PlanOptions, make_plan, read_plan, tell_plan, warn_of_tables
from qrun.cli.start import working
from qrun.cli.table import markdown
from qrun.errors import UsageError
from qrun.recipe import Recipe

if TYPE_CHECKING:
    from qrun.quantize.plan import Plan

HEADER = ("layer", "scheme", "weights off", "outputs off", "stream off")
TEXT_NOTE = (
    "calibrated on the built-in text, conversations about qrun: a text of the kind that the model will read is better "
    "(--calibration FILE)"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeOptions(PlanOptions):
    """To which precision, with what of this machine."""

    quant: Annotated[
        str | None,
        typer.Option(
            "--quant",
            metavar="RECIPE",
            autocompletion=complete.quants,
            help="Precision of weights and activations: wint8, wint4, W4g128, W3g64, wint2, w8a8, fp8, mxfp4, nvfp4; "
            "trellis, which only qrun reads.",
            rich_help_panel=MODEL_PANEL,
        ),
        WEIGHTS,
    ] = None
    kv: Annotated[
        str | None,
        typer.Option(
            "--kv",
            metavar="FORMAT",
            autocompletion=complete.kvs,
            help="fp8 writes calibrated scales of an fp8 cache; others are chosen when the model runs.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None
    offline: Annotated[
        bool,
        typer.Option("--offline", help="Use only what is already on this machine.", rich_help_panel=MODEL_PANEL),
    ] = False
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads", metavar="N", help="CPU threads; every core when not given.", rich_help_panel=MODEL_PANEL
        ),
    ] = None
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only errors.", rich_help_panel=OUTPUT_PANEL)] = False

    def recipe(self) -> Recipe | None:
        """Return the recipe that is asked for, or None where a plan is.

        Raises:
            UsageError: neither, both, or something that does not parse.
        """
        self.check(self.quant, self.kv)
        return None if self.quant is None else Recipe.parse(self.quant, kv=self.kv)


def quantize(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            autocompletion=complete.models,
            help="A checkpoint directory, a name such as qwen3:0.6b, an org/name on the hub, or spark.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to make.")],
    options: QuantizeOptions,
    method: Annotated[
        Literal["gptq", "awq", "awq+gptq", "rtn"],
        typer.Option("--method", help="How weights are rounded; rtn needs no text and is quick."),
    ] = "gptq",
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration", metavar="FILE", help="A UTF-8 text to calibrate on; a built-in one if not given."
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option("--tokens", metavar="N", help="Tokens of the text to use, spread over it.")
    ] = 32768,
    window: Annotated[int, typer.Option("--window", metavar="N", help="Tokens read in one go.")] = 512,
    smooth: Annotated[
        bool,
        typer.Option(
            "--smooth/--no-smooth", help="Where activations have 8 bits, move their outliers into the weights."
        ),
    ] = True,
) -> None:
    """Quantize a checkpoint into a directory that qrun, vLLM, SGLang and transformers read (compressed-tensors).

    One layer is in memory at a time, experts one by one, beside the activations of the calibration text. Ctrl-C, or
    whatever else ends it, leaves OUT.partial, and the same command goes on there. Integers are written symmetric;
    head and embedding stay as they are, but for a head that a plan names. OUT has a report in quantization.json.

    Example:  qrun quantize ernie:21b ./ernie-w4 --quant W4g128 --calibration book.txt
    """
    console = Console(quiet=options.quiet)
    recipe = options.recipe()
    if sys.platform == "win32":
        raise UsageError("qrun quantize runs on Linux and macOS: on Windows, run it under WSL")
    if window < 2 or tokens < 2 * window:
        raise UsageError(f"--tokens {tokens} and --window {window} are too small: give 2 windows of 2 tokens or more")
    if options.threads is not None and options.threads < 1:
        raise UsageError(f"--threads {options.threads} is impossible: give 1 or more")
    for path, option, kind in ((calibration, "--calibration", "a UTF-8 text"), (options.plan, "--plan", "a TOML file")):
        if path is not None and not path.is_file():
            raise UsageError(f"there is no file {path}: give {kind} with {option}")
    if out.exists():
        raise UsageError(f"{out} exists already: name another directory, or delete it")
    with working(f"reading {model}", console) as waiting:
        import torch

        from qrun import hub
        from qrun.checkpoint import Checkpoint
        from qrun.loader import is_tied
        from qrun.models import describe
        from qrun.quantize import pipeline
        from qrun.quantize.calibration import calibration as windows
        from qrun.quantize.plan import Plan

        chosen = None
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        found = hub.fetch(
            model, recipe=recipe or Recipe.parse("wint2"), context=window, offline=options.offline,
            progress=waiting.update,
        )  # fmt: skip
        checkpoint = Checkpoint.open(found.path)
        config = describe(checkpoint.config)
        tied = is_tied(config, checkpoint)
        text = None
        if method != "rtn" or options.chooses:
            text = windows(
                found.path, config.vocab, config.positions, label=found.label, text=calibration, window=window,
                tokens=tokens,
            )  # fmt: skip
        if options.plan is not None:
            plan = read_plan(options.plan, config, tied=tied, label=found.label)
        elif recipe is not None:
            plan = Plan.uniform(config, recipe, tied=tied, label=found.label)
        else:
            assert text is not None, "costs are measured on it"
            plan, chosen = make_plan(
                options, checkpoint, config, text, tied=tied, label=found.label, kv=options.kv, gptq="gptq" in method,
                progress=waiting.update,
            )  # fmt: skip
        settings = pipeline.Settings(
            method=method,
            folds=method != "rtn" and (method.startswith("awq") or (plan.activations != "16" and smooth)),
            head=recipe is None,
        )
    if chosen is not None:
        tell_plan(console, plan, chosen)
    if options.plan is not None:
        warn_of_tables(console, plan)
    if options.save_plan is not None:
        plan.write(options.save_plan)
    text = None if method == "rtn" else text
    with working("quantizing", console) as waiting:
        report = pipeline.quantize(found.path, out, plan, settings, calibration=text, progress=waiting.update)
    _tell(console, report, out, plan)
    if text is not None and calibration is None and found.label != hub.EMBEDDED:
        console.warn(TEXT_NOTE)


def _tell(console: Console, report: dict[str, Any], out: Path, plan: "Plan") -> None:
    """Write the table and what is to know of the directory to stderr."""
    console.note(*(line.rstrip("\n") for line in markdown(HEADER, [_row(layer) for layer in report["layers"]], left=2)))
    size = f"{cards.size(report['bytes'])}, {report['bits_per_weight']:.2f} bits a weight"
    console.heading(str(out), f"  {size}, {report['method']}")
    if report["kl"] is not None:
        text = report["calibration"]
        console.note(
            f"KL {report['kl']:.5f} nats a token from the original, over {text['measured']} of {text['tokens']} tokens "
            f"of {text['text']} that it was not fitted to"
        )
    if plan.kv not in ("bf16", "fp8"):
        console.warn(f"a cache in {plan.kv} is no part of the directory: give --kv {plan.kv} when you run it")


def _row(layer: dict[str, Any]) -> tuple[str, ...]:
    modules = cast(list[dict[str, Any]], layer["modules"])
    outputs = [module["output_error"] for module in modules if module["output_error"] is not None]
    schemes = dict.fromkeys(module["scheme"] for module in modules)
    return (
        str(layer["layer"]),
        ", ".join(schemes) or "as it was",
        _percent([module["weight_error"] for module in modules]),
        _percent(outputs),
        _percent([] if layer["stream_error"] is None else [layer["stream_error"]]),
    )


def _percent(values: list[float]) -> str:
    return f"{100 * sum(values) / len(values):.2f} %" if values else "–"
