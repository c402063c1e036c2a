"""`qrun chat`: a conversation on the terminal. It knows turns and keys; the commands are in `chat_commands`."""

import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qrun.cli import card as cards
from qrun.cli import sessions
from qrun.cli.console import Console
from qrun.cli.interrupt import StopOnce, ends_in_order, marked_pastes, unbroken, unseen_keys
from qrun.cli.options import OUTPUT_PANEL, ModelOptions
from qrun.cli.prompts import clean, gather
from qrun.cli.sampling_options import SamplingOptions
from qrun.cli.start import open_session
from qrun.errors import QrunError, UsageError
from qrun.transcript import read_transcript

if TYPE_CHECKING:
    from qrun.engine import Engine
    from qrun.reasoning import Delta
    from qrun.reply import Reply
    from qrun.session import Session

SESSION_PANEL = "Saved chats"
TWICE_SECONDS = 2.0
"""A second Ctrl-C this soon after the one that stopped a reply was meant to quit."""


def chat(
    *,
    model: ModelOptions,
    sampling: SamplingOptions,
    go_on: Annotated[
        bool,
        typer.Option(
            "-C",
            "--continue",
            envvar="QRUN_CONTINUE",
            help="Go on with the last chat, its model and settings, but for what is given now.",
            rich_help_panel=SESSION_PANEL,
        ),
    ] = False,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="NAME",
            help="Go on with this chat: a name that --sessions lists, or a file of /save.",
            rich_help_panel=SESSION_PANEL,
        ),
    ] = None,
    list_them: Annotated[
        bool,
        typer.Option(
            "--sessions", envvar="QRUN_SESSIONS", help="List the last chats and exit.", rich_help_panel=SESSION_PANEL
        ),
    ] = False,
    save: Annotated[
        bool,
        typer.Option("--save/--no-save", help="Keep the chat after every turn.", rich_help_panel=SESSION_PANEL),
    ] = True,
    keep_kv: Annotated[
        bool,
        typer.Option(
            "--keep-kv", help="On leaving, keep the cache too: nothing is read again.", rich_help_panel=SESSION_PANEL
        ),
    ] = False,
    markdown: Annotated[
        bool,
        typer.Option(
            "--markdown/--plain", help="Show markdown, on a terminal, or the plain text.", rich_help_panel=OUTPUT_PANEL
        ),
    ] = True,
    typed: frozenset[str] = frozenset(),
) -> None:
    """Talk with a model. With no MODEL, with spark, which ships with qrun.

    In the chat, /help lists the commands, Ctrl-C stops a reply, Ctrl-D leaves. Without a terminal, the whole of stdin
    is one prompt: it is answered, and qrun exits.

    Example:  qrun chat ernie:0.3b --wint4 --kv int8
    """
    console = Console(quiet=model.quiet, verbose=model.verbose)
    if list_them:
        console.raw("".join(f"{line}\n" for line in sessions.described()))
        return
    if go_on and resume is not None:
        raise UsageError("--continue and --resume contradict each other: give one of them")
    earlier = sessions.find(resume) if resume is not None else sessions.latest() if go_on else None
    transcript = read_transcript(earlier) if earlier is not None else None
    if transcript is not None:
        model = sessions.resumed(model, transcript, typed)
    model.check()
    sampling.check()
    if not console.interactive:
        if earlier is not None:
            raise UsageError("--continue and --resume need a terminal: in a script, use qrun generate --jsonl")
        from qrun.cli.generate import answer

        text = gather(None, (), console, dash=True)
        engine, session = open_session(model, sampling, console)
        answer(engine, session, text, console)
        return
    engine, session = open_session(model, sampling, console)
    talk = Chat(engine, session, console, about=sessions.about(model), keep=save, keep_kv=keep_kv)
    talk.commands.markdown = markdown and console.renders
    if earlier is not None and transcript is not None:
        talk.resume(earlier, transcript.about.get("settings", {}), typed)
        if "system" in typed:
            session.set_system(sampling.system)
    console.note("/help lists the commands, Ctrl-C stops a reply, Ctrl-D leaves")
    talk.run()


