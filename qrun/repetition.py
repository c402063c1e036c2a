"""Notices when a model has fallen into an endless loop, from token ids alone; knows no text and no probabilities.

Two signs, each on generated tokens only:

- *Cycle*: the last tokens are one cycle of 1 to 256 tokens, repeated over at least ``256 + 4 * cycle`` tokens. The
  constant part lets honest repetition through (rulers, indentation, "ha ha ha", a table of zeros); the proportional
  part asks a long passage to come back word for word more than four times.
- *Near-loop*: of the last 3000 tokens, 99 % ended a run of four tokens that had been generated three times before:
  a few sentences in changing order, or a cycle longer than 256. Window and threshold are the defaults of FastDeploy's
  ``early stop`` (``window_size`` 3000, ``threshold`` 0.99), which counts consecutive tokens of probability above the
  threshold; here "the model was certain" becomes "this was all said before", so no probabilities leave the device.
"""

from collections import deque
from collections.abc import Sequence

_STRIDE = 32  # tokens between two looks for a cycle: one look is linear in the tail it examines
_GRAM = 4
_SEEN = 3


class LoopGuard:
    """Fed every generated token once; says when to stop.

    Amortised cost a token is a few microseconds; memory is one small dictionary entry per new run of four tokens.
    """

    def __init__(
        self, *, max_cycle: int = 256, base: int = 256, laps: int = 4, window: int = 3000, threshold: float = 0.99
    ) -> None:
        """``base + laps * cycle`` periodic tokens make a cycle; ``threshold`` of ``window`` tokens a near-loop."""
        self._max_cycle = max_cycle
        self._base = base
        self._laps = laps
        self._window = window
        self._needed = threshold * window
        self._tail: deque[int] = deque(maxlen=base + (laps + 1) * max_cycle)
        self._pushed = 0
        self._grams: dict[int, int] = {}
        self._familiar: deque[bool] = deque()
        self._familiar_count = 0

    def push(self, token_id: int) -> bool:
        """Take the next generated token; True once the tail is a loop."""
        self._tail.append(token_id)
        self._pushed += 1
        if self._is_near_loop():
            return True
        return self._pushed % _STRIDE == 0 and self._pushed >= self._base and self._is_cycle()

    def _is_near_loop(self) -> bool:
        tail = self._tail
        if len(tail) < _GRAM:
            return False
        gram = hash((tail[-4], tail[-3], tail[-2], tail[-1]))
        count = self._grams.get(gram, 0)
        self._grams[gram] = count + 1
        familiar = count >= _SEEN
        self._familiar.append(familiar)
        self._familiar_count += familiar
        if len(self._familiar) > self._window:
            self._familiar_count -= self._familiar.popleft()
        return len(self._familiar) == self._window and self._familiar_count >= self._needed

    def _is_cycle(self) -> bool:
        return _has_cycle(list(reversed(self._tail)), self._max_cycle, self._base, self._laps)


def _has_cycle(newest_first: Sequence[int], max_cycle: int, base: int, laps: int) -> bool:
    """Whether some prefix of ``newest_first`` has a period p <= max_cycle and a length >= base + laps * p.

    The border table of Knuth, Morris and Pratt gives the smallest period of every prefix in one pass; that period
    never shrinks as the prefix grows, so ordinary text ends the pass soon after max_cycle tokens.
    """
    border = [0] * (len(newest_first) + 1)
    match = 0
    for length in range(2, len(newest_first) + 1):
        token = newest_first[length - 1]
        while match and newest_first[match] != token:
            match = border[match]
        if newest_first[match] == token:
            match += 1
        border[length] = match
        period = length - match
        if period > max_cycle:
            return False
        if length >= base + laps * period:
            return True
    return False
