"""Chats that keep themselves: what is written when, what brings it back, and who may not write to whose file."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_cli_terminal import Terminal, pipe
from text_doubles import ScriptedEngine, write_family

from qrun.cli import sessions
from qrun.cli.options import ModelOptions
from qrun.cli.sessions import ChatFile
from qrun.cli.settings import changed, restore
from qrun.errors import QrunError, UsageError
from qrun.sampler import Sampling
from qrun.session import Session
from qrun.transcript import Transcript, read_transcript


@contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    opened = Terminal(*arguments)
    try:
        yield opened
    finally:
        opened.process.kill()
        opened.process.wait()
        os.close(opened.handle)


def kept() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sessions.saved()]


def test_a_chat_goes_on_where_it_was_left() -> None:
    with terminal("chat", "double", "--wint4", "--temp", "0.5", "--keep-kv") as chat:
        chat.ask("/system Be brief.", "system prompt: Be brief.")
        chat.ask("/set top_k 3", r"top_k\s+3")
        assert not sessions.folder().exists()  # nothing was said
        chat.ask("hello there", "You said:(.|\n)*seed 7")
        assert len(kept()) == 1  # at once, not on leaving
        chat.ask("/kv int8", "int8")
        chat.ask("again", "You said:(.|\n)*seed 7")
        chat.ask("/bye", "--continue goes on")
        assert chat.code() == 0
    (path,) = sessions.saved()
    assert path.stat().st_mode & 0o777 == 0o600
    assert sorted(each.name for each in path.parent.iterdir()) == [path.name, f"{path.name}.kv"]
    about = kept()[0]["about"]
    assert (about["model"], about["quant"], about["kv"]) == ("double", "wint4", "int8")
    assert about["settings"] == {"temperature": 0.5, "top_k": 3}
    listed = pipe("chat", "--sessions")
    assert path.stem in listed.stdout and "double, 5 messages: hello there" in listed.stdout

    with terminal("chat", "--continue", "--temp", "0.7") as chat:
        chat.expect(r"W4A16C8(.|\n)*5 messages from .*; \d+ tokens of them are in the cache")
        chat.ask("/show", r"temperature\s+0.7(.|\n)*top_k\s+3")
        chat.ask("/system", "Be brief.")
        said = chat.ask("and more", "You said:(.|\n)*seed 7")
        reused = int(said.partition(" reused")[0].rpartition("+ ")[2])
        assert reused > 30  # all of the two turns before, from the snapshot
        chat.type("\x04")
        assert chat.code() == 0
    assert [message["role"] for message in kept()[0]["messages"]] == ["system", *["user", "assistant"] * 3]
    assert len(kept()) == 1


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (lambda chat: chat.process.send_signal(signal.SIGTERM), 143),
        (lambda chat: chat.process.send_signal(signal.SIGHUP), 129),
        (lambda chat: (chat.type("\x03"), chat.expect("stopped by you"), chat.type("\x03")), 130),
    ],
    ids=["term", "hangup", "ctrl-c twice"],
)
def test_however_it_ends_the_unfinished_reply_is_kept(end: Callable[[Terminal], object], code: int) -> None:
    with terminal("chat") as chat:
        chat.ask("long", "word word word")
        end(chat)
        assert chat.code() == code
    (saved,) = kept()
    assert saved["messages"][0]["content"] == "long"
    assert saved["messages"][1]["content"].startswith("word word word")


def test_a_signal_at_the_prompt_ends_it_too() -> None:
    with terminal("chat", "--no-save") as chat:
        chat.ask("hello", "You said:(.|\n)*seed 7(.|\n)*>>> ")
        chat.process.send_signal(signal.SIGTERM)
        assert chat.code() == 143
    assert not sessions.folder().exists()


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family("qwen3", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture
def talk(family: Path) -> Callable[..., Session]:
    """A session in which `answers` were given."""

    def made(*answers: str) -> Session:
        session = Session(ScriptedEngine(family))
        end = session.tokenizer.token_id("<|im_end|>")
        assert end is not None
        session.engine.script += [[*session.tokenizer.encode(answer), end] for answer in answers]  # type: ignore[attr-defined]
        for answer in answers:
            assert "".join(session.chat(f"say {answer}")) == answer
        return session

    return made


def test_two_chats_never_share_a_file(talk: Callable[..., Session]) -> None:
    one, two = ChatFile(), ChatFile()
    one.save(talk("a"), {})
    two.save(talk("b"), {})
    assert one.path is not None and two.path is not None and one.path != two.path
    third = ChatFile()
    assert not third.resume(one.path)  # it is open
    third.save(talk("c"), {})
    assert third.path not in (None, one.path, two.path)
    path = one.path
    one.leave()
    assert ChatFile().resume(path)
    assert len(sessions.saved()) == 3


def test_what_says_nothing_leaves_nothing(talk: Callable[..., Session]) -> None:
    file, session = ChatFile(), talk()
    file.save(session, {})
    assert not sessions.folder().exists()
    session = talk("a")
    file.save(session, {})
    assert len(sessions.saved()) == 1
    session.undo()
    file.save(session, {})
    assert sessions.saved() == []


def test_the_oldest_go_but_none_that_is_open_or_damaged(
    talk: Callable[..., Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "KEPT", 3)
    monkeypatch.setattr(sessions, "KEPT_SNAPSHOTS", 1)
    session, files = talk("a"), [ChatFile() for _ in range(6)]
    for n, file in enumerate(files):
        file.save(session, {})
        assert file.path is not None
        sessions.snapshot_of(file.path).write_text("[]")
        if n == 1:
            file.path.write_text("{")
        os.utime(file.path, (n, n))
        if n != 0:
            file.leave()
    left = {path.stem for path in sessions.saved()}
    assert len(left) == 5  # three, one that is open, and one that is damaged
    assert files[0].path is not None and files[0].path.stem in left
    assert "damaged" in "\n".join(sessions.described())
    assert len(list(sessions.folder().glob("*.kv"))) == 2  # the last two that were written
    assert [path.name for path in sessions.folder().glob(".*.lock")] == [f".{files[0].path.stem}.lock"]


def test_a_damaged_chat_is_refused_in_a_line_and_stays(talk: Callable[..., Session]) -> None:
    ChatFile().save(talk("a"), {})
    (path,) = sessions.saved()
    path.write_text(path.read_text()[:-20])
    done = pipe("chat", "--continue", stdin="x")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert path.name in done.stderr and "damaged" in done.stderr
    assert path.exists()
    done = pipe("chat", "--resume", f"{path.stem}x")
    assert done.returncode == 2 and f"did you mean {path.stem}?" in done.stderr


def test_no_chat_to_continue() -> None:
    with pytest.raises(UsageError, match="no chat to continue yet"):
        sessions.latest()


def test_a_folder_that_cannot_be_written_is_told(talk: Callable[..., Session]) -> None:
    sessions.folder().parent.mkdir(parents=True)
    sessions.folder().write_text("a file")
    with pytest.raises(QrunError, match="cannot keep the chat"):
        ChatFile().save(talk("a"), {})


def test_only_what_was_not_typed_is_taken_from_the_chat() -> None:
    about = {"model": "ernie", "quant": "wint4", "kv": "int8", "ctx_size": "8k", "device": "cuda"}
    transcript = Transcript(messages=[], about=about)
    found = sessions.resumed(ModelOptions(fp8=True), transcript, {"save"})
    assert (found.model, found.precision(), found.kv, found.ctx_size) == ("ernie", "wint4", "int8", "8k")
    assert found.device == "auto"
    found = sessions.resumed(ModelOptions(model="qwen", wint8=True), transcript, {"model", "wint8"})
    assert (found.model, found.precision(), found.kv) == ("qwen", "wint8", "int8")
    with pytest.raises(UsageError, match="model is 3"):
        sessions.resumed(ModelOptions(), Transcript(messages=[], about={"model": 3}), set())


def test_settings_come_back(talk: Callable[..., Session]) -> None:
    session, other = talk(), talk()
    assert changed(session) == {}
    session.sampling = Sampling(temperature=0.123456789, seed=5)
    session.stop, session.thinking, session.max_tokens = ("a", "b"), False, 9
    values = json.loads(json.dumps(changed(session)))
    other.max_tokens = 3
    restore(other, values, {"max_tokens"})
    assert (other.sampling, other.stop, other.thinking, other.max_tokens) == (session.sampling, ("a", "b"), False, 3)
    for bad in (3, {"temperature": "warm"}, {"nonsense": 1}, {"top_k": [1]}):
        with pytest.raises(UsageError):
            restore(other, bad, set())


def test_a_full_disk_leaves_what_was_there(talk: Callable[..., Session], monkeypatch: pytest.MonkeyPatch) -> None:
    file, session = ChatFile(), talk("a", "b")
    file.save(session, {})
    (path,) = sessions.saved()
    session.undo()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(QrunError, match="No space left"):
        file.save(session, {})
    assert len(read_transcript(path).messages) == 4
    assert [each.name for each in path.parent.iterdir() if each.suffix == ".json"] == [path.name]


def test_the_latest_is_the_one_last_spoken_in(talk: Callable[..., Session]) -> None:
    session, one, two = talk("a"), ChatFile(), ChatFile()
    one.save(session, {})
    two.save(session, {})
    assert one.path is not None and two.path is not None
    os.utime(two.path, (1, 1))
    assert sessions.latest() == one.path
    os.utime(one.path, (0, 0))
    assert sessions.latest() == two.path
    assert sessions.find(one.path.stem) == sessions.find(str(one.path)) == one.path
