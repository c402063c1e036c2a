"""`qrun generate`: one prompt in, one answer out, for scripts. Stdout carries the answer, or one JSON object."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qrun.cli import card as cards
from qrun.cli.console import Console
from qrun.cli.interrupt import StopOnce
from qrun.cli.options import EMBEDDED, OUTPUT_PANEL, ModelOptions
from qrun.cli.prompts import gather
from qrun.cli.sampling_options import SamplingOptions
from qrun.cli.start import open_session
from qrun.errors import UsageError

if TYPE_CHECKING:
    from qrun.engine import Engine
    from qrun.reply import Reply
    from qrun.runcard import RunCard
    from qrun.session import Session

PROMPT_PANEL = "Prompt"


def generate(
    *,
    model: ModelOptions,
    prompt: Annotated[
        str | None,
        typer.Option("-p", "--prompt", metavar="TEXT", help="The prompt; - is stdin.", rich_help_panel=PROMPT_PANEL),
    ] = None,
    file: Annotated[
        list[str] | None,
        typer.Option("-f", "--file", metavar="FILE", help="Read it from a file.", rich_help_panel=PROMPT_PANEL),
    ] = None,
    raw: Annotated[
        bool,
        typer.Option("--raw", help="Continue the prompt as it is, no chat template.", rich_help_panel=PROMPT_PANEL),
    ] = False,
    sampling: SamplingOptions,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            envvar="QRUN_JSON",
            help="Print one JSON object: text, finish_reason, usage, timings, seed, model, recipe.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = False,
) -> None:
    """Answer one prompt and exit: the twin of chat for scripts.

    The prompt is what is piped in, then -f files, then -p. Only the answer goes to stdout.

    Example:  git diff | qrun generate ernie --wint4 -p "Write a commit message." -n 100
    """
    dash = model.model == "-"
    if dash:
        model = model.on(EMBEDDED)
    console = Console(quiet=model.quiet, verbose=model.verbose)
    model.check()
    sampling.check()
    text = gather(prompt, file or (), console, dash=dash)
    if raw and sampling.system:
        raise UsageError("--system and --raw contradict each other: raw text has no roles")
    engine, session = open_session(model, sampling, console)
    answer(engine, session, text, console, raw=raw, as_json=as_json)


def answer(
    engine: "Engine", session: "Session", text: str, console: Console, *, raw: bool = False, as_json: bool = False
) -> None:
    """Write the answer to `text`, as it comes or as one JSON object, and then its stats.

    Raises:
        KeyboardInterrupt: Ctrl-C; what came before it has been written.
        ContextOverflowError: the prompt is longer than the context.
    """
    with StopOnce() as interrupt, console.waiting("reading the prompt") as waiting:
        reply = session.complete(text) if raw else session.stream(text)
        try:
            for delta in reply:
                if interrupt.requested:
                    break
                interrupt.reading = False
                if not as_json:
                    waiting.stop()
                    (console.reasoning if delta.kind == "reasoning" else console.text)(delta.text)
        except KeyboardInterrupt:
            pass  # told of below, once the text is complete
        finally:
            reply.close()
    if as_json:
        console.raw(json.dumps(report(engine.card, reply), ensure_ascii=False) + "\n")
    else:
        console.end_text()
    console.note(cards.stats_line(reply.stats, reply.finish_reason))
    if interrupt.requested:
        raise KeyboardInterrupt


def report(card: "RunCard", reply: "Reply") -> dict[str, Any]:
    """Return what `--json` prints; seconds are wall clock, speeds tokens a second."""
    stats = reply.stats
    read = stats.prompt_tokens - stats.reused_tokens
    return {
        "text": reply.text,
        "reasoning": reply.reasoning or None,
        "finish_reason": reply.finish_reason,
        "usage": {
            "prompt_tokens": stats.prompt_tokens,
            "completion_tokens": stats.new_tokens,
            "total_tokens": stats.prompt_tokens + stats.new_tokens,
        },
        "timings": {
            "load_seconds": round(card.load_seconds, 4),
            "prefill_seconds": round(stats.prefill_seconds, 4),
            "decode_seconds": round(stats.decode_seconds, 4),
            "prefill_tokens_per_second": round(cards.rate(read, stats.prefill_seconds), 2),
            "decode_tokens_per_second": round(cards.rate(stats.new_tokens, stats.decode_seconds), 2),
        },
        "seed": stats.seed,
        "model": card.model,
        "recipe": card.recipe,
    }
