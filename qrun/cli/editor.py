"""Reading a message from the keyboard: line editing, history, several lines. The one file that knows prompt_toolkit."""

import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output
from prompt_toolkit.output.color_depth import ColorDepth

from qrun.cli.interrupt import seen_keys
from qrun.errors import QrunError

if TYPE_CHECKING:
    from qrun.cli.console import Console

QUOTES = '"""'
"""Text between two of these may have several lines."""


class KeptHistory(FileHistory):
    """History in a file only its owner can read. A disk that is full loses the line, not the conversation."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        super().__init__(path)

    def store_string(self, string: str) -> None:
        try:
            super().store_string(string)
        except OSError:
            return


def open_history(console: "Console") -> History:
    """Return the history kept in the user's state directory, or one for this session if that cannot be written."""
    from qrun.paths import state_dir

    path = state_dir() / "history"
    try:
        return KeptHistory(path)
    except OSError as error:
        console.warn(f"no history is kept: {path}: {error.strerror or error}")
        return InMemoryHistory()


def is_open(text: str) -> bool:
    '''Return whether `text` begins with `"""` and waits for the second one.'''
    start = text.lstrip()
    return start.startswith(QUOTES) and not (len(start.rstrip()) >= 6 and start.rstrip().endswith(QUOTES))


def unquote(text: str) -> str:
    '''Return `text` without the `"""` around it, if they are there.'''
    inner = text.strip()
    if len(inner) >= 6 and inner.startswith(QUOTES) and inner.endswith(QUOTES):
        return inner[3:-3].strip("\n")
    return text


def edit(text: str) -> str:
    """Return what becomes of `text` in the user's editor, $VISUAL or $EDITOR.

    Raises:
        QrunError: the editor does not start, or ends with an error.
    """
    command = shlex.split(os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi")
    with tempfile.TemporaryDirectory(prefix="qrun-") as folder:
        path = Path(folder) / "message.md"
        path.write_text(text + "\n", encoding="utf-8")
        try:
            with seen_keys():
                code = subprocess.call([*command, str(path)])
        except OSError as error:
            raise QrunError(f"the editor {command[0]!r} does not start ({error.strerror}): set $EDITOR") from None
        if code != 0:
            raise QrunError(f"the editor {command[0]!r} ended with code {code}: the message is unchanged")
        return path.read_text(encoding="utf-8", errors="replace").removesuffix("\n")


def _continuation(width: int, line: int, wraps: int) -> FormattedText:
    """What stands before a further line: dots before a real one, nothing before one that only wraps."""
    return FormattedText([("ansigray", ("" if wraps else "... ").ljust(width))])


class LineEditor:
    """The prompt. Enter sends; Alt-Enter makes a new line, as does Enter between triple quotes; Ctrl-G opens $EDITOR.

    Pasted text keeps its lines (bracketed paste), Tab completes commands.
    """

    def __init__(self, commands: Mapping[str, str], console: "Console") -> None:
        on = sys.stderr if sys.stderr.isatty() else sys.stdout
        words = WordCompleter(list(commands), meta_dict=dict(commands), sentence=True)
        self._session: PromptSession[str] = PromptSession(
            history=open_history(console),
            output=create_output(stdout=on),
            color_depth=ColorDepth.MONOCHROME if os.environ.get("NO_COLOR") else None,
            completer=words,
            complete_while_typing=Condition(self._types_command),
            key_bindings=self._keys(),
            multiline=True,
            prompt_continuation=_continuation,
            enable_open_in_editor=False,
            tempfile_suffix=".md",
        )

    def read(self) -> str:
        """Return what was typed, without its triple quotes.

        Raises:
            EOFError: Ctrl-D on an empty line.
            KeyboardInterrupt: Ctrl-C on an empty line; elsewhere it only clears the line.
        """
        early: list[int] = []  # interrupts that came while the prompt was not yet, or no longer, listening

        def heed() -> None:
            if early:
                self._session.app.exit(exception=KeyboardInterrupt)

        before = signal.signal(signal.SIGINT, lambda number, frame: early.append(number))
        try:
            text = self._session.prompt(FormattedText([("bold ansigreen", ">>> ")]), pre_run=heed)
        finally:
            signal.signal(signal.SIGINT, before)
        if early:
            raise KeyboardInterrupt
        return unquote(text)

    def _types_command(self) -> bool:
        return self._session.default_buffer.text.startswith("/")

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()

        @keys.add("enter")
        def _(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            if buffer.complete_state is not None and buffer.complete_state.current_completion is not None:
                buffer.complete_state = None
            elif is_open(buffer.text):
                buffer.insert_text("\n")
            else:
                buffer.validate_and_handle()

        @keys.add("escape", "enter")
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add("c-c")
        def _(event: KeyPressEvent) -> None:
            if event.current_buffer.text:
                event.current_buffer.reset()
            else:
                event.app.exit(exception=KeyboardInterrupt)

        @keys.add("c-d", filter=Condition(lambda: not self._session.default_buffer.text))
        def _(event: KeyPressEvent) -> None:
            event.app.exit(exception=EOFError)

        @keys.add("c-g")
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.open_in_editor()

        return keys
