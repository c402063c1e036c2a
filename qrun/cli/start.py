"""From options to a loaded model: what `chat`, `generate` and `info` do before their own work begins."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qrun.cli import card as cards
from qrun.cli.console import Console, Waiting
from qrun.cli.interrupt import Abandon
from qrun.cli.options import EMBEDDED, ModelOptions
from qrun.cli.sampling_options import SamplingOptions

if TYPE_CHECKING:
    from qrun.engine import Engine
    from qrun.session import Session


def load_engine(options: ModelOptions, console: Console) -> "Engine":
    """Check the options, then load the model with progress on stderr.

    Raises:
        QrunError: any of the tree in `qrun.errors`; usage errors come before torch is imported.
    """
    options.check()
    recipe = options.recipe()
    with working(f"loading {options.model}", console) as waiting:
        import qrun

        return qrun.load(options.model, quant=recipe, progress=waiting.update, **options.load_arguments())


@contextmanager
def working(what: str, console: Console) -> Generator[Waiting]:
    """Show on stderr how far some long work is; Ctrl-C ends it wherever it is.

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """
    with Abandon(), console.waiting(what, bar=True) as waiting:
        yield waiting


def open_session(options: ModelOptions, sampling: SamplingOptions, console: Console) -> "tuple[Engine, Session]":
    """Load the model, show its card, and open a conversation with it.

    Raises:
        QrunError: any of the tree in `qrun.errors`.
    """
    options.check()
    sampling.check()
    engine = load_engine(options, console)
    from qrun.session import Session

    session = Session(
        engine,
        system=sampling.system,
        sampling=sampling.sampling(engine.generation_defaults),
        max_tokens=sampling.max_tokens,
        stop=sampling.stop or (),
        overflow=sampling.overflow,
        thinking=sampling.think,
        loop_guard=sampling.loop_guard,
    )
    show_card(engine, console)
    return engine, session


def show_card(engine: "Engine", console: Console) -> None:
    """Write the run card to stderr: with the kernels if the console is verbose."""
    card = engine.card
    console.heading(*cards.title(card))
    if card.model == EMBEDDED:
        console.note(
            f"  a demonstration of {cards.number(card.parameters)} parameters: expect small talk, not knowledge"
        )
    console.titled(cards.rows(card))
    for note in card.notes:
        console.warn(note)
    if console.verbose:
        for line, fallback in cards.bindings(card):
            console.note(f"  {line}", style="yellow" if fallback else "dim")
