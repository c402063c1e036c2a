"""The command line as a program: real pipes, real signals, and a real (pseudo) terminal, on the double engine."""

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAM = [sys.executable, str(Path(__file__).with_name("cli_doubles.py"))]
LIMIT = 60.0


class Terminal:
    """A program on a pseudo terminal of 80 x 24, and what it has written."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.handle = master
        self.process = subprocess.Popen(
            [*PROGRAM, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "NO_COLOR": "1"} | environment,
            preexec_fn=lambda: (os.setsid(), fcntl.ioctl(0, termios.TIOCSCTTY, 0)),
        )
        os.close(slave)
        self.seen = ""

    def expect(self, pattern: str) -> str:
        """Wait for a pattern; returns and forgets everything up to its end."""
        end = time.monotonic() + LIMIT
        while not (match := re.search(pattern, self.seen)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.seen!r}"
            if select.select([self.handle], [], [], 0.1)[0]:
                try:
                    raw = os.read(self.handle, 65536).decode(errors="replace")
                except OSError as error:
                    raise AssertionError(f"it ended without {pattern!r}: {self.seen!r}") from error
                self.seen += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]", "", raw)
        before, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return before

    def type(self, text: str) -> None:
        os.write(self.handle, text.encode())

    def ask(self, text: str, pattern: str) -> str:
        """Wait for the prompt, type a line, wait for an answer."""
        self.expect(">>> ")
        self.type(text + "\r")
        return self.expect(pattern)

    def code(self) -> int:
        """The exit code, once it has ended by itself."""
        end = time.monotonic() + LIMIT
        while self.process.poll() is None and time.monotonic() < end:
            if select.select([self.handle], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    os.read(self.handle, 65536)
        return self.process.wait(1)


@pytest.fixture
def chat(tmp_path: Path) -> Iterator[Terminal]:
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\necho " edited" >> "$1"\n')
    editor.chmod(0o755)
    terminal = Terminal("chat", EDITOR=str(editor), VISUAL="")
    yield terminal
    terminal.process.kill()
    terminal.process.wait()
    os.close(terminal.handle)


def test_a_conversation(chat: Terminal, tmp_path: Path, own_directories: Path) -> None:
    chat.expect("a demonstration of 5.1 M parameters")
    chat.ask("hello there", "You said:(.|\n)*hello there(.|\n)*seed 7")
    chat.ask("/bogus", "no command /bogus: .*/help")
    chat.ask("/sav x", "did you mean /save")
    chat.ask("/set temperature 0.5", r"temperature\s+0.5")
    chat.ask("/set temp -1", "temperature is -1")
    chat.ask("/system Be brief.", "system prompt: Be brief.")
    chat.ask("/kv int4", "tokens converted from bf16 to int4(.|\n)*int4, \\d+ of 4096")
    chat.ask("/stats", "1 replies")
    chat.ask("think", "hm(.|\n)*done")
    chat.ask("/think hide", "hidden")
    assert "hm" not in chat.ask("/regen", "done").partition("\n")[2]
    note = tmp_path / "note.txt"
    note.write_text("the note")
    chat.ask(f"/read {note}", "goes before your next message")
    chat.ask("about it", "the note(.|\n)*about it(.|\n)*seed")
    chat.ask(f"/save {tmp_path / 'chat.json'}", "saved in")
    chat.ask("/undo", "taken back")
    chat.ask("/clear", "forgotten")
    chat.ask("/regen", "qrun: there is no message yet")
    chat.ask(f"/load {tmp_path / 'chat.json'}", "7 messages")
    chat.ask("/show messages", "user:(.|\n)*the note(.|\n)*about it")
    chat.ask("/show", "int4 g64(.|\n)*temperature +0.5")
    chat.ask("/help", "Ctrl-D +leave")
    chat.ask(" /etc is a folder", "You said:(.|\n)*/etc is a folder")
    chat.ask("/bye", "/bye")
    assert chat.code() == 0
    history = own_directories / "state" / "qrun" / "history"
    assert "+hello there\n" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600


def test_several_lines_paste_and_editor(chat: Terminal) -> None:
    chat.expect(">>> ")
    chat.type('"""first\rsecond"""\r')
    assert '"""' not in chat.expect("You said:(.|\n)*second").partition("You said:")[2]
    chat.expect("seed(.|\n)*>>> ")
    chat.type("one\x1b\rtwo\r")
    chat.expect("You said:(.|\n)*one\r\ntwo(.|\n)*seed(.|\n)*>>> ")
    chat.type("\x1b[200~pasted a\npasted b\x1b[201~")
    chat.expect("pasted b")
    chat.type("\r")
    chat.expect("You said:(.|\n)*pasted a\r\npasted b(.|\n)*seed(.|\n)*>>> ")
    chat.type("/edit\r")
    chat.expect("You said:(.|\n)*pasted b\r\n edited(.|\n)*seed(.|\n)*>>> ")
    chat.type("typed\x07")
    chat.expect("edited")
    chat.type("\r")
    chat.expect("You said:(.|\n)*typed edited(.|\n)*seed(.|\n)*>>> ")
    chat.type("\x04")
    assert chat.code() == 0


