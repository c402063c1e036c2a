"""`qrun generate`: one prompt in, one answer out, for scripts; or a stream of prompts. Stdout carries the answers."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qrun.cli import card as cards
from qrun.cli import report
from qrun.cli.console import Console
from qrun.cli.interrupt import StopOnce
from qrun.cli.options import EMBEDDED, ModelOptions
from qrun.cli.prompts import gather
from qrun.cli.sampling_options import SamplingOptions
from qrun.cli.script_options import ScriptOptions
from qrun.cli.start import open_session
from qrun.cli.structure import Structure, StructureOptions

if TYPE_CHECKING:
    from qrun.engine import Engine
    from qrun.reply import Reply
    from qrun.sampler import Sampling
    from qrun.session import Session

SEPARATOR = "---\n"


def generate(
    *, model: ModelOptions, script: ScriptOptions, structure: StructureOptions, sampling: SamplingOptions
) -> None:
    """Answer one prompt and exit: the twin of chat for scripts.

    The prompt is what is piped in, then -f files, then -p. Only the answer goes to stdout.

    Example:  git diff | qrun generate ernie --wint4 -p "Write a commit message." -n 100

    JSON that fits a schema:  qrun generate -j schema.json -p "Ada, born 1815"

    A file of prompts, several at once:  qrun generate --batch prompts.txt > answers.jsonl

    A model that stays loaded, for a program:  qrun generate --jsonl
    """
    dash = model.model == "-"
    if dash:
        model = model.on(EMBEDDED)
    console = Console(quiet=model.quiet, verbose=model.verbose)
    model.check()
    sampling.check()
    script.check(sampling.system)
    form = structure.structure()
    text = "" if script.jsonl or script.batch else gather(script.prompt, script.file or (), console, dash=dash)
    if form is not None:
        form.check()
    if script.batch:
        _batch(script.batch, model, sampling, script, form, console)
    elif script.jsonl:
        _serve(model, sampling, script, form, console)
    else:
        _answer_one(text, model, sampling, script, form, console)


def _answer_one(
    text: str,
    model: ModelOptions,
    sampling: SamplingOptions,
    script: ScriptOptions,
    form: Structure | None,
    console: Console,
) -> None:
    from qrun.cli.prompt_cache import PromptCache
    from qrun.question import together

    engine, session = open_session(model, sampling, console)
    cache = PromptCache(script.prompt_cache, engine, console)
    count = script.candidates or 1
    if count > 1:
        asked = [
            session.question(text, raw=script.raw, sampling=each, logprobs=script.logprobs, constraint=held)
            for each, held in ((each, form and form.constraint(session)) for each in _seeded(session, count))
        ]
        replies = together(engine, [session.prepare(each) for each in asked], count)
    else:
        begin = session.complete if script.raw else session.stream
        replies = iter([begin(text, constraint=form and form.constraint(session), logprobs=script.logprobs)])
    done = write(engine, replies, console, as_json=script.json)
    if form is not None and any(reply.finish_reason != "stop" for reply in done):
        console.warn("the answer was cut, so it does not have the form that was asked for: a larger -n lets it end")
    for reply in done[:1]:
        cache.keep(reply)


def _seeded(session: "Session", count: int) -> "list[Sampling]":
    """Return the session's sampling for each of several candidates: seeds from the first one's on."""
    from qrun.sampler import Sampling

    first = (session.sampling or Sampling()).seeded()
    return [dataclasses.replace(first, seed=((first.seed or 0) + n) % (1 << 63)) for n in range(count)]


def answer(engine: "Engine", session: "Session", text: str, console: Console) -> None:
    """Write the answer to `text`, as it comes, and then its stats. Errors as `write`, and as `Session.stream`."""
    write(engine, iter([session.stream(text)]), console)


def write(engine: "Engine", replies: "Iterator[Reply]", console: Console, *, as_json: bool = False) -> "list[Reply]":
    """Write replies as they come, a line between them, or as one JSON object, and then their stats; return them.

    Raises:
        KeyboardInterrupt: Ctrl-C; what came before it has been written.
    """
    done: list[Reply] = []
    with StopOnce() as interrupt, console.waiting("reading the prompt") as waiting:
        try:
            for reply in replies:
                if done and not as_json:
                    console.end_text()
                    console.text(SEPARATOR)
                done.append(reply)
                waiting.watch = lambda reply=reply: reply.progress
                for delta in reply:
                    if interrupt.requested:
                        break
                    interrupt.reading = False
                    if not as_json:
                        waiting.stop()
                        (console.reasoning if delta.kind == "reasoning" else console.text)(delta.text)
                if interrupt.requested:
                    break
        except KeyboardInterrupt:
            pass  # told of below, once the text is complete
        finally:
            for reply in done:
                reply.close()
    if as_json and done:
        console.raw(report.line(report.report(engine.card, done)))
    else:
        console.end_text()
    for reply in done:
        console.note(cards.stats_line(reply.stats, reply.finish_reason))
    if interrupt.requested:
        raise KeyboardInterrupt
    return done


def _batch(
    path: str,
    model: ModelOptions,
    sampling: SamplingOptions,
    script: ScriptOptions,
    form: Structure | None,
    console: Console,
) -> None:
    from qrun.cli.batch_run import BatchRun
    from qrun.cli.lines import Lines
    from qrun.cli.requests import Defaults

    lines = Lines(path)
    engine, session = open_session(model, sampling, console)
    defaults = Defaults(raw=script.raw, structure=form, logprobs=script.logprobs)
    BatchRun(engine, session, console, defaults=defaults, width=script.parallel).run(path, lines)


def _serve(
    model: ModelOptions, sampling: SamplingOptions, script: ScriptOptions, form: Structure | None, console: Console
) -> None:
    from qrun.cli.jsonl import CoProcess, Inbox
    from qrun.cli.lines import Lines
    from qrun.cli.prompt_cache import PromptCache
    from qrun.cli.requests import Defaults

    lines = Lines("-")
    engine, session = open_session(model, sampling, console)
    defaults = Defaults(raw=script.raw, structure=form, logprobs=script.logprobs)
    cache = PromptCache(script.prompt_cache, engine, console)
    CoProcess(engine, session, console, defaults=defaults, cache=cache).run(Inbox(lines))
