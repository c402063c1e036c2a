"""Markdown that is never taken back: the same however it is cut, nothing lost, and shown as soon as it is certain."""

import io
import random
from collections.abc import Iterable, Sequence

import pytest
from rich.cells import cell_len

from qrun.cli import markdown
from qrun.cli.console import Page
from qrun.cli.markdown import CodeLine, Hang, MarkdownStream, Piece, Rule, Span, Table
from qrun.cli.wrap import Wrapper

PARTS = [
    "**", "*", "***", "```", "\n", "| a | b |\n", "|---|:-:|\n", "[x](y)", "# ", "- ", "1. ", "> ", "---\n", "``",
    "`", "~~", "a", "word ", "\\*", "* * *\n", "```py\n", "\n\n", "  ", "12", "x*y", "\\", "中文，", "_", "(", "]",
    "| ", "\t",
]  # fmt: skip


def pieces(text: str, cuts: Sequence[int] = ()) -> list[Piece]:
    """What comes of a text in parts, neighbours of one look joined."""
    stream = MarkdownStream()
    parts = [part for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True) for part in stream.push(text[a:b])]
    return joined([*parts, *stream.flush()])


def joined(parts: Iterable[Piece]) -> list[Piece]:
    out: list[Piece] = []
    for part in parts:
        last = out[-1] if out else None
        if isinstance(part, Span) and isinstance(last, Span) and last.styles == part.styles:
            out[-1] = Span(last.text + part.text, part.styles)
        elif part != Span(""):
            out.append(part)
    return out


def shown(parts: Iterable[Piece]) -> str:
    text = ""
    for part in parts:
        match part:
            case Span() | CodeLine():
                text += part.text
            case Table():
                text += "".join(span.text for row in part.rows for cell in row for span in cell)
            case Hang() | Rule():
                pass
    return text


def wrapped(parts: Iterable[Piece], width: int) -> str:
    wrapper = Wrapper(lambda: width, cell_len)
    text = ""
    for part in parts:
        match part:
            case Span():
                text += "".join(span.text for span in wrapper.push(part))
            case Hang():
                wrapper.hang = part.text
            case _:
                pass
    return text + "".join(span.text for span in wrapper.flush())


@pytest.mark.parametrize("hold", [6, markdown.HOLD])
def test_every_way_to_cut_gives_the_same_and_loses_nothing(hold: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markdown, "HOLD", hold)
    monkeypatch.setattr(markdown, "TABLE_LINES", 4)
    draw = random.Random(hold)
    for _ in range(700):
        text = "".join(draw.choice(PARTS) for _ in range(draw.randint(1, 25)))
        whole = pieces(text)
        letters = range(1, len(text))
        assert pieces(text, letters) == whole, text
        assert pieces(text, sorted(draw.sample(letters, min(len(letters), 4)))) == whole, text
        assert "".join(filter(str.isalnum, shown(whole))) == "".join(filter(str.isalnum, text)), text
        stream = MarkdownStream()
        single = [part for letter in text for part in stream.push(letter)]
        assert wrapped([*single, *stream.flush()], 13) == wrapped(whole, 13), text


