"""Markdown while it streams: text in, styled pieces out that never have to be taken back. Knows no terminal.

Prose comes out as it goes in. Held back is only what the next characters decide: the marks that begin a line, an
inline mark until its partner comes (for `HOLD` characters, within its line), a line of a code block, a table until it
ends. What turns out to be no markup is text as it stands; the lines of the source stay lines. No letter or digit is
ever dropped, and how the text was cut into pieces makes no difference.
"""

import re
from dataclasses import dataclass, field
from typing import TypeAlias

from qrun.cli.sanitize import printable

HOLD = 240
"""Characters after which an opening mark whose partner has not come is only text."""
TABLE_LINES = 200
"""Lines of a table that are held back at most."""


@dataclass(frozen=True)
class Span:
    """Text of one look within a line, or a line's end; styles are `strong`, `emph`, `code`, `heading` and so on."""

    text: str
    styles: tuple[str, ...] = ()


@dataclass(frozen=True)
class Hang:
    """What a line's continuations begin with, should it be broken; the line's end ends it."""

    text: str


@dataclass(frozen=True)
class CodeLine:
    """A line of a fenced block, without its end; `first` is the block's first one."""

    text: str
    language: str
    first: bool


@dataclass(frozen=True)
class Rule:
    """A line across the page; its own end included."""


@dataclass(frozen=True)
class Table:
    """Rows of cells, the header first; `align` is left, center or right for each column. Its own end is included."""

    rows: tuple[tuple[tuple[Span, ...], ...], ...]
    align: tuple[str, ...]


Piece: TypeAlias = Span | Hang | CodeLine | Rule | Table

# A beginning of a line that more characters may still turn into a mark, or make longer.
_UNDECIDED = re.compile(
    r"[ \t]*(?:#{0,6}[ \t]*|\d{1,9}(?:[.)][ \t]*)?|\+[ \t]*|([-*_])(?:[ \t]*\1)*[ \t]*|>|"
    r"`{1,2}|~{1,2}|```[^`]*|~~~.*|\|.*)"
)
_FENCE = re.compile(r"[ \t]*(```+|~~~+)[ \t]*([^\s`]*)[^`]*")
_RULE = re.compile(r" {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}")
_HEADING = re.compile(r" {0,3}#{1,6}[ \t]+")
_QUOTE = re.compile(r"[ \t]*> ?")
_ITEM = re.compile(r"([ \t]*)([-+*]|\d{1,9}[.)])([ \t]+)")
_ALIGN = re.compile(r"[ \t]*\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*")

_SPECIAL = re.compile(r"[\\`*_~\[]")
_ESCAPED = "`*_~#>|"
_LINK = re.compile(r'\[([^\[\]]*)\]\(([^\s()]*(?:\([^()]*\)[^\s()]*)?)((?:\s+"[^"]*")?)\)')
_LINK_BEGUN = re.compile(r'\[[^\[\]]*(?:\](?:\([^\s()]*(?:\([^()]*(?:\)[^\s()]*)?)?(?:\s+(?:"[^"]*"?)?)?)?)?')
_STYLES = {"*": ("emph",), "_": ("emph",), "**": ("strong",), "***": ("strong", "emph"), "~~": ("strike",)}