class Chat:
    """One conversation at a terminal: read a message or a command, write a reply, again."""

    def __init__(
        self, engine: "Engine", session: "Session", console: Console, *,
        about: dict[str, object], keep: bool = True, keep_kv: bool = False,
    ) -> None:  # fmt: skip
        """about: what `sessions.resumed` needs later. keep, keep_kv: whether the chat, and its cache, is kept."""
        from qrun.cli.chat_commands import Commands
        from qrun.cli.editor import LineEditor

        self.engine = engine
        self.session = session
        self.console = console
        self.file = sessions.ChatFile() if keep else None
        self.commands = Commands(engine, session, console, file=self.file, about=self._about_now)
        self.editor = LineEditor(self.commands.names(), console)
        self._about = about
        self._keeps_kv = keep_kv
        self._warned = False
        self._stopped_at = 0.0

    def resume(self, path: Path, settings: object, typed: frozenset[str]) -> None:
        """Take up a saved conversation, with its settings but for what was typed as options, and its cache if it fits.

        Raises:
            UsageError: the file cannot be used.
        """
        from qrun.cli.settings import restore

        self.session.load(path)
        restore(self.session, settings, typed)
        if self.file is not None and not self.file.resume(path) and path.parent == sessions.folder():
            self.console.warn(f"{path.stem} is open elsewhere, or cannot be locked: this chat goes on as a copy")
        self.commands.loaded(path)

    def run(self) -> None:
        """Take turns until the person leaves.

        Raises:
            KeyboardInterrupt: Ctrl-C twice during a reply.
            SystemExit: the program was asked to end, or the terminal was closed.
        """
        with unseen_keys(), ends_in_order():
            try:
                self._turns()
            except KeyboardInterrupt:
                self._leave()
                raise
            else:
                self._leave()
            finally:
                if self.file is not None:
                    self.file.leave()

    def _turns(self) -> None:
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
        else:
            self._keep()
        return outcome.leave

    def _write(self, delta: "Delta") -> None:
        if delta.kind == "answer":
            (self.console.markdown if self.commands.markdown else self.console.text)(delta.text)
        elif self.commands.show_reasoning:
            self.console.reasoning(delta.text)

    def _reply(self, start: "Callable[[], Reply]") -> None:
        with StopOnce() as interrupt, marked_pastes(), self.console.waiting("reading") as waiting:
            reply = start()
            waiting.watch = lambda: reply.progress
            try:
                for delta in reply:
                    interrupt.reading = False
                    waiting.stop()
                    self._write(delta)
                    if interrupt.requested:
                        break
            except KeyboardInterrupt:
                if interrupt.again:
                    raise
            finally:
                with unbroken():
                    reply.close()
                    self._keep()
                waiting.stop()
                self.console.end_text()
        if reply.finish_reason == "cancelled":
            self._stopped_at = time.monotonic()
        self.commands.replied(reply)
        self.console.note(cards.stats_line(reply.stats, reply.finish_reason))

    def _about_now(self) -> dict[str, object]:
        from qrun.cli.settings import changed

        now = datetime.now().astimezone().isoformat(timespec="seconds")
        return self._about | {"kv": self.engine.card.kv, "settings": changed(self.session), "saved": now}

    def _keep(self) -> None:
        """Save the conversation as it is now. A full disk costs the file, not the conversation."""
        if self.file is None:
            return
        try:
            self.file.save(self.session, self._about_now())
        except QrunError as error:
            if not self._warned:
                self.console.warn(f"this chat is not kept: {error}")
            self._warned = True

    def _leave(self) -> None:
        """Keep the cache if that was asked for, and say how to go on."""
        if self.file is None or self.file.path is None:
            return
        if self._keeps_kv and self.file.path.exists():
            with self.console.waiting("keeping the cache"):
                try:
                    self.session.snapshot(sessions.snapshot_of(self.file.path))
                except QrunError as error:
                    self.console.warn(str(error))
        self.console.note("qrun chat --continue goes on with this chat")
