"""Where the lines of a stream of words break: at spaces, by a width that may change at any time. Knows no terminal.

A word is written as it comes, letter by letter, except near the edge, where it waits until it is known to fit.
"""

import re
from collections.abc import Callable, Iterator

from qrun.cli.markdown import Span

EDGE = 16
"""A word that begins in the last so many columns waits for its end."""
TAB = " " * 4

# Characters of scripts without spaces: a line may break before each, but not before the punctuation among them.
_WIDE = (
    "\u1100-\u115f\u2e80-\u3000\u3003-\u3007\u3012\u3013\u3020-\ua4cf\uac00-\ud7a3\uf900-\ufaff\U00020000-\U0003fffd"
)
_RUNS = re.compile(rf"\n|[ \t]+|[{_WIDE}]|[^\s{_WIDE}]+|\s")


class Wrapper:
    """Breaks lines.

    Attributes:
        hang: what a continuation of the present line begins with.
        column: where the next character goes, from 0.
    """

    def __init__(self, width: Callable[[], int], measure: Callable[[str], int]) -> None:
        """width: the page's columns, asked again for every word. measure: the columns that a text takes."""
        self.hang = ""
        self.column = 0
        self._width = width
        self._measure = measure
        self._gap: Span | None = None  # blank space before the next word, if one follows on this line
        self._word: list[Span] = []  # what waits for the word's end
        self._cells = 0
        self._in_word = False
        self._waits = False

    def push(self, span: Span) -> Iterator[Span]:
        """The text and what was waiting, as far as its place is known, with line ends put in."""
        for run in _RUNS.findall(span.text):
            if run == "\n":
                yield from self.flush()
                yield Span("\n")
                self.column, self.hang = 0, ""
            elif run.isspace():
                yield from self._end_word()
                self._gap = Span((self._gap.text if self._gap else "") + run.replace("\t", TAB), span.styles)
            else:
                if len(run) == 1 and re.match(f"[{_WIDE}]", run):
                    yield from self._end_word()
                yield from self._put(Span(run, span.styles))

    def flush(self) -> Iterator[Span]:
        """What was waiting; blank space at the end is dropped."""
        yield from self._end_word()
        self._gap = None

    def _put(self, span: Span) -> Iterator[Span]:
        width = self._width()
        if self.column > width:  # the window was made narrower, and the terminal broke the line
            self.column = (self.column - 1) % width + 1
        if not self._in_word:
            gap = self._measure(self._gap.text) if self._gap else 0
            self._in_word, self._cells = True, gap
            self._waits = self.column + gap > width - min(EDGE, width // 2)
            if not self._waits:
                yield from self._release()
        cells = self._measure(span.text)
        if not self._waits:
            self.column += cells
            yield span
            return
        self._word.append(span)
        self._cells += cells
        if self.column + self._cells > width and self.column > self._measure(self.hang):
            yield Span("\n" + self.hang)
            self.column, self._gap = self._measure(self.hang), None
            yield from self._release()

    def _release(self) -> Iterator[Span]:
        """Write what waits, here; the rest of the word follows at once."""
        spans = [*([self._gap] if self._gap else []), *self._word]
        self.column += sum(self._measure(span.text) for span in spans)
        self._gap, self._word, self._waits = None, [], False
        yield from spans

    def _end_word(self) -> Iterator[Span]:
        if self._in_word:
            yield from self._release()
        self._in_word = False