@dataclass
class MarkdownStream:
    """One text on its way. `push` gives what became certain, `flush` the rest."""

    _held: str = ""
    _state: str = "start"  # of a line; then inline, or code between fences
    _out: list[Piece] = field(default_factory=list[Piece])
    _styles: tuple[str, ...] = ()
    _hang: str = ""
    _before: str = ""  # the character before what is held, within its line
    _fence: str = ""
    _language: str = ""
    _first: bool = False
    _table: list[str] = field(default_factory=list[str])

    def push(self, text: str) -> list[Piece]:
        """Return the pieces that are certain now. Control characters come out as visible signs."""
        self._held += printable(text)
        return self._take(final=False)

    def flush(self) -> list[Piece]:
        """Return what was held back, now that nothing follows."""
        pieces = self._take(final=True)
        if self._table:
            self._end_table()
            pieces += self._take(final=True)
        return pieces

    def _take(self, *, final: bool) -> list[Piece]:
        while self._held and self._step(final):
            pass
        out, self._out = self._out, []
        return out

    def _step(self, final: bool) -> bool:
        """Handle one part of what is held; False when more text is needed."""
        line, newline, rest = self._held.partition("\n")
        whole = final or bool(newline)
        if self._state == "inline":
            spans, used = inline(line, final=whole, before=self._before, styles=self._styles)
            self._out += spans
            self._before = line[used - 1 : used] or self._before
            self._held = self._held[used:]
            if used == len(line) and newline:
                self._end_line(rest)
                return True
            return used > 0
        if self._state == "code":
            if whole:
                self._code(line, newline, rest)
            return whole
        return (whole or not _UNDECIDED.fullmatch(line)) and self._begin(line, newline, rest, whole)

    def _end_line(self, rest: str) -> None:
        self._out.append(Span("\n"))
        self._state, self._held, self._styles, self._hang, self._before = "start", rest, (), "", ""

    def _code(self, line: str, newline: str, rest: str) -> None:
        closing = line.strip()
        if len(closing) >= len(self._fence) and not closing.strip(self._fence[0]):
            self._out.append(Span(line, ("mark",)))
            self._state = "start"
        else:
            self._out.append(CodeLine(line, self._language, self._first))
            self._first = False
        self._held = rest
        if newline:
            self._out.append(Span("\n"))

    def _begin(self, line: str, newline: str, rest: str, whole: bool) -> bool:
        """The beginning of a line, now that it is known what it is."""
        quoted = bool(self._hang)
        if line.lstrip().startswith("|") and not quoted:
            if not whole:
                return False
            return self._row(line, newline, rest)
        if self._table:
            self._end_table()
            return True
        if not line.strip():
            self._held = ""
            if newline:
                self._end_line(rest)
            return True
        if not quoted and (found := _FENCE.fullmatch(line)):
            if not whole:
                return False
            self._fence, self._language, self._first = found[1], found[2], True
            self._out += [Span(line, ("mark",)), *([Span("\n")] if newline else [])]
            self._state, self._held = "code", rest
            return True
        if not quoted and _RULE.fullmatch(line):
            self._out.append(Rule())
            self._held = rest
            return True
        self._mark(line)
        return True

    def _mark(self, line: str) -> None:
        """What stands before the text of a line: a quote, a heading, an item, or indentation."""
        if found := _QUOTE.match(line):
            self._out.append(Span("│ ", ("mark",)))
            self._hang += "│ "
        elif found := _HEADING.match(line):
            self._styles, self._state = ("heading",), "inline"
        elif found := _ITEM.match(line):
            bullet = found[2] if found[2][0].isdigit() else "•"
            self._out += [Span(found[1]), Span(bullet, ("mark",)), Span(found[3])]
            self._hang += " " * (len(found[1]) + len(bullet) + len(found[3]))
            self._state = "inline"
        else:
            found = re.match(r"[ \t]*", line)
            assert found is not None  # it matches anything
            self._out.append(Span(found[0]))
            self._hang += " " * len(found[0])
            self._state = "inline"
        self._out.append(Hang(self._hang))
        self._held = self._held[found.end() :]

    def _row(self, line: str, newline: str, rest: str) -> bool:
        """A line that begins with a bar: of a table, if the second such line says so."""
        if (len(self._table) == 1 and not _ALIGN.fullmatch(line)) or len(self._table) == TABLE_LINES:
            self._end_table()
            return True
        self._table.append(line + newline)
        self._held = rest
        return True

    def _end_table(self) -> None:
        lines, self._table = self._table, []
        if len(lines) > 1:
            align = tuple(
                "center" if mark.startswith(":") and mark.endswith(":") else "right" if mark.endswith(":") else "left"
                for mark in _cells(lines[1])
            )
            rows = [tuple(tuple(inline(cell, final=True)[0]) for cell in _cells(row)) for row in [lines[0], *lines[2:]]]
            self._out.append(Table(tuple(rows), align))
        else:
            self._state, self._held = "inline", "".join(lines) + self._held


