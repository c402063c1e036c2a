"""COMMANDS.md: every command with its help, example and options, from the metadata that `--help` is made of.

    python -m tools.command_docs

What several commands have in common is listed once. Knows no option by name; terminal, variables and config file of
whoever runs it make no difference.
"""

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from qrun.cli.helptext import EXAMPLE, Param, below, default, names, paragraphs, value
from qrun.cli.main import EPILOG, command_line

TARGET: Final = Path(__file__).resolve().parents[1] / "COMMANDS.md"
HEADER: Final = """\
# The commands of qrun

Made by `python -m tools.command_docs` from the help texts: `qrun COMMAND --help` says the same.

What an option is when it is not given comes from its variable, else from the config file, else it is the default below;
`qrun config show` tells which. The file is `qrun config path`, or the one that `QRUN_CONFIG` names; `qrun config init`
writes one with every option in it. Its keys are the options' names, and `model`; a table holds for one command and
beats what stands above it:

```toml
model = "ernie:0.3b"
wint4 = true
ctx_size = "32k"

[chat]
think = false
```

`qrun --install-completion` teaches the shell to complete commands, options, models and recipes.
"""
ARGUMENTS: Final = "Arguments"
Row = tuple[str, str, str, str]
Tables = Mapping[str, Mapping[str, Row]]
"""Rows by option, by panel."""


def render(root: TyperGroup) -> str:
    """Return the page of a command line."""
    leaves = dict(_leaves(root))
    uses = Counter((panel, row) for command in leaves.values() for panel, row in _rows(command))
    common: defaultdict[str, dict[str, Row]] = defaultdict(dict)
    for (panel, row), count in uses.items():
        if panel and count > 1:
            common[panel].setdefault(row[0], row)
    parts = [HEADER, "| command | |\n|---|---|"]
    for name, command in below(root):
        parts.append(f"| [`qrun {name}`](#{_anchor(f'qrun {name}')}) | {paragraphs(command)[0]} |")
    parts.append(f"\n{EPILOG}\n")
    for name, command in below(root):
        parts += _section(command, f"qrun {name}", common, level=2)
    parts.append("## Options that several commands have\n")
    for panel, rows in common.items():
        parts += [f"### {panel}\n", *_table(rows.values())]
    return "\n".join(parts)


def _leaves(group: TyperGroup, path: str = "qrun") -> Iterator[tuple[str, TyperCommand]]:
    for name, command in below(group):
        if isinstance(command, TyperGroup):
            yield from _leaves(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def _section(command: TyperCommand | TyperGroup, path: str, common: Tables, *, level: int) -> Iterator[str]:
    """The part about a command or a group; `path` is what is typed to call it."""
    yield f"{'#' * level} {path}\n"
    arguments = "".join(
        f" {names(param)[0]}" if param.required else f" [{names(param)[0]}]"
        for param in command.params
        if isinstance(param, TyperArgument)
    )
    if isinstance(command, TyperCommand):
        yield f"    {path} [OPTIONS]{arguments}\n"
    for paragraph in paragraphs(command):
        match = EXAMPLE.fullmatch(paragraph)
        title = match["title"] if match else paragraph
        if title != "Example":
            yield f"{title}:\n" if match else f"{title}\n"
        if match:
            yield f"```sh\n{match['code']}\n```\n"
    if isinstance(command, TyperGroup):
        for name, each in below(command):
            yield from _section(each, f"{path} {name}", common, level=level + 1)
        return
    own = [row for panel, row in _rows(command) if row not in common.get(panel, {}).values()]
    yield from _table(own)
    shared = list(filter(None, (_reference(command, panel, rows) for panel, rows in common.items())))
    if shared:
        yield f"{'Also: ' if own else 'Options: '}{'; '.join(shared)}.\n"


def _reference(command: TyperCommand, panel: str, rows: Mapping[str, Row]) -> str:
    """Where the options of a panel are described that the command has in common with others; empty if it has none."""
    taken = [row[0] for where, row in _rows(command) if where == panel and rows.get(row[0]) == row]
    some = f": {', '.join(taken)}" if len(taken) < len(rows) else ""
    return f"[{panel}](#{_anchor(panel)}){some}" if taken else ""


def _rows(command: TyperCommand) -> Iterator[tuple[str, Row]]:
    """Every option as it stands in a table, with its panel; none is one that belongs to the command alone."""
    for param in command.params:
        if not isinstance(param, TyperOption | TyperArgument) or param.hidden:
            continue
        variable = f"`{param.envvar}`" if isinstance(param.envvar, str) else ""
        panel = param.rich_help_panel or (ARGUMENTS if isinstance(param, TyperArgument) else "")
        yield (
            panel,
            (_names(param), _cell(default(param.default)), variable, _cell(param.help or "").replace("<", "&lt;")),
        )


def _table(rows: Iterable[Row]) -> Iterator[str]:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if lines:
        yield "\n".join(["| option | default | variable | what it does |", "|---|---|---|---|", *lines, ""])


def _names(param: Param) -> str:
    """How it is typed, a value's name or choices with it."""
    *others, last = names(param)
    return _cell(", ".join([*(f"`{name}`" for name in others), f"`{f'{last} {value(param)}'.rstrip()}`"]))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _anchor(title: str) -> str:
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def main() -> int:
    """Write the page."""
    TARGET.write_text(render(command_line()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
