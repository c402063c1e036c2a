"""Models that reason, through their own templates: what is reasoning, what is read again of it, how it is switched."""

from collections.abc import Callable
from pathlib import Path

import pytest
from cli_doubles import WordEngine
from text_doubles import FAMILIES, ScriptedEngine, write_family

from qrun.cli.chat_commands import Commands
from qrun.cli.console import Console
from qrun.errors import UsageError
from qrun.session import Session
from qrun.tokenizer import Tokenizer

Make = Callable[..., tuple[Session, ScriptedEngine, Tokenizer]]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_family(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}


@pytest.fixture
def make(directories: dict[str, Path]) -> Make:
    """A session with a family's template, or another one, in which the model will say `answers`."""

    def made(family: str, *answers: str, template: str = "", **settings: object) -> tuple[object, ...]:
        tokenizer = Tokenizer.from_dir(directories[family])
        if template:
            folder = directories[family].parent / f"{family}-{abs(hash(template))}"
            write_family(family, folder)
            (folder / "chat_template.jinja").write_text(template)
            tokenizer = Tokenizer.from_dir(folder)
        end = tokenizer.token_id(FAMILIES[family][2]["eos_token"])
        assert end is not None and end in tokenizer.stop_ids
        script = [[*tokenizer.encode_marked(answer, continues=True), end] for answer in answers]
        engine = ScriptedEngine(tokenizer.directory, 4096, script)
        return Session(engine, tokenizer=tokenizer, **settings), engine, tokenizer

    return made


WHOLE = "<think>\nIt is so.\n</think>\n\nYes."
OPENED = WHOLE.removeprefix("<think>\n")
ANSWERED = "It is so.\n</think>\n\n<response>\nYes.\n</response>\n"


@pytest.mark.parametrize(
    ("family", "thinking", "prompt", "said"),
    [
        ("qwen3", None, "assistant\n", WHOLE),
        ("qwen3", True, "assistant\n", WHOLE),
        ("deepseek-r1", None, "<｜Assistant｜><think>\n", OPENED),
        ("deepseek-r1", True, "<｜Assistant｜><think>\n", OPENED),
        ("deepseek-r1", False, "<｜Assistant｜><think>\n", OPENED),  # it has no switch
        ("ernie-thinking", None, "assistant\n<think>\n", ANSWERED),
    ],
)
def test_reasoning_is_split_off_and_not_read_again(
    make: Make, family: str, thinking: bool | None, prompt: str, said: str
) -> None:
    session, engine, tokenizer = make(family, said, said, thinking=thinking)
    reply = session.stream("Is it?")
    assert reply.prompt.text.endswith(prompt)
    deltas = list(reply)
    assert "".join(d.text for d in deltas if d.kind == "reasoning") == reply.reasoning == "It is so."
    assert "".join(d.text for d in deltas if d.kind == "answer") == reply.text == "Yes."
    assert session.messages[-1] == {"role": "assistant", "content": "Yes.", "reasoning_content": "It is so."}
    list(session.stream("Really?"))
    read = tokenizer.text_after([], engine.prompts[1])
    assert "It is so." not in read and "Yes." in read
    assert engine.played[1].stats.reused_tokens > 0


def test_an_empty_thought_is_no_reasoning(make: Make) -> None:
    session, _, _ = make("qwen3", "Yes.", "<think>\n\n</think>\n\nNo.", thinking=False)
    reply = session.stream("Is it?")
    assert reply.prompt.text.endswith("<think>\n\n</think>\n\n")
    assert [(d.kind, d.text) for d in reply if d.kind == "reasoning"] == []
    assert session.messages[-1] == {"role": "assistant", "content": "Yes."}
    session.thinking = None
    reply = session.stream("Really?")
    list(reply)
    assert (reply.reasoning, reply.text) == ("", "No.")
    assert "reasoning_content" not in session.messages[-1]


@pytest.mark.parametrize("family", ["ernie", "mistral"])
def test_tags_are_text_where_the_model_knows_no_thinking(make: Make, family: str) -> None:
    session, _, _ = make(family, WHOLE)
    reply = session.stream("Is it?")
    list(reply)
    assert (reply.reasoning, reply.text.strip()) == ("", WHOLE)


KEEPS = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.reasoning_content is defined %}
        {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def test_a_template_that_wants_the_reasoning_gets_it_and_reads_only_what_is_new(make: Make) -> None:
    session, engine, tokenizer = make("qwen3", WHOLE, WHOLE, template=KEEPS)
    list(session.stream("Is it?"))
    held = len(engine.cached_ids)
    list(session.stream("Really?"))
    assert f"assistant\n{WHOLE}<|im_end|>" in tokenizer.text_after([], engine.prompts[1])
    assert engine.played[1].stats.reused_tokens == held


def test_the_thinking_switch(directories: dict[str, Path], make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    def commands(family: str) -> Commands:
        return Commands(WordEngine(directories[family]), make(family)[0], Console())

    qwen = commands("qwen3")
    for argument, thinking, shown, told in (
        ("off", False, True, "thinking: off, shown\n"),
        ("hide", False, False, "thinking: off, hidden\n"),
        ("on", True, False, "thinking: on, hidden\n"),
        ("show", True, True, "thinking: on, shown\n"),
        ("", True, False, "thinking: on, hidden\n"),
    ):
        qwen.run(f"/think {argument}")
        assert (qwen.session.thinking, qwen.show_reasoning) == (thinking, shown)
        assert capsys.readouterr().err == told
    qwen.run("/set think auto")
    assert qwen.session.thinking is None
    with pytest.raises(UsageError, match="/think maybe does not exist"):
        qwen.run("/think maybe")
    commands("deepseek-r1").run("/think off")
    assert "cannot switch it" in capsys.readouterr().err
    commands("ernie").run("/think on")
    assert "knows no thinking" in capsys.readouterr().err
