"""Reasoning told apart from the answer, wherever the pieces of the stream fall."""

import random

import pytest

from qrun.reasoning import ReasoningSplitter, opens_inside, partial_suffix


def split(text: str, cuts: list[int], *, enabled: bool = True, inside: bool = False) -> tuple[str, str]:
    """(reasoning, answer) of a text pushed in pieces."""
    splitter = ReasoningSplitter(enabled=enabled, inside=inside)
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    deltas = [delta for piece in pieces for delta in splitter.push(piece)] + splitter.flush()
    assert all(delta.text for delta in deltas)
    kinds = [delta.kind for delta in deltas]
    assert kinds == sorted(kinds, reverse=True)  # reasoning first
    return tuple("".join(d.text for d in deltas if d.kind == kind) for kind in ("reasoning", "answer"))  # type: ignore[return-value]


CASES = [
    # text, inside, reasoning, answer
    ("<think>\none\n\ntwo\n</think>\n\nAnswer.\n", False, "one\n\ntwo", "Answer.\n"),
    ("\n<think>a</think>b", False, "a", "b"),
    ("<think>\n\n</think>\n\nAnswer", False, "", "Answer"),
    ("plain <think> text", False, "", "plain <think> text"),
    ("  spaced", False, "", "  spaced"),
    ("<thin ice", False, "", "<thin ice"),
    ("", False, "", ""),
    ("<think>cut off", False, "cut off", ""),
    ("<think>cut </thi", False, "cut </thi", ""),
    ("a < b </think>c", True, "a < b", "c"),
    ("only thought ", True, "only thought", ""),
    ("\nhm\n</think>\n\n<response>\nYes.\nNo.\n</response>\n", True, "hm", "Yes.\nNo."),
    ("hm</think><response>Yes</response>", True, "hm", "Yes"),
    ("hm</think>\n<response>Yes </respon", True, "hm", "Yes </respon"),
    ("hm</think>\n<res", True, "hm", "<res"),
    ("hm</think>no tag </response>", True, "hm", "no tag </response>"),
    ("<response>\nYes\n</response>", False, "", "Yes"),
    ("<response>\nYes\n</response>\nmore", False, "", "Yesmore"),
    ("x</think>the </think> tag", True, "x", "the </think> tag"),
]


@pytest.mark.parametrize(("text", "inside", "reasoning", "answer"), CASES)
def test_every_way_to_cut_gives_the_same(text: str, inside: bool, reasoning: str, answer: str) -> None:
    assert split(text, [], inside=inside) == (reasoning, answer)
    assert split(text, list(range(1, len(text))), inside=inside) == (reasoning, answer)
    draw = random.Random(text)
    for _ in range(50):
        cuts = sorted(draw.sample(range(len(text) + 1), draw.randint(0, min(6, len(text)))))
        assert split(text, cuts, inside=inside) == (reasoning, answer)


def test_a_model_that_does_not_think_is_left_alone() -> None:
    text = "<think>is a tag</think>\n"
    assert split(text, [3], enabled=False) == ("", text)


def test_nothing_is_held_back_longer_than_needed() -> None:
    splitter = ReasoningSplitter()
    splitter.push("<think>")
    assert [d.text for d in splitter.push("so")] == ["so"]
    assert [d.text for d in splitter.push(" it")] == [" it"]
    assert splitter.push(" <") == []
    assert [d.text for d in splitter.push("b")] == [" <b"]


@pytest.mark.parametrize(
    ("prompt", "inside"), [("a<think>\n", True), ("<think>", True), ("<think>\n\n</think>\n\n", False), ("", False)]
)
def test_opens_inside(prompt: str, inside: bool) -> None:
    assert opens_inside(prompt) is inside


@pytest.mark.parametrize(
    ("text", "targets", "length"),
    [
        ("abc<", ("<x>",), 1),
        ("abc<x", ("<x>",), 2),
        ("abc", ("<x>",), 0),
        ("", ("a",), 0),
        ("aab", ("abc", "bd"), 2),
        ("a", (), 0),
    ],
)
def test_partial_suffix(text: str, targets: tuple[str, ...], length: int) -> None:
    assert partial_suffix(text, targets) == length
