"""The chat's commands in this process, on the double engine: what they change, keep and say."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cli_doubles import WordEngine
from text_doubles import write_family

from qrun import resident
from qrun.cli import sessions
from qrun.cli.chat_commands import Commands
from qrun.cli.console import Console
from qrun.cli.sessions import ChatFile
from qrun.errors import UsageError
from qrun.session import Session

Say = Callable[[str], str]


@pytest.fixture
def commands(tmp_path: Path) -> Commands:
    engine = WordEngine(write_family("qwen3", tmp_path / "model"))
    return Commands(engine, Session(engine), Console(), file=ChatFile(), about=lambda: {"model": "double"})


@pytest.fixture
def say(commands: Commands, capsys: pytest.CaptureFixture[str]) -> Say:
    """Run a command, or send a message and keep the chat; returns what went to stderr."""

    def said(text: str) -> str:
        commands.console = Console()  # on the stderr of this moment
        if text.startswith("/"):
            commands.run(text)
        else:
            reply = commands.session.stream(text)
            list(reply)
            commands.replied(reply)
            assert commands.file is not None
            commands.file.save(commands.session, commands.about())
        return capsys.readouterr().err

    return said


def test_stats_are_of_the_whole_chat(commands: Commands, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "0 replies" in say("/stats")
    say("hello")
    say("hello again")
    played = commands.engine.played  # type: ignore[attr-defined]
    for each in played:
        each.stats.prefill_seconds, each.stats.decode_seconds = 0.5, 2.0
    commands._totals = type(commands._totals)()
    for each in played:
        commands._totals.add(each.stats)
    first, second = (each.stats for each in played)
    text = say("/stats")
    written = first.new_tokens + second.new_tokens
    assert f"2 replies, {written} tokens written, {written / 4:.1f} tok/s" in text
    read = first.prompt_tokens + second.prompt_tokens - second.reused_tokens
    assert second.reused_tokens > first.prompt_tokens
    assert f"{read} tokens read, {read:.1f} tok/s, and {second.reused_tokens} reused" in text
    assert f"{len(commands.engine.cached_ids)} of 4096 tokens" in text
    assert "resident" in text
    monkeypatch.setattr(resident, "peak", lambda device: {"cuda": 2_000_000_000}[device])
    commands.engine.card = replace(commands.engine.card, backend="cuda")
    assert "peak 2.0 GB of the GPU" in say("/stats")


def test_a_cache_is_converted_where_it_is(commands: Commands, say: Say) -> None:
    assert "converted" not in say("/kv int8")
    commands.engine.card = replace(commands.engine.card, kv="bf16", kv_bytes_per_token=2560)
    say("hello")
    held = len(commands.engine.cached_ids)
    text = say("/kv int4")
    assert f"{held} tokens converted from bf16 to int4: {held * 2560 / 1000:.1f} KB became" in text
    assert f"int4, {held} of 4096 tokens" in text


def test_save_and_load_with_the_cache(commands: Commands, say: Say, tmp_path: Path) -> None:
    say("hello")
    held = len(commands.engine.cached_ids)
    file = tmp_path / "my talk.json"
    assert "my talk.json.kv" in say(f"/save {file} kv")
    assert sessions.snapshot_of(file).is_file()
    say("/clear")
    assert commands.session.messages == []
    assert f"2 messages from {file}; {held} tokens of them are in the cache" in say(f"/load '{file}'")
    sessions.snapshot_of(file).write_text("?")
    text = say(f"/load {file}")
    assert "no snapshot" in text and "2 messages" in text and "read again" in text
    with pytest.raises(UsageError, match="needs a file"):
        say("/save kv")


def test_a_cleared_chat_stays_and_another_begins(commands: Commands, say: Say) -> None:
    say("the first")
    (first,) = sessions.saved()
    assert f"/load {first.stem} brings it back" in say("/clear")
    say("the second")
    assert len(sessions.saved()) == 2
    text = say("/sessions")
    assert "2 messages: the first" in text and "2 messages: the second" in text
    say(f"/load {first.stem}")
    say("the third")
    assert len(sessions.saved()) == 2  # it goes on in the first one
    assert len(sessions.read_transcript(first).messages) == 4
    with pytest.raises(UsageError, match="no saved chat 'nonsense'"):
        say("/load nonsense")
