"""Rendered conversations to ids, with the ids that replies really had. Knows a tokenizer, no engine and no turns.

A template would re-encode the model's answers from text, which need not give the ids the model produced. So the ids
are remembered and put back wherever the rendered text agrees, and an engine's cache still holds that prefix.
"""

from collections import deque

from qrun.reply import Prompt
from qrun.tokenizer import Tokenizer

_REMEMBERED = 32  # replies whose ids are kept
_CUT = 64  # ids at a reply's end that may be missing in its message (a stop string, an interrupt)


class Recall:
    """The latest replies' ids, and the encoding that uses them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._spoken: deque[tuple[Prompt, list[int]]] = deque(maxlen=_REMEMBERED)

    def remember(self, prompt: Prompt, ids: list[int]) -> None:
        """Keep the ids of a reply to ``prompt``, stop ids excluded."""
        self._spoken.append((prompt, ids))

    def clear(self) -> None:
        """Forget all of them."""
        self._spoken.clear()

    def encode(self, text: str) -> list[int]:
        """Ids of a rendered conversation, with the ids of the latest reply that it still contains."""
        for prompt, ids in reversed(self._spoken):
            if not text.startswith(prompt.text):
                continue
            for length in range(len(ids), max(0, len(ids) - _CUT), -1):
                said = prompt.text + self._tokenizer.mark(
                    self._tokenizer.text_after(prompt.ids, ids[:length]), "assistant"
                )
                if text.startswith(said):
                    rest = self._tokenizer.encode_marked(text[len(said) :], continues=True)
                    return [*prompt.ids, *ids[:length], *rest]
        return self._tokenizer.encode_marked(text)