def _cells(row: str) -> list[str]:
    bare = re.sub(r"(?<!\\)\|$", "", row.strip().removeprefix("|"))
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", bare)]


def inline(text: str, *, final: bool, before: str = "", styles: tuple[str, ...] = ()) -> tuple[list[Span], int]:
    """Return the spans of a part of a line, and how many characters are in them; the rest needs more text.

    final: the line ends with `text`. before: the character before it.
    """
    spans: list[Span] = []
    begun = at = 0
    while found := _SPECIAL.search(text, at):
        at = found.start()
        inner = _marked(text, at, final=final, before=text[at - 1 : at] or before, styles=styles)
        if inner is None:
            break
        marked, length = inner
        if marked is not None:
            spans += [*_span(text[begun:at], styles), *marked]
            begun = at + length
        at += length
    else:
        at = len(text)
    spans += _span(text[begun:at], styles)
    return spans, at


def _span(text: str, styles: tuple[str, ...]) -> list[Span]:
    return [Span(text, styles)] if text else []


def _marked(
    text: str, at: int, *, final: bool, before: str, styles: tuple[str, ...]
) -> tuple[list[Span] | None, int] | None:
    """What the special character at `at` begins: spans and their length, None and a length of text, or None: wait."""
    sign = text[at]
    if sign == "\\":
        following = text[at + 1 : at + 2]
        if following and following in _ESCAPED:
            return [Span(following, styles)], 2
        return (None, len(following) + 1) if following or final else None
    if sign == "[":
        found = _LINK.match(text, at)
        if found and found.end() - at <= HOLD:
            return _link(found, styles), found.end() - at
        if not final and len(text) - at <= HOLD and _LINK_BEGUN.fullmatch(text, at):
            return None
        return None, 1
    run = len(text) - at - len(text[at:].lstrip(sign))
    if at + run == len(text) and not final:
        return None
    mark = sign * run
    if sign == "`":
        closing = rf"(?<!`)`{{{run}}}(?!`)"
    elif mark in _STYLES and not text[at + run : at + run + 1].isspace() and not (run == 1 and before.isalnum()):
        closing = rf"(?<![\s\\{re.escape(sign)}]){re.escape(sign)}{{{run}}}(?!{re.escape(sign)})"
        if run < 3 and sign == "*":
            closing = rf"(?<![\s\\*])(?:\*{{{3 - run}}})?\*{{{run}}}(?!\*)"
    else:
        return None, run
    if sign == "_":
        closing += r"(?!\w)"
    end = _end_of(closing, text, at + run + (sign != "`"))
    if end is not None and end - at <= HOLD:
        if end == len(text) and not final:
            return None
        body = text[at + run : end - run]
        if sign == "`":
            return [Span(_code_text(body), (*styles, "code"))], end - at
        return inline(body, final=True, before=sign, styles=(*styles, *_STYLES[mark]))[0], end - at
    return (None, run) if final or len(text) - at > HOLD else None


def _end_of(closing: str, text: str, start: int) -> int | None:
    found = re.compile(closing).search(text, start)
    return found.end() if found else None


def _code_text(body: str) -> str:
    padded = body.startswith(" ") and body.endswith(" ") and body.strip()
    return body[1:-1] if padded else body


def _link(found: re.Match[str], styles: tuple[str, ...]) -> list[Span]:
    label = inline(found[1], final=True, before="[", styles=(*styles, "link"))[0]
    if found[1] == found[2] and not found[3]:
        return label
    return [*label, Span(f" ({found[2]}{found[3]})", (*styles, "url"))]
