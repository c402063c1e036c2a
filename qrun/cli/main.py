"""The command `qrun`: its subcommands, and the one place where errors become exit codes.

0 done, 1 failed, 2 wrong usage, 3 model not found, 4 not enough memory, 5 --strict violated, 130 interrupted, and 141
when the reader of the output is gone, as for any filter. Knows no model; torch is imported by the commands, late.
"""

import io
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from typer.exceptions import TyperException
from typer.main import get_command

from qrun import __version__
from qrun.cli import cache_cmd
from qrun.cli.bench_cmd import bench
from qrun.cli.chat import chat
from qrun.cli.eval_cmd import evaluate
from qrun.cli.generate import generate
from qrun.cli.info_cmd import info
from qrun.cli.sanitize import one_line
from qrun.cli.spread import with_options
from qrun.errors import DoesNotFitError, QrunError

INTERRUPTED = 130
NOBODY_READS = 141

EPILOG = (
    "Every option can be set in the environment: --ctx-size is QRUN_CTX_SIZE. "
    "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 model not found, 4 not enough memory, 5 --strict violated, "
    "130 interrupted."
)

app = typer.Typer(
    name="qrun",
    invoke_without_command=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EPILOG,
)
app.command()(with_options(chat))
app.command()(with_options(generate))
app.command()(with_options(info))
app.command()(with_options(bench))
app.command("eval")(with_options(evaluate))
app.add_typer(cache_cmd.app, name="cache")


@app.callback()
def qrun(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    """Make the language model you have fit this machine, and talk to it.

    Start with:  qrun chat  - a conversation with spark, a model of 5 M parameters that comes with qrun.

    Then:  qrun chat ernie:0.3b --wint4  - a real one, quantized while it loads.
    """
    if version:
        typer.echo(f"qrun {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def run() -> NoReturn:
    """Run the command line of this process and exit with its code."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Run a command line, without the program's name, and return its exit code. Errors are told on stderr.

    Never raises, save for what a second Ctrl-C may hit while the first is being told.
    """
    _mend_streams()
    try:
        code = get_command(app).main(list(arguments), prog_name="qrun", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except SystemExit as stop:
        return _drop_output() if isinstance(stop.__context__, BrokenPipeError) else int(stop.code or 0)
    except BrokenPipeError:
        return _drop_output()
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        return _tell(error, arguments)


def _mend_streams() -> None:
    """Make stderr exist, and let text that the terminal's encoding lacks be replaced instead of failing."""
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - as long-lived as the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _drop_output() -> int:
    """Nobody reads: let what is still buffered go nowhere, so that Python's exit does not complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return NOBODY_READS


def _tell(error: Exception, arguments: Sequence[str]) -> int:
    """Say in one line on stderr what went wrong; return the exit code."""
    verbose = bool(os.environ.get("QRUN_DEBUG")) or "-v" in arguments or "--verbose" in arguments
    match error:
        case QrunError():
            code, text = error.exit_code, str(error)
        case TyperException():
            code, text = error.exit_code, _usage(error, arguments)
        case typer.Abort():
            code, text = 1, "aborted"
        case MemoryError():
            code, text = DoesNotFitError.exit_code, "memory ran out: close other programs, or use --wint4 or --kv int4"
        case OSError() if error.strerror:
            where = f"{error.filename}: " if error.filename else ""
            code, text = 1, f"{where}{error.strerror}"
        case _:
            name = type(error).__name__
            code, text = 1, f"unexpected {name}: {error} (a bug in qrun; QRUN_DEBUG=1 shows where)"
    if verbose:
        traceback.print_exception(error)
    print(f"qrun: {one_line(text)}", file=sys.stderr)
    return code


def _usage(error: TyperException, arguments: Sequence[str]) -> str:
    """Return a message for a command line typer refuses: what is wrong, where it came from, where help is."""
    text = error.format_message().removesuffix(".").replace("Value error, ", "").partition(", unable to parse")[0]
    if isinstance(error, typer.BadParameter) and error.param is not None:
        names = (error.param.envvar,) if isinstance(error.param.envvar, str) else ()
        named = any(argument.split("=")[0] in error.param.opts for argument in arguments)
        text += "".join(f" (from {name})" for name in names if os.environ.get(name) and not named)
    named = [command.name or "" for command in app.registered_commands] + ["chat", "generate", "info", "bench", "cache"]
    command = arguments[0] if arguments and arguments[0] in named else ""
    if text.startswith("No such command") and arguments:
        text += f" (to talk to a model: qrun chat {arguments[0]})"
    return f"{text[:1].lower()}{text[1:]}: see {' '.join(filter(None, ['qrun', command, '--help']))}"
