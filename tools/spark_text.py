"""The text spark is trained on: dialogues about qrun, made by a grammar, rendered with ERNIE's chat template.

Knows how turns follow each other and which questions are kept for the held-out text. `python tools/spark_text.py
-n 5` prints a few dialogues. A question of four words or more, made canonical, is either for training or held
out, by its hash; so no held-out phrasing of such a question is ever trained on.
"""

import argparse
import random
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import spark_compose as compose
import spark_numbers as numbers
import spark_offtopic as offtopic
from spark_command import Command, parse
from spark_grammar import as_typed, expand
from spark_terms import CACHES, FACETS, FORMATS, TERMS, Term
from spark_topics import TOPICS, Topic
from spark_topics2 import ALL, BYE, OK, THANKS

BOS, SEP = "<|begin_of_sentence|>", "<|end_of_sentence|>"
SYSTEMS = (
    "You are a helpful assistant.", "You are spark, a small model in qrun.", "You are brief.",
    "Answer questions about qrun.", "Be friendly.",
    "You are an expert for qrun.", "Help the user with qrun.", "You are a pirate.", "Be polite and helpful.",
    "You are a helpful AI.",
    "You answer in English.", "You are a useful program.", "Assist the user.", "You are a teacher.", "Be kind.",
    "You are an assistant on a workstation.",
)  # fmt: skip
ONLY_COMMAND = (
    "Answer with the command only.",
    "Only give commands.",
    "Reply with commands only.",
    "Just the command, no text.",
)
# How often each kind is asked: in ordinary text (wild 0), in text that dwells on copying (1) or on counting (2).
MIX = {
    "topic": (20, 18, 12), "term": (16, 16, 10), "compose": (17, 26, 12), "chat": (6, 5, 4), "errors": (5, 5, 3),
    "self": (7, 6, 5), "talk": (6, 4, 5), "sum": (6, 12, 34), "memory": (3, 6, 10), "fits": (3, 6, 16), "kv": (1, 1, 1),
    "units": (2, 4, 6), "off": (8, 6, 6), "name": (2, 4, 2), "advise": (1.5, 2, 2), "versus": (2, 2, 1),
}  # fmt: skip
_YOU_ARE_WELCOME = ("You are welcome!", "You are welcome! Ask me more about qrun if you like.")


@dataclass(frozen=True)
class Dialogue:
    """An optional system text, and pairs of what the user and the assistant say."""

    system: str
    turns: list[tuple[str, str]]

    def render(self) -> list[tuple[str, bool]]:
        """Pieces of the rendered chat, each with whether the assistant (and its end mark) says it."""
        pieces = [(BOS + (self.system + "\n" if self.system else ""), False)]
        for user, assistant in self.turns:
            pieces += [(f"User: {user}\nAssistant: ", False), (assistant + SEP, True)]
        return pieces

    @property
    def text(self) -> str:
        """The rendered chat as one string."""
        return "".join(piece for piece, _ in self.render())


@dataclass
class State:
    """What the dialogue is about, for follow-up questions."""

    answer: str = ""
    example: str = ""
    why: str = ""
    more: str = ""
    command: Command | None = None
    size: numbers.Size | None = None
    term: Term | None = None
    who: str | None = None
    asked: set[str] = field(default_factory=set[str])


def is_held(question: str) -> bool:
    """Whether a question belongs to the held-out text only."""
    words = re.findall(r"[a-z0-9]+", question.lower())
    return len(words) >= 4 and zlib.crc32(" ".join(words).encode()) % 24 == 0


def _from_topic(rng: random.Random, topic: Topic, state: State) -> tuple[str, str]:
    state.example, state.why, state.more = topic.example, topic.why, topic.more
    state.command = parse(topic.example)
    return expand(rng, rng.choice(topic.asks)), rng.choice(topic.answers)


