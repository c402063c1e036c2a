"""The embedded model from end to end on a backend, against the same in plain torch. It knows no kernel."""

import time
from collections.abc import Callable, Iterator
from typing import Final

import torch

from qrun import hub, memory
from qrun.api import run_card
from qrun.backends.base import Backend
from qrun.checkpoint import Checkpoint
from qrun.doctor_check import Check, Progress, first_line
from qrun.doctor_kernels import BROKEN, single
from qrun.engine import Engine
from qrun.loader import Loader, is_tied
from qrun.models import describe
from qrun.recipe import Recipe
from qrun.sampler import Sampler, Sampling
from qrun.session import Session

QUESTION: Final = "How do I start a chat with a model in 4 bits?"
CONTEXT: Final = 256
TIE: Final = 0.1
"""Two tokens' logits so close that rounding may turn them round."""
VOCAB: Final = 5000
DRAWS: Final = 300
SETTINGS: Final = (
    Sampling(temperature=0.0, top_k=0, top_p=1.0, seed=1),
    Sampling(temperature=0.7, top_k=3, top_p=1.0, seed=2),
    Sampling(temperature=1.0, top_k=0, top_p=0.6, seed=3),
)


def model(make: Callable[[], Backend], progress: Progress) -> Iterator[Check]:
    """Whether tokens are chosen as they should be, and whether spark's answer is that of plain torch."""
    for name, work in (("sampling", sampling), ("spark", spark)):
        progress(f"trying {name}", 0, 0)
        try:
            yield work(make)
        except Exception as error:
            yield Check(section="model", name=name, status="failure", detail=first_line(error), fix=BROKEN)


@torch.no_grad()
def sampling(make: Callable[[], Backend]) -> Check:
    """Draws against the chances that they have by definition; the same seed must give the same draws."""
    backend = make()
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0)) * 2
    logits[0, [7, 70, 700]] = torch.tensor([12.0, 11.6, 11.2])  # which share nine tenths of the whole
    there = logits.to(backend.device)
    own = 0
    for wanted in SETTINGS:

        def choose(seeded: Sampling) -> Callable[[torch.Tensor], torch.Tensor] | None:
            return backend.chooser(
                VOCAB, temperature=seeded.temperature, top_k=seeded.top_k, top_p=seeded.top_p, min_p=seeded.min_p,
                seed=seeded.seed or 0,
            )  # fmt: skip

        own += choose(wanted) is not None
        drawn, again = (
            [int(sampler(there)) for _ in range(DRAWS)]
            for sampler in (Sampler(wanted, [], VOCAB, backend.device, choose=choose) for _ in range(2))
        )
        problem = "the same seed gives other tokens" if drawn != again else _improbable(drawn, logits[0], wanted)
        if problem:
            detail = (
                f"wrong at temperature {wanted.temperature:g}, top-k {wanted.top_k}, top-p {wanted.top_p:g}: {problem}"
            )
            return Check(section="model", name="sampling", status="failure", detail=detail, fix=BROKEN)
    where = "on the device" if own == len(SETTINGS) else "in plain torch"
    return Check(
        section="model", name="sampling", status="ok", detail=f"tokens are chosen {where}, as often as they should"
    )


def _improbable(drawn: list[int], logits: torch.Tensor, settings: Sampling) -> str:
    """What is wrong with the draws; nothing where their counts are within five deviations."""
    if settings.temperature == 0:
        return "" if set(drawn) == {int(logits.argmax())} else "not the likeliest"
    chances, order = (logits / settings.temperature).softmax(-1).sort(descending=True)
    width = settings.top_k or len(chances)
    chances = chances[:width] / chances[:width].sum()
    chances = chances * (chances.cumsum(-1) - chances < settings.top_p)
    allowed = {
        int(token): float(chance) for token, chance in zip(order, chances / chances.sum(), strict=False) if chance
    }
    for token in {*drawn, *allowed}:
        chance, count = allowed.get(token, 0.0), drawn.count(token)
        if chance == 0:
            return f"token {token} can never be chosen, and was"
        if abs(count - DRAWS * chance) > 5 * (DRAWS * chance * (1 - chance)) ** 0.5 + 1:
            return f"token {token} came {count} times of {DRAWS}, {DRAWS * chance:.0f} were to be expected"
    return ""


def spark(make: Callable[[], Backend]) -> Check:
    """An answer at wint4 with an int8 cache, token by token the one of plain torch."""
    begun = time.perf_counter()
    text, found = _answer(build(make()))
    with single():
        theirs = build(Backend())
        _, wanted = _answer(theirs)
    detail = f"{len(found)} tokens at wint4 as in plain torch, {time.perf_counter() - begun:.1f} s: {text!r}"
    if found == wanted:
        return Check(section="model", name="spark", status="ok", detail=detail)
    first = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), 0)
    if first and first < min(len(found), len(wanted)):
        with single():
            logits = theirs.logits(wanted[:first])[-1]
        gap = float(logits[wanted[first]] - logits[found[first]])
        if gap < TIE:
            detail = f"another answer than in plain torch after {first} tokens, where two are as likely: {text!r}"
            return Check(section="model", name="spark", status="note", detail=detail)
    return Check(
        section="model",
        name="spark",
        status="failure",
        detail=f"another answer than in plain torch: {text!r}",
        fix=BROKEN,
    )


def build(backend: Backend, quant: str = "W4A16C8") -> Engine:
    """The embedded model on a backend, quantized anew."""
    begun = time.perf_counter()
    recipe = Recipe.parse(quant)
    found = hub.fetch(None, recipe=recipe)
    checkpoint = Checkpoint.open(found.path)
    config = describe(checkpoint.config)
    need = memory.forecast(config, recipe, CONTEXT, tied=is_tied(config, checkpoint), device=backend.device.type)
    loader = Loader(checkpoint, config, recipe, backend)
    decoder = loader.load()
    backend.prepare()
    card = run_card(found.label, loader, need, begun=begun)
    return Engine(
        decoder, backend, config=config, recipe=recipe, card=card, source=found.path,
        generation_defaults=checkpoint.generation_config, context=CONTEXT,
    )  # fmt: skip


def _answer(engine: Engine) -> tuple[str, list[int]]:
    """The likeliest answer to the question as text, and the tokens of both."""
    session = Session(engine, sampling=Sampling(temperature=0.0), max_tokens=32)
    return "".join(session.chat(QUESTION)), list(engine.cached_ids)
