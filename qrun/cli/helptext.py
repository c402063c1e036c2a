"""How `--help` is laid out: usage, what it does, examples that can be copied, options by panel. Plain text.

Knows commands by typer's metadata only; `tools/command_docs.py` makes the documentation of the same.
"""

import re
import shutil
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Final

from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from qrun.cli.spread import one_line_paragraphs

EXAMPLE: Final = re.compile(r"(?P<title>[^\n]+?):\s\s+(?P<code>\S.*)", re.DOTALL)
"""A paragraph of a docstring that is a command line: what it is for, two blanks, the line."""
WIDEST: Final = 100
COLUMN: Final = 30
"""Columns for the names of options; a longer one has its help on the next line."""

Param = TyperOption | TyperArgument


class Command(TyperCommand):
    """A command with this layout of its help."""

    def get_help(self, ctx: Any) -> str:
        """Return the page."""
        return "\n".join(_page(self, ctx))


class Group(TyperGroup):
    """A group of commands with this layout of its help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take the command line apart; without arguments, a group that does nothing by itself shows its help."""
        if self.no_args_is_help and not args and not ctx.resilient_parsing:
            print(self.get_help(ctx))
            ctx.exit()
        return super().parse_args(ctx, args)

    def get_help(self, ctx: Any) -> str:
        """Return the page."""
        return "\n".join(_page(self, ctx))


def paragraphs(command: TyperCommand | TyperGroup) -> list[str]:
    """Return the help of a command, a paragraph a string; an example that ends one stands by itself."""
    text = one_line_paragraphs(command.help or "")
    return re.sub(r"(?<=\.)\s+(?=Example:\s)", "\n\n", text).split("\n\n")


def names(param: Param) -> list[str]:
    """Return how an option is typed, short names first, or what an argument is called."""
    if isinstance(param, TyperArgument):
        return [f"{param.metavar or param.name.upper()}{'' if param.nargs == 1 else '…'}"]
    return sorted((*param.opts, *param.secondary_opts), key=lambda name: name.startswith("--"))


def value(param: Param) -> str:
    """Return what stands for an option's value, or the values it may have; empty for switches and arguments."""
    if isinstance(param, TyperArgument) or param.is_flag:
        return ""
    choices: Sequence[Any] = param.type_descriptor.choices or ()
    return param.metavar or "|".join(map(str, choices)) or param.name.upper()


def default(given: Any) -> str:
    """Return a default as it is shown; empty for none, and for a switch that is off."""
    if given is None or given is False:
        return ""
    return "on" if given is True else str(given)


def below(group: TyperGroup) -> Iterator[tuple[str, TyperCommand | TyperGroup]]:
    """Yield the commands of a group by name, in the order of its help."""
    for name, command in group.commands.items():
        if isinstance(command, TyperCommand | TyperGroup) and not command.hidden:
            yield name, command


def _page(command: TyperCommand | TyperGroup, context: Any) -> Iterator[str]:
    width = min(shutil.get_terminal_size().columns, WIDEST)
    yield command.get_usage(context)
    for paragraph in paragraphs(command):
        match = EXAMPLE.fullmatch(paragraph)
        yield ""
        yield from [f"{match['title']}:", f"  {match['code']}"] if match else textwrap.wrap(paragraph, width)
    sections: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
    for param in command.get_params(context):
        if isinstance(param, TyperOption | TyperArgument) and not param.hidden:
            title = "Arguments" if isinstance(param, TyperArgument) else param.rich_help_panel or "Options"
            shown = default(param.get_default(context))
            told = f"{param.help or ''} [default: {shown}]" if shown else param.help or ""
            sections[title].append((f"{', '.join(names(param))} {value(param)}".rstrip(), told))
    if isinstance(command, TyperGroup):
        sections["Commands"] = [(name, paragraphs(each)[0]) for name, each in below(command)]
    order = {"Arguments": 0, "Options": 1 if len(sections["Options"]) > 1 else 3}
    for title in sorted(sections, key=lambda title: order.get(title, 2)):
        yield from ("", f"{title}:", *_columns(sections[title], width))
    if command.epilog:
        yield from ("", *textwrap.wrap(command.epilog, width))


def _columns(rows: Sequence[tuple[str, str]], width: int) -> Iterator[str]:
    column = min(max(len(name) for name, _ in rows), COLUMN)
    for name, text in rows:
        lines = textwrap.wrap(text, max(width - column - 4, 20)) or [""]
        if len(name) > column:
            yield f"  {name}"
        else:
            yield f"  {name:<{column}}  {lines.pop(0)}".rstrip()
        yield from (f"{'':{column + 4}}{line}" for line in lines)