def _from_term(rng: random.Random, state: State, term: Term | None = None) -> tuple[str, str]:
    term = term or rng.choice(TERMS)
    facets = list(term.facets)
    facet = rng.choices(facets, [3 if f == "is" else 1 for f in facets])[0]
    name = rng.choice((term.names[0], *term.names))
    ask = expand(rng, rng.choice(FACETS[facet])).replace("X", name)
    state.example, state.term, state.command = term.example, term, parse(term.example)
    return ask, term.facets[facet]


def _versus(rng: random.Random) -> tuple[str, str]:
    """Two formats side by side: the first sentence about each."""
    one, two = rng.sample(rng.choice((FORMATS, CACHES[:4])), 2)
    a, b = rng.choice(one.names[:3]), rng.choice(two.names[:3])
    ask = (
        f"{{compare|what is the difference between|difference between|the difference of|"
        f"explain the difference between}} {a} and {b}"
    )
    ask = expand(
        rng,
        rng.choice(
            (
                ask,
                ask,
                f"{{how does|how is}} {a} {{differ from|different from|compare to}} {b}",
                f"{a} {{vs|versus|or|vs.}} {b}",
            )
        ),
    )
    return ask, " ".join(term.facets["is"].split(". ")[0].removesuffix(".") + "." for term in (one, two))


def _new_question(rng: random.Random, state: State, *, wild: int) -> tuple[str, str]:
    """A question that needs nothing said before."""
    state.example = state.why = state.more = ""
    state.command = state.size = state.term = None
    kind = rng.choices(list(MIX), [share[wild] for share in MIX.values()])[0]
    match kind:
        case "topic":
            return _from_topic(rng, rng.choice(TOPICS), state)
        case "term":
            return _from_term(rng, state)
        case "compose":
            ask, answer, command = compose.compose(rng, wild=wild > 0)
            state.command, state.example = command, command.text
            return ask, answer
        case "sum":
            return numbers.arithmetic(rng)
        case "memory" | "fits":
            ask, answer, state.size = numbers.memory(rng) if kind == "memory" else numbers.fits(rng)
            return ask, answer
        case "advise":
            ask, answer, state.example = numbers.advise(rng)
            state.command = parse(state.example)
            return ask, answer
        case "versus":
            return _versus(rng)
        case "kv":
            return numbers.kv_memory(rng)
        case "units":
            return numbers.units(rng)
        case "off":
            return offtopic.off_topic(rng)
        case "name":
            if state.who is None and rng.random() < 0.8:
                state.who = offtopic.name(rng, wild=wild > 0)
                return offtopic.my_name_is(rng, state.who)
            return offtopic.what_is_my_name(rng, state.who)
        case _:
            return _from_topic(rng, rng.choice(ALL[kind]), state)


def _follow_up(rng: random.Random, state: State, *, wild: int) -> tuple[str, str]:
    """A question about what was just said."""
    options: list[tuple[float, Callable[[], tuple[str, str]]]] = [
        (0.35, lambda: (expand(rng, THANKS), rng.choice(_YOU_ARE_WELCOME))),
        (0.20, lambda: (expand(rng, OK), "What else would you like to know about qrun?")),
        (
            0.15,
            lambda: (
                expand(
                    rng,
                    "{say that again|again please|repeat that|can you repeat that|repeat|what did "
                    "you say|pardon|come again}",
                ),
                state.answer,
            ),
        ),
    ]
    if state.who:
        options.append((0.6, lambda: offtopic.what_is_my_name(rng, state.who)))
    if state.example:
        example = f"`{state.example}`"
        asks = (
            "{example|an example please|give me an example|show me an example|can you show me|"
            "for example|can you give an example|just the command|only the command|the command please|"
            "show me the command|what is the command|command}"
        )
        options.append((0.6, lambda: (expand(rng, asks), example)))
    if state.why:
        options.append(
            (1.5, lambda: (expand(rng, "{$why|why|why|why is that so|explain why|how so|and the reason}"), state.why))
        )
    if state.more:
        options.append(
            (
                0.8,
                lambda: (
                    expand(
                        rng,
                        "{tell me more|more|anything else|what else|and then|more please|go on|continue|is there more}",
                    ),
                    state.more,
                ),
            )
        )
    if state.size:
        options.append((2.0, lambda: numbers.memory(rng, state.size)[:2]))
    if (term := state.term) and len(term.facets) > 1:
        options.append((1.2, lambda: _about_it(rng, term)))
    if (command := state.command) is not None:
        options.append((3.0, lambda: _change(rng, state, command, wild=wild)))
    weights = [weight for weight, _ in options]
    return rng.choices([make for _, make in options], weights)[0]()


