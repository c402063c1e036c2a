"""The slash commands of a chat, as one table. They change the session; they read no keys and write no replies."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qrun.cli import card as cards
from qrun.cli import sessions
from qrun.cli.console import Console
from qrun.cli.prompts import read_file
from qrun.cli.settings import change, described, switch
from qrun.errors import QrunError, UsageError

if TYPE_CHECKING:
    from qrun.engine import Engine
    from qrun.reply import Reply
    from qrun.session import Session

KEYS = (
    ("Enter", "send the message"),
    ("Alt-Enter", 'a new line; so is Enter between """ and """'),
    ("Ctrl-C", "stop the reply and keep what was written; twice: quit"),
    ("Ctrl-G", "write the message in $EDITOR"),
    ("Ctrl-R", "search the history; the arrow keys walk through it"),
    ("Ctrl-D", "leave"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the chat does after a command: nothing, send a message, answer again, or leave."""

    message: str | None = None
    regenerate: bool = False
    leave: bool = False


@dataclasses.dataclass(frozen=True)
class Command:
    """A command under each of its names; `usage` is what may follow, `help` one line."""

    names: tuple[str, ...]
    usage: str
    help: str
    run: Callable[[str], Outcome | None]


class Commands:
    """The commands on one session.

    Attributes:
        last: the last reply, for `/stats`.
        show_reasoning: whether a thinking model's reasoning is written.
        markdown: whether answers are shown as markdown.
    """

    def __init__(
        self, engine: "Engine", session: "Session", console: Console, *,
        file: sessions.ChatFile | None = None, about: Callable[[], Mapping[str, object]] = dict[str, object],
    ) -> None:  # fmt: skip
        """file: where the chat is kept, if it is. about: what a saved conversation says of its model and settings."""
        self.engine = engine
        self.session = session
        self.console = console
        self.file = file
        self.about = about
        self.last: Reply | None = None
        self.show_reasoning = True
        self.markdown = False
        self._attached: list[str] = []
        self._totals = cards.Totals()
        self.table = (
            Command(("/help", "/?"), "", "this list", self._help),
            Command(("/exit", "/quit", "/bye"), "", "leave", lambda _: Outcome(leave=True)),
            Command(("/clear",), "", "forget the conversation, keep the settings", self._clear),
            Command(("/regen",), "", "write the last answer again", self._regen),
            Command(("/undo",), "", "take back the last message and its answer", self._undo),
            Command(("/edit",), "", "change the last message in $EDITOR and send it again", self._edit),
            Command(("/system",), "TEXT", "set the system prompt; without TEXT, show it; off removes it", self._system),
            Command(("/set",), "NAME VALUE", "change a setting, as in /set temperature 0.5", self._set),
            Command(("/show",), "[messages]", "show the model and the settings, or the conversation", self._show),
            Command(
                ("/save",), "FILE [kv]", "keep the conversation, as in /save chat.json; kv: its cache too", self._save
            ),
            Command(("/load",), "FILE", "bring back a conversation: a file, or one that /sessions lists", self._load),
            Command(("/sessions",), "", "list the last chats; qrun chat --resume goes on with one", self._sessions),
            Command(("/stats",), "", "tokens, speed and memory of this chat", self._stats),
            Command(
                ("/think",), "[on|off|show|hide]", "let a thinking model reason or not; show or hide it", self._think
            ),
            Command(("/read",), "FILE", "put a file's text before your next message", self._read),
            Command(("/kv",), "[FORMAT]", "show the cache, or change its format, as in /kv int8", self._kv),
        )

    def names(self) -> dict[str, str]:
        """Return every command name with its help, for completion."""
        return {name: command.help for command in self.table for name in command.names}

    def run(self, line: str) -> Outcome:
        """Run the command in `line`.

        Raises:
            UsageError: there is no such command, or its argument is wrong; nothing is sent to the model.
        """
        name, _, rest = line.strip().partition(" ")
        for command in self.table:
            if name.lower() in command.names:
                return command.run(rest.strip()) or Outcome()
        near = difflib.get_close_matches(name.lower(), list(self.names()), 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"there is no command {name}: {hint}/help lists them; begin with a space to send it as text")

    def replied(self, reply: "Reply") -> None:
        """Take note of a finished reply, for `/stats`."""
        self.last = reply
        self._totals.add(reply.stats)

    def take_attachments(self, text: str) -> str:
        """Return `text` after the files that `/read` put aside; they are used up."""
        parts, self._attached = [*self._attached, text], []
        return "\n\n".join(parts)

    def _help(self, rest: str) -> None:
        rows = [(" ".join([", ".join(command.names), command.usage]).strip(), command.help) for command in self.table]
        for left, right in [*rows, *KEYS]:
            self.console.say(f"  {left:<27} {right}")

    def _clear(self, rest: str) -> None:
        self.session.clear()
        self._attached.clear()
        kept = self.file.path if self.file is not None else None
        self.console.note("the conversation is forgotten" + (f"; /load {kept.stem} brings it back" if kept else ""))
        if self.file is not None:
            self.file.leave()

    def _last_message(self) -> str:
        for message in reversed(self.session.messages):
            if message["role"] == "user":
                return message["content"]
        raise UsageError("there is no message yet: write one first")

    def _regen(self, rest: str) -> Outcome:
        self._last_message()
        return Outcome(regenerate=True)

    def _undo(self, rest: str) -> None:
        message = self._last_message()
        self.session.undo()
        self.console.note(f"taken back: {message[:60]}")

    def _edit(self, rest: str) -> Outcome:
        from qrun.cli.editor import edit

        text = edit(self._last_message())
        if not text.strip():
            raise UsageError("the edited message is empty: nothing was changed")
        self.session.undo()
        self.console.note(f">>> {text}")
        return Outcome(message=text)

    def _system(self, rest: str) -> None:
        if rest:
            self.session.set_system(None if rest == "off" else rest)
        self.console.say(f"system prompt: {self.session.system or 'none'}", style="dim")

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if not name:
            self._settings()
            return
        if name.lower() == "markdown":
            wanted = switch(name, value.strip())
            if wanted and not self.console.renders:
                raise UsageError("this terminal cannot show markdown: TERM=dumb, or stdout is no terminal")
            self.markdown = wanted
        else:
            change(self.session, name, value.strip())
        self._settings(only=name.lower())

    def _settings(self, only: str | None = None) -> None:
        view = [("markdown", "on" if self.markdown else "off")]
        for name, value in view if only == "markdown" else described(self.session, only):
            self.console.say(f"  {name:<18} {value}")
        if only is None:
            self.console.say(f"  {view[0][0]:<18} {view[0][1]}")

    def _show(self, rest: str) -> None:
        if rest == "messages":
            for message in self.session.messages:
                self.console.say(f"{message['role']}:", style="bold")
                self.console.say(message["content"])
            return
        if rest:
            raise UsageError(f"/show {rest} does not exist: /show, or /show messages")
        card = self.engine.card
        self.console.say("".join(cards.title(card)), style="bold")
        for title, value in cards.rows(card):
            self.console.say(f"  {title:<9}{value}")
        self._settings()

    def _path(self, command: str, rest: str) -> Path:
        if not rest:
            raise UsageError(f"{command} needs a file: {command} chat.json")
        return Path(rest.strip("'\"")).expanduser()

    def _save(self, rest: str) -> None:
        name = f" {rest}".removesuffix(" kv").strip()
        path, cache = self._path("/save", name), name != rest
        self.session.save(path, about=self.about())
        if cache:
            self.session.snapshot(sessions.snapshot_of(path))
        self.console.note(f"saved in {path}" + (f" and {sessions.snapshot_of(path).name}" if cache else ""))

    def _load(self, rest: str) -> None:
        path = sessions.find(str(self._path("/load", rest)))
        self.session.load(path)
        if self.file is not None:
            self.file.leave()
            self.file.resume(path)
        self.loaded(path)

    def loaded(self, path: Path) -> None:
        """Fill the cache of a conversation that was just loaded, if a snapshot of it is there and fits; say so."""
        count, kept = len(self.session.messages), sessions.snapshot_of(path)
        told = f"{count} messages from {path.stem if path.parent == sessions.folder() else path}"
        reads = "they are read again with your next one"
        if kept.is_file():
            try:
                reads = f"{self.session.restore(kept)} tokens of them are in the cache"
            except QrunError as error:
                self.console.warn(str(error))
        self.console.note(f"{told}; {reads}; /show messages prints them")

    def _sessions(self, rest: str) -> None:
        for line in sessions.described():
            self.console.say(f"  {line}")

    def _read(self, rest: str) -> None:
        path = self._path("/read", rest)
        text = read_file(str(path))
        self._attached.append(text.removesuffix("\n"))
        self.console.note(f"{path}, {len(text)} characters, goes before your next message")

    def _stats(self, rest: str) -> None:
        if self.last is not None:
            self.console.say(f"  last      {cards.stats_line(self.last.stats, self.last.finish_reason)}")
        for title, value in self._totals.rows():
            self.console.say(f"  {title:<9} {value}")
        self._cache_line()
        self.console.say(f"  memory    {_memory(self.engine.card.backend)}, weights {self._weights()}")

    def _weights(self) -> str:
        return cards.size(self.engine.card.weight_bytes)

    def _cache_line(self) -> None:
        engine = self.engine
        used, each = len(engine.cached_ids), engine.card.kv_bytes_per_token
        self.console.say(
            f"  cache     {engine.card.kv}, {used} of {engine.context} tokens ({used / engine.context:.0%}), "
            f"{each / 1024:.2f} KiB each: {cards.size(used * each)} used of {cards.size(engine.context * each)}"
        )

    def _kv(self, rest: str) -> None:
        if rest:
            engine = self.engine
            held, before = len(engine.cached_ids), engine.card
            engine.set_kv(rest)
            now, kept = engine.card, len(engine.cached_ids)
            if held and kept:
                was, became = cards.size(held * before.kv_bytes_per_token), cards.size(kept * now.kv_bytes_per_token)
                self.console.note(f"{kept} tokens converted from {before.kv} to {now.kv}: {was} became {became}")
            elif held:
                self.console.note("the conversation is read again with your next message")
        self._cache_line()

    def _think(self, rest: str) -> None:
        match rest:
            case "on" | "off":
                self.session.thinking = rest == "on"
            case "show" | "hide":
                self.show_reasoning = rest == "show"
            case "":
                self.show_reasoning = not self.show_reasoning
            case _:
                raise UsageError(f"/think {rest} does not exist: on, off, show or hide")
        asked = {None: "as the model likes", True: "on", False: "off"}[self.session.thinking]
        self.console.say(f"thinking: {asked}, {'shown' if self.show_reasoning else 'hidden'}", style="dim")
        tokenizer = self.session.tokenizer
        if not tokenizer.thinks:
            self.console.note("this model's template knows no thinking")
        elif self.session.thinking is not None and "enable_thinking" not in tokenizer.template.source:
            self.console.note("this model's template cannot switch it: the model decides")


def _memory(backend: str) -> str:
    if backend != "cpu":
        from qrun.resident import peak

        return f"peak {cards.size(peak(backend))} of the GPU"
    import psutil

    return f"{cards.size(psutil.Process().memory_info().rss)} resident"
