"""`qrun chat`: a conversation on the terminal. It knows turns and keys; the commands are in `chat_commands`."""

import time
from typing import TYPE_CHECKING

from qrun.cli import card as cards
from qrun.cli.console import Console
from qrun.cli.interrupt import StopOnce, unseen_keys
from qrun.cli.options import ModelOptions
from qrun.cli.prompts import clean, gather
from qrun.cli.sampling_options import SamplingOptions
from qrun.cli.start import open_session
from qrun.errors import QrunError

if TYPE_CHECKING:
    from collections.abc import Callable

    from qrun.engine import Engine
    from qrun.reply import Reply
    from qrun.session import Session

TWICE_SECONDS = 2.0
"""A second Ctrl-C this soon after the one that stopped a reply was meant to quit."""


def chat(model: ModelOptions, sampling: SamplingOptions) -> None:
    """Talk with a model. With no MODEL, with spark, which ships with qrun.

    In the chat, /help lists the commands, Ctrl-C stops a reply, Ctrl-D leaves. Without a terminal, the whole of stdin
    is one prompt: it is answered, and qrun exits.

    Example:  qrun chat ernie:0.3b --wint4 --kv int8
    """
    console = Console(quiet=model.quiet, verbose=model.verbose)
    model.check()
    sampling.check()
    if not console.interactive:
        from qrun.cli.generate import answer

        text = gather(None, (), console, dash=True)
        engine, session = open_session(model, sampling, console)
        answer(engine, session, text, console)
        return
    engine, session = open_session(model, sampling, console)
    console.note("/help lists the commands, Ctrl-C stops a reply, Ctrl-D leaves")
    Chat(engine, session, console).run()


class Chat:
    """One conversation at a terminal: read a message or a command, write a reply, again."""

    def __init__(self, engine: "Engine", session: "Session", console: Console) -> None:
        from qrun.cli.chat_commands import Commands
        from qrun.cli.editor import LineEditor

        self.session = session
        self.console = console
        self.commands = Commands(engine, session, console)
        self.editor = LineEditor(self.commands.names(), console)
        self._stopped_at = 0.0

    def run(self) -> None:
        """Take turns until the person leaves.

        Raises:
            KeyboardInterrupt: Ctrl-C twice during a reply.
        """
        while True:
            try:
                text = clean(self.editor.read())
            except EOFError:
                return
            except KeyboardInterrupt:
                if time.monotonic() - self._stopped_at < TWICE_SECONDS:
                    raise
                self.console.say("(Ctrl-D or /exit leaves, /help lists the commands)", style="dim")
                continue
            if not text.strip():
                continue
            try:
                if self._turn(text):
                    return
            except QrunError as error:
                self.console.error(str(error))

    def _turn(self, text: str) -> bool:
        """Run a command or answer a message; returns whether to leave."""
        if not text.startswith("/"):
            message = self.commands.take_attachments(text)
            self._reply(lambda: self.session.stream(message))
            return False
        outcome = self.commands.run(text)
        if outcome.message is not None:
            edited = outcome.message
            self._reply(lambda: self.session.stream(edited))
        elif outcome.regenerate:
            self._reply(self.session.regenerate)
        return outcome.leave

    def _write(self, kind: str, text: str) -> None:
        if kind == "answer":
            self.console.text(text)
        elif self.commands.show_reasoning:
            self.console.reasoning(text)

    def _reply(self, start: "Callable[[], Reply]") -> None:
        with StopOnce() as interrupt, unseen_keys(), self.console.waiting("reading") as waiting:
            reply = start()
            try:
                for delta in reply:
                    interrupt.reading = False
                    waiting.stop()
                    self._write(delta.kind, delta.text)
                    if interrupt.requested:
                        break
            except KeyboardInterrupt:
                if interrupt.again:
                    raise
            finally:
                reply.close()
                waiting.stop()
                self.console.end_text()
        if reply.finish_reason == "cancelled":
            self._stopped_at = time.monotonic()
        self.commands.replied(reply)
        self.console.note(cards.stats_line(reply.stats, reply.finish_reason))