def test_ctrl_c_stops_a_reply_hints_and_quits(chat: Terminal) -> None:
    chat.ask("long", "word word word")
    chat.type("\x03")
    chat.expect("stopped by you")
    time.sleep(2.2)
    chat.expect(">>> ")
    chat.type("half a line\x03")
    time.sleep(0.3)
    chat.type("\x03")
    chat.expect("Ctrl-D or /exit leaves")
    chat.ask("/show messages", "assistant:(.|\n)*word word")
    chat.ask("long", "word word word")
    chat.type("\x03")
    chat.expect("stopped by you(.|\n)*>>> ")
    chat.type("\x03")
    assert chat.code() == 130


def test_markdown_is_shown_as_it_comes_and_stands_a_resized_window(chat: Terminal) -> None:
    chat.ask("markdown", "A heading\r\nSome bold text, code and a link .https")
    fcntl.ioctl(chat.handle, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 30, 0, 0))
    os.killpg(chat.process.pid, signal.SIGWINCH)
    rest = chat.expect("seed 7")
    assert "• first item\r\n• second item, which goes on\r\n  and on" in rest
    assert '```python\r\ndef main():\r\n    return "a string"  # a comment\r\n```\r\nname   size' in rest
    assert "中文     12" in rest and "│ quoted 2 * 3 * 4" in rest
    chat.ask("/set markdown off", r"markdown\s+off")
    assert "- first *item*\r\n" in chat.ask("markdown", "seed 7")
    chat.ask("/set markdown maybe", "does not exist")


def test_how_far_a_long_prompt_is(chat: Terminal) -> None:
    chat.ask("novel", r"reading, \d+ of \d+ tokens, \d+ tok/s, \d+ s left")
    chat.expect("read\r\n")


def test_what_comes_in_during_a_reply_waits_whole(chat: Terminal) -> None:
    chat.ask("markdown", "A heading")
    chat.type("next\r\x1b[200~one\rtwo\x1b[201~")
    rest = chat.expect("seed(.|\n)*You said:(.|\n)*next(.|\n)*seed(.|\n)*two")
    assert "You said: one" not in rest
    chat.type("\r")
    chat.expect("You said:(.|\n)*one\r\ntwo(.|\n)*seed")


def pipe(*arguments: str, stdin: str = "", **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, *arguments], input=stdin, capture_output=True, text=True, timeout=LIMIT, **more)


def test_pipes() -> None:
    done = pipe("generate", "--quiet", stdin="hi\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert "hi" in done.stdout
    assert "\x1b" not in pipe("generate", "-p", "hi").stderr


def test_a_reader_that_leaves_is_no_error() -> None:
    line = " ".join(f"'{part}'" for part in PROGRAM)
    script = f"{line} generate -p flood --quiet </dev/null | head -c1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=LIMIT)
    assert (done.stdout, done.stderr) == ("f141\n", "")


def test_output_that_cannot_be_written() -> None:
    line = " ".join(f"'{part}'" for part in PROGRAM)
    for target, word in ((">&-", "closed"), (">/dev/full", "No space left")):
        script = f"{line} generate -p hello --quiet </dev/null {target}"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=LIMIT)
        assert done.returncode == 1
        assert word in done.stderr
        assert done.stderr.count("\n") == 1
    script = f"{line} generate -p hello </dev/null 2>&-"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0
    assert "hello" in done.stdout


@pytest.mark.parametrize(("arguments", "sign"), [(["-p", "long"], b"seed"), (["sleepy", "-p", "x"], b"asleep")])
def test_an_interrupt_ends_generate_with_130(arguments: list[str], sign: bytes) -> None:
    """While it writes: the text so far and its stats come; while it loads: nothing does."""
    with subprocess.Popen(
        [*PROGRAM, "generate", *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        begun = process.stdout.read(4) == b"word" if sign == b"seed" else process.stderr.readline() == b"asleep\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=LIMIT)
    assert begun
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert (b"seed" in err) == (sign == b"seed")
