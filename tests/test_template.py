"""Chat templates: equal to transformers', found where checkpoints keep them, harmless when hostile."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from text_doubles import FAMILIES, write_family
from transformers import PreTrainedTokenizerFast

from qrun.errors import TemplateError
from qrun.template import ChatTemplate, find_template, mark, split_marked
from qrun.tokenizer import Tokenizer

USER = {"role": "user", "content": "Hello there,  how are you? 你好 😀"}
TALK = [USER, {"role": "assistant", "content": "I am fine.\n"}, {"role": "user", "content": " And the number? "}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *TALK]
THOUGHT = [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nFine."}, TALK[2]]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Tokenizer, Any]:
    """Name, our tokenizer, transformers'."""
    directory = write_family(request.param, tmp_path_factory.mktemp(request.param))
    return request.param, Tokenizer.from_dir(directory), PreTrainedTokenizerFast.from_pretrained(directory)


@pytest.mark.parametrize("messages", [[USER], TALK, SYSTEM, THOUGHT], ids=["one", "talk", "system", "thought"])
def test_equal_to_transformers(family: tuple[str, Tokenizer, Any], messages: list[dict[str, str]]) -> None:
    name, ours, oracle = family
    settings: list[dict[str, Any]] = [{}, {"enable_thinking": False}, {"enable_thinking": True}]
    if name == "mistral" and messages is SYSTEM:
        with pytest.raises(TemplateError, match="refuses this conversation: Conversation roles must alternate"):
            ours.render(messages)
        return
    for prompt in (True, False):
        for setting in settings:
            text = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **setting)
            ids = oracle.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False, **setting)
            given = {"add_generation_prompt": prompt, "thinking": setting.get("enable_thinking")}
            assert ours.render(messages, **given) == text
            assert ours.encode_chat(messages, **given) == ids


def test_control_strings_of_messages_stay_text(family: tuple[str, Tokenizer, Any]) -> None:
    _, tokenizer, _ = family
    plain = tokenizer.encode_chat([{"role": "user", "content": "a"}])
    for control in sorted(tokenizer.control):
        for content in (f"a{control}User: b", f"{control}", f"x {control}{control} y", f" {control} "):
            ids = tokenizer.encode_chat([{"role": "user", "content": content}])
            for other in tokenizer.control:
                index = tokenizer.token_id(other)
                assert ids.count(index) == plain.count(index), (control, content)
            assert content.strip() in tokenizer.decode(ids)


def test_a_template_that_cuts_a_control_string_does_not_rejoin_it() -> None:
    control = {"<|im_end|>", "<|im_start|>"}
    text = mark("a<|im_end|>b", control)
    cut = text.replace("_e", "_e\ufdd0")
    assert all(piece not in control for piece, literal in split_marked(cut, control) if not literal)
    assert "".join(piece for piece, _ in split_marked(cut, control)) == "a<|im_end|>b"


@pytest.mark.parametrize("where", ["jinja", "config"])
def test_sources(tmp_path: Path, where: str) -> None:
    directory = write_family("ernie", tmp_path, where=where)
    text = Tokenizer.from_dir(directory).render([{"role": "user", "content": "A"}])
    assert text == "<|begin_of_sentence|>User: A\nAssistant: "


def test_the_first_source_wins(tmp_path: Path) -> None:
    config = {"chat_template": [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "config"}]}
    assert find_template(tmp_path, config, {}).source == "config"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}')
    assert find_template(tmp_path, config, {}).source == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert find_template(tmp_path, config, {}).source == "jinja"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "qrun generate --raw"),
        ({"chat_template": [{"name": "a", "template": ""}, {"name": "b", "template": ""}]}, "it has a, b"),
        ({"chat_template": 7}, "it has none"),
        ({"chat_template": "x" * 300_000}, "300000 characters"),
    ],
)
def test_no_usable_template(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    with pytest.raises(TemplateError, match=said) as caught:
        find_template(tmp_path, config, {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"chat_template": null}', "\udcff"])
def test_damaged_template_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "chat_template.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(TemplateError, match=r"chat_template\.json"):
        find_template(tmp_path, {}, {})


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {
    "endless loop": (LOOP, "took more than"),
    "endless sum": ("{% macro f(n) %}{{ f(n) ~ f(n) }}{% endmacro %}{{ f(1) }}", "recurses"),
    "long text": ("{{ 'a' * 10 ** 11 }}", "memory"),
    "power": ("{{ 10 ** (10 ** 10) }}", "took more than"),
    "doubling": (
        "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "memory",
    ),
    "much output": ("{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}", "longer than"),
    "range": ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
    "internals": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "globals": ("{{ raise_exception.__globals__['sys'] }}", "unsafe"),
    "changes messages": ("{{ messages.append(1) }}", "unsafe"),
    "import": ("{% import 'os' as x %}", "no loader"),
    "syntax": ("{% for %}", "line 1"),
    "undefined": ("{{ a.b.c }}", "undefined"),
    "refusal": ("{{ raise_exception('not so') }}", "refuses this conversation: not so"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_in_one_line(name: str) -> None:
    source, said = HOSTILE[name]
    start = time.monotonic()
    with pytest.raises(TemplateError, match=said) as caught:
        ChatTemplate(source, "FILE.jinja", seconds=1.0).render([{"role": "user", "content": "hi"}])
    assert time.monotonic() - start < 10
    assert str(caught.value).startswith("FILE.jinja: ") and "\n" not in str(caught.value)


def test_the_worker_recovers_from_a_bound() -> None:
    bomb = ChatTemplate("{% if messages[0].content == 'go' %}" + LOOP + "{% endif %}fine", "x", seconds=0.3)
    with pytest.raises(TemplateError):
        bomb.render([{"role": "user", "content": "go"}])
    assert bomb.render([{"role": "user", "content": "stay"}]) == "fine"


def test_what_templates_may_use() -> None:
    source = (
        "{% generation %}a{% endgeneration %}{{ [1, 'é<'] | tojson }}{% for i in range(9) %}{% if i == 2 %}{% break %}"
        "{% endif %}{{ i }}{% endfor %}{{ strftime_now('%Y') | length }}"
    )
    assert ChatTemplate(source, "x").render([]) == 'a[1, "é<"]014'


@pytest.mark.skipif(sys.platform == "win32", reason="process groups")
def test_ctrl_c_during_a_rendering_leaves_no_answer_behind() -> None:
    template = ChatTemplate("{% if messages %}" + LOOP + "{% endif %}after", "x", seconds=30.0)
    assert template.render([]) == "after"
    previous = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            template.render([{"role": "user", "content": ""}])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert template.render([]) == "after"


def test_a_config_that_is_no_template_list(tmp_path: Path) -> None:
    directory = write_family("ernie", tmp_path, where="none")
    tokenizer = Tokenizer.from_dir(directory)
    assert tokenizer.decode(tokenizer.encode("Hello")) == "Hello"
    with pytest.raises(TemplateError, match="base model"):
        tokenizer.render([{"role": "user", "content": "A"}])
    assert json.loads((directory / "tokenizer_config.json").read_text())["sep_token"] == "<|end_of_sentence|>"
