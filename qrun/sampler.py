"""Logits to a token, on the device they are on. It knows numbers, not text; the settings are plain data."""

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from qrun.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

CANDIDATES = 256  # tried first where only top-p or min-p cuts: enough for all but flat distributions


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen; temperature 0 takes the likeliest. Penalties are off at 1, 0 and 0.

    Applied in this order: repeat_penalty (CTRL, Keskar 2019; over prompt and reply), presence and frequency penalties
    (OpenAI's definition; over the reply), temperature, top_k, top_p (Holtzman 2020), min_p (Nguyen 2024).
    The defaults are the fallback for a model without a generation_config.json.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        def need(name: str, good: bool, want: str) -> None:
            if not good:
                raise UsageError(f"{name} is {getattr(self, name)}: it must be {want}")

        need("temperature", 0 <= self.temperature <= 100, "from 0 (greedy) to 100")
        need("top_k", self.top_k >= 0, "0 (off) or more")
        need("top_p", 0 < self.top_p <= 1, "above 0, at most 1 (off)")
        need("min_p", 0 <= self.min_p < 1, "from 0 (off) to below 1")
        need("repeat_penalty", 0 < self.repeat_penalty <= 100, "above 0 (1 is off)")
        need("presence_penalty", math.isfinite(self.presence_penalty), "a finite number")
        need("frequency_penalty", math.isfinite(self.frequency_penalty), "a finite number")
        need("seed", self.seed is None or 0 <= self.seed < 1 << 63, "from 0 to 2^63 - 1")

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> "Sampling":
        """What a model's generation_config.json asks for; what it leaves out is off, and an empty one is the fallback.

        Raises UsageError where a value is impossible.
        """
        names = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
        names |= {"repetition_penalty": "repeat_penalty"}
        found: dict[str, Any] = {
            ours: config[theirs] for theirs, ours in names.items() if config.get(theirs) is not None
        }
        for name, value in found.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UsageError(f"generation_config.json: {name} is {value!r}: it must be a number")
        if config.get("do_sample") is False:
            found["temperature"] = 0.0
        if not found:
            return cls()
        plain: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        return cls(**(plain | found))

    def seeded(self) -> "Sampling":
        """Itself, with a fresh random seed where it has none."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(32))


class Constraint(Protocol):
    """What a reply is held to, one object a reply: asked before each token, told each one."""

    @property
    def complete(self) -> bool:
        """Whether nothing may follow: the reply ends here, offered an end or not."""
        ...

    def allowed(self) -> "Tensor | None":
        """The tokens that may come next, bool [V] on the CPU; ids that end a reply are among them where it may end.

        None where any may. The next call may overwrite it.
        """
        ...

    def push(self, token: int) -> None:
        """Take the token that was chosen; ids that end a reply are not pushed."""
        ...


Choose = Callable[[Sampling], "Callable[[Tensor], Tensor] | None"]
"""Seeded settings -> a device's own way to choose by them, logits [1, V] -> token [1], or None where it has none."""


class Sampler:
    """One reply's choices: reproducible from its seed, and mindful of the tokens so far where a penalty asks."""

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        vocab: int,
        device: object,
        *,
        choose: Choose | None = None,
    ) -> None:
        import torch

        self.settings = sampling.seeded()
        self._kernel = None if choose is None else choose(self.settings)
        self.random = torch.Generator(device=str(device)).manual_seed(self.settings.seed or 0)
        s = self.settings
        self.seen: Tensor | None = None
        self.counts: Tensor | None = None
        if s.repeat_penalty != 1:
            self.seen = torch.zeros(vocab, dtype=torch.bool, device=str(device))
            self.seen[torch.tensor(list(prompt), dtype=torch.long, device=str(device))] = True
        if s.presence_penalty or s.frequency_penalty:
            self.counts = torch.zeros(vocab, device=str(device))

    def __call__(self, logits: "Tensor", allowed: "Tensor | None" = None) -> "Tensor":
        """logits [1, V] float32 -> the chosen token [1], int64: one of those ``allowed``, bool [V] on the CPU."""
        penalised = self._penalised(logits[0])
        if allowed is None:
            token = self._among_all(penalised)
        elif penalised.device.type == "cpu" and self._kernel is None:
            ids = allowed.nonzero()[:, 0]  # few as a rule; a top-k over many equal ones is slow
            token = ids[self._choose(penalised[ids])]
        else:
            token = self._among_all(self._masked(penalised, allowed))
        if self.seen is not None:
            self.seen.index_fill_(0, token, True)
        if self.counts is not None:
            self.counts[token] += 1
        return token

    def _among_all(self, logits: "Tensor") -> "Tensor":
        return self._choose(logits) if self._kernel is None else self._kernel(logits[None])

    def _masked(self, logits: "Tensor", allowed: "Tensor") -> "Tensor":
        if logits.device.type != "cpu":
            allowed = allowed.pin_memory()  # or the copy would wait for all that is under way
        return logits.masked_fill(~allowed.to(logits.device, non_blocking=True), -math.inf)

    def _penalised(self, logits: "Tensor") -> "Tensor":
        import torch

        s = self.settings
        if self.seen is not None:
            harder = torch.where(logits > 0, logits / s.repeat_penalty, logits * s.repeat_penalty)
            logits = torch.where(self.seen, harder, logits)
        if self.counts is not None:
            logits = logits - s.presence_penalty * (self.counts > 0) - s.frequency_penalty * self.counts
        return logits

    def _choose(self, logits: "Tensor") -> "Tensor":
        import torch

        s = self.settings
        if s.temperature == 0:
            return logits.argmax(-1, keepdim=True)
        logits = logits / s.temperature
        cut = s.top_p < 1 or s.min_p > 0
        # Whether a few candidates are enough is read from the device: no wait on a CPU, one on all others.
        few = CANDIDATES if logits.device.type == "cpu" else logits.shape[0]
        width = s.top_k or (few if cut else 0)
        if not 0 < width < logits.shape[0]:
            width = logits.shape[0]
        values, ids = (logits, None) if width == logits.shape[0] and not cut else logits.topk(width)
        # Probabilities among what top-k left: of all tokens where top-k is off.
        total = (values if s.top_k else logits).logsumexp(-1)
        chances = (values - total).exp()
        if (
            cut
            and not s.top_k
            and width < logits.shape[0]
            and chances.sum() < s.top_p
            and chances[-1] >= s.min_p * chances[0]
        ):
            values, ids = logits.sort(descending=True)
            chances = (values - total).exp()
        if s.top_p < 1:
            chances = chances * (chances.cumsum(-1) - chances < s.top_p)
        if s.min_p > 0:
            chances = chances * (chances >= s.min_p * chances[0])
        # The Gumbel trick in the form p / Exp(1): an argmax instead of a scan, and no wait for the device.
        race = chances / torch.empty_like(chances).exponential_(generator=self.random)
        best = race.argmax(-1, keepdim=True)
        return best if ids is None else ids[best]