STRONG, EMPH, CODE, MARK = ("strong",), ("emph",), ("code",), ("mark",)
LINES = {
    "plain, 2 * 3 and a_b_c": [Span("plain, 2 * 3 and a_b_c")],
    "a **b c** d": [Span("a "), Span("b c", STRONG), Span(" d")],
    "**b *c***": [Span("b ", STRONG), Span("c", STRONG + EMPH)],
    "_a_ and *b*": [Span("a", EMPH), Span(" and "), Span("b", EMPH)],
    "`` a`b ``": [Span("a`b", CODE)],
    "`x **y**`": [Span("x **y**", CODE)],
    "~~gone~~": [Span("gone", ("strike",))],
    "** not**, *open and `open": [Span("** not**, *open and `open")],
    "中文**粗体**中文": [Span("中文"), Span("粗体", STRONG), Span("中文")],
    r"\*no\* but \(x\) stays": [Span(r"*no* but \(x\) stays")],
    "f(*args, **kwargs) and __init__": [Span("f(*args, **kwargs) and __init__")],
    "see [it](http://a.b/c_(d)).": [
        Span("see "), Span("it", ("link",)), Span(" (http://a.b/c_(d))", ("url",)), Span("."),
    ],
    "[1], [x] and ![a](b)": [Span("[1], [x] and !"), Span("a", ("link",)), Span(" (b)", ("url",))],
    "- one": [Span("•", MARK), Span(" "), Hang("  "), Span("one")],
    "  10) ten": [Span("  "), Span("10)", MARK), Span(" "), Hang("      "), Span("ten")],
    "#hash": [Span("#hash")],
    "## Head **x**": [Span("Head ", ("heading",)), Span("x", ("heading", "strong"))],
    "> > deep": [Span("│ ", MARK), Hang("│ "), Span("│ ", MARK), Hang("│ │ "), Hang("│ │ "), Span("deep")],
    "***": [Rule()],
    "-5 degrees": [Span("-5 degrees")],
    "a \x1b[2J": [Span("a ␛[2J")],
}  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_lines(line: str) -> None:
    found = [piece for piece in pieces(line) if piece != Hang("")]
    assert found == LINES[line]


def test_blocks() -> None:
    code = "```python\nx = '**a**'\n\n  # | b\n```\n"
    assert pieces(code + "after") == [
        Span("```python", MARK), Span("\n"),
        CodeLine("x = '**a**'", "python", True), Span("\n"),
        CodeLine("", "python", False), Span("\n"),
        CodeLine("  # | b", "python", False), Span("\n"),
        Span("```", MARK), Span("\n"), Hang(""), Span("after"),
    ]  # fmt: skip
    assert pieces("~~~\nopen")[-1] == CodeLine("open", "", True)
    (table,) = pieces("| a | `b` |\n|:--|--:|\n| 1 \\| 2 | |\n")
    assert table == Table(
        (((Span("a"),), (Span("b", CODE),)), ((Span("1 | 2"),), ())),
        ("left", "right"),
    )
    assert shown(pieces("| no | table |\nit was")) == "| no | table |\nit was"


def test_prose_comes_out_as_it_goes_in() -> None:
    stream = MarkdownStream()
    for word in ("He", "llo", " wor", "ld", ", a"):
        assert shown(stream.push(word)) == word
    assert shown(stream.push(" **bo")) == " "
    assert stream.push("ld") == []
    assert joined(stream.push("** x")) == [Span("bold", STRONG), Span(" x")]
    assert shown(stream.push(" *" + "y" * markdown.HOLD)) != ""  # no partner so far: only text


def test_lines_break_at_spaces_by_the_width_of_the_moment() -> None:
    assert wrapped(pieces("- one two three four five"), 14) == "• one two\n  three four\n  five"
    assert wrapped(pieces("> a quote that is long"), 12) == "│ a quote\n│ that is\n│ long"
    assert wrapped(pieces("中文没有空格，所以在哪里都可以断开"), 11) == "中文没有空\n格，所以在\n哪里都可以\n断开"
    assert wrapped(pieces("x" * 25 + " y"), 10) == "x" * 25 + " y"  # the terminal breaks it, and nothing is added
    assert wrapped(pieces("trailing  \nblank"), 40) == "trailing\nblank"
    width = 30
    wrapper = Wrapper(lambda: width, cell_len)
    text = "".join(span.text for word in ["word "] * 5 for span in wrapper.push(Span(word)))
    width = 12
    text += "".join(span.text for word in ["word "] * 5 for span in wrapper.push(Span(word)))
    assert text.startswith("word word word word word")
    assert max(map(len, text.split("\n")[1:])) <= 12


def test_a_page_without_colours_is_readable() -> None:
    out = io.StringIO()
    page = Page(out)
    text = "# T\nSome **bold** and a [link](u).\n\n| a | b |\n|---|---|\n| 1 | 中 |\n```py\ndef f(): # c\n```\n---\nend"
    for letter in text:
        page.write(letter)
    page.end()
    lines = [line.rstrip() for line in out.getvalue().split("\n")]
    assert lines == [
        "T", "Some bold and a link (u).", "", "a   b", "──────", "1   中",
        "```py", "def f(): # c", "```", "─" * 80, "end", "",
    ]  # fmt: skip