def _about_it(rng: random.Random, term: Term) -> tuple[str, str]:
    facet = rng.choice(list(term.facets))
    ask = expand(rng, rng.choice(FACETS[facet])).replace("X", "it")
    return ask, term.facets[facet]


def _change(rng: random.Random, state: State, command: Command, *, wild: int) -> tuple[str, str]:
    if rng.random() < 0.06:
        ask = expand(
            rng,
            "{and on a gpu|what about a gpu|and on the gpu|and with cuda|can i run that on a gpu|and "
            "on nvidia|how about the gpu}",
        )
        return ask, "Not yet: this release runs on the CPU. CUDA and Intel XPU backends are coming."
    ask, answer, state.command = compose.follow_up(rng, command, wild=wild > 0)
    state.example = state.command.text
    state.why = state.more = ""
    state.term = None
    return ask, answer


def _length(rng: random.Random) -> int:
    draw = rng.random()
    return (
        rng.choice((1, 1, 1, 2, 2, 3)) if draw < 0.6 else rng.randrange(3, 7) if draw < 0.96 else rng.randrange(8, 28)
    )


def dialogue(rng: random.Random, *, held: bool = False, wild: int = 0) -> Dialogue:
    """One dialogue; `held` prefers the questions that training never sees."""
    state = State()
    turns: list[tuple[str, str]] = []
    draw = rng.random()
    system = rng.choice(SYSTEMS) if draw < 0.12 else rng.choice(ONLY_COMMAND) if draw < 0.15 else ""
    wanted = _length(rng)
    while len(turns) < wanted:
        for attempt in range(40):
            trial: State = replace(state)
            ask = _follow_up if turns and rng.random() < 0.5 else _new_question
            pair = ask(rng, trial, wild=wild)
            if not pair[0] or pair[0] in state.asked:
                continue
            question = as_typed(rng, pair[0])
            if is_held(question) and not held:
                continue
            if held and attempt < 30 and not is_held(question) and rng.random() < 0.75:
                continue
            answer = pair[1]
            if system in ONLY_COMMAND:
                if not trial.example or trial.example not in pair[1]:
                    continue
                answer = f"`{trial.example}`"
            state = trial
            state.answer = answer
            state.asked.add(pair[0])
            turns.append((question, answer))
            break
        else:
            wanted -= 1
    if rng.random() < 0.06 and system not in ONLY_COMMAND:
        turns.append((as_typed(rng, expand(rng, BYE)), "Goodbye! Press Ctrl-D or type /exit to leave."))
    return Dialogue(system, turns) if turns else dialogue(rng, held=held, wild=wild)


def dialogues(seed: int, *, held: bool = False, wild: int = 0) -> Iterator[Dialogue]:
    """An endless stream of dialogues."""
    rng = random.Random(seed)
    while True:
        yield dialogue(rng, held=held, wild=wild)


def held_out(seed: int, size: int) -> str:
    """About `size` characters of held-out dialogues, rendered one after another."""
    text, seen = "", set[str]()
    for item in dialogues(seed, held=True):
        if any(is_held(question) for question, _ in item.turns) and item.text not in seen:
            seen.add(item.text)
            text += item.text
        if len(text) >= size:
            return text
    raise AssertionError("the stream is endless")


def main() -> None:
    """Print a few dialogues."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held", action="store_true", help="prefer the questions that are kept out of training")
    options = parser.parse_args()
    stream = dialogues(options.seed, held=options.held)
    for _ in range(options.n):
        print(next(stream).text, end="\n\n")


if __name__ == "__main__":
    main()
