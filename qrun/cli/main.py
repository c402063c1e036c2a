"""The command `qrun`: its subcommands, and the one place where errors become exit codes.

0 done, 1 failed, 2 wrong usage, 3 model not found, 4 not enough memory, 5 --strict violated, 130 interrupted, and 141
when the reader of the output is gone, as for any filter. Knows no model; torch is imported by the commands, late.
"""

import io
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast

import typer
from typer.core import TyperGroup, TyperOption
from typer.exceptions import TyperException
from typer.main import get_command

from qrun import __version__
from qrun.cli import cache_cmd, config_cmd, config_file
from qrun.cli.bench_cmd import bench
from qrun.cli.chat import chat
from qrun.cli.compare_cmd import compare
from qrun.cli.complete import mended_words
from qrun.cli.doctor_cmd import doctor
from qrun.cli.eval_cmd import evaluate
from qrun.cli.fit_cmd import fit
from qrun.cli.generate import generate
from qrun.cli.helptext import Command, Group
from qrun.cli.info_cmd import info
from qrun.cli.quantize_cmd import quantize
from qrun.cli.sanitize import one_line
from qrun.cli.spread import origin, with_options
from qrun.cli.two_words import TwoWords
from qrun.errors import DoesNotFitError, QrunError, UsageError

INTERRUPTED = 130
NOBODY_READS = 141

FIRST_STEPS = """qrun makes the language model you have fit this machine, and talks to it.

  qrun chat                              talk with spark, a demonstration that comes with qrun
  qrun chat ernie:0.3b --wint4           a real model, quantized while it loads
  qrun fit                               which models fit this machine, before any download
  qrun generate -p "Name three trees."   one answer, for scripts

  qrun --help                            every command; qrun chat --help teaches one of them
"""
EPILOG = (
    "Every option can be set in the environment, --ctx-size as QRUN_CTX_SIZE, or in the file that qrun config path "
    "names. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 model not found, 4 not enough memory, 5 --strict violated, "
    "130 interrupted."
)

app = typer.Typer(
    name="qrun",
    cls=TwoWords,
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EPILOG,
)
command = partial(app.command, cls=Command)
command()(with_options(chat))
command()(with_options(generate))
command()(with_options(fit))
command()(with_options(bench))
command("bench compare")(with_options(compare))
command("eval")(with_options(evaluate))
command()(with_options(quantize))
command()(with_options(doctor))
command()(with_options(info))
app.add_typer(cache_cmd.app, name="cache", cls=Group)
app.add_typer(config_cmd.app, name="config", cls=Group)


@app.callback()
def qrun(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    """Make the language model you have fit this machine, and talk to it.

    Start with qrun chat, a conversation with spark, a model of 5 M parameters that comes with qrun. Then a real one,
    quantized while it loads.

    Example:  qrun chat ernie:0.3b --wint4
    """
    root = context.command
    if version:
        typer.echo(f"qrun {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(FIRST_STEPS, nl=False)
    elif isinstance(root, TyperGroup) and context.invoked_subcommand in config_file.commands(root):
        context.default_map = _defaults(context, root)


def _defaults(context: typer.Context, root: TyperGroup) -> dict[str, Any]:
    """What the config file says. A broken one does not keep a command's help from being read.

    Raises:
        UsageError: the file is broken.
    """
    try:
        return config_file.default_map(root, config_file.read())
    except UsageError as error:
        if not {"-h", "--help"} & set(context.obj or ()):
            raise
        print(f"qrun: {one_line(str(error))}", file=sys.stderr)
        return {}


def command_line() -> TyperGroup:
    """Return the whole command line as typer builds it from `app`."""
    root = get_command(app)
    assert isinstance(root, TyperGroup)
    for param in root.params:
        if isinstance(param, TyperOption) and param.name == "show_completion":
            param.hidden = True  # --install-completion is the one to learn
    return root


def run() -> NoReturn:
    """Run the command line of this process and exit with its code."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Run a command line, without the program's name, and return its exit code. Errors are told on stderr.

    Never raises, save for what a second Ctrl-C may hit while the first is being told.
    """
    _mend_streams()
    try:
        with mended_words() if os.environ.get("_QRUN_COMPLETE") == "complete_bash" else nullcontext():
            code = command_line().main(list(arguments), prog_name="qrun", standalone_mode=False, obj=list(arguments))
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
    if isinstance(error, typer.BadParameter) and error.param is not None and error.ctx is not None:
        where = origin(cast(typer.Context, error.ctx), error.param.name)
        text += f" (from {where})" if where else ""
    path, command, rest = ["qrun"], command_line(), list(arguments)
    while isinstance(command, TyperGroup):
        called = [name for name in (" ".join(rest[:2]), *rest[:1]) if name in command.commands]
        if not called:
            break
        path.append(called[0])
        command, rest = command.commands[called[0]], rest[1 + called[0].count(" ") :]
    if text.startswith("No such command"):
        near = text.partition(". Did you mean ")
        if near[1]:
            return f"no{near[0].removeprefix('No')}: did you mean {near[2].removesuffix('?')}?"
        if len(path) == 1:
            text += f" (to talk to a model: qrun chat {arguments[0]})"
    return f"{text[:1].lower()}{text[1:]}: see {' '.join(path)} --help"
