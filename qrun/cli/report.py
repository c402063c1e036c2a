"""Replies as JSON: what `--json`, `--jsonl` and `--batch` print. Knows replies and the run card, prints nothing."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qrun.cli.card import rate

if TYPE_CHECKING:
    from qrun.reply import Choice, Reply
    from qrun.runcard import RunCard


def line(value: dict[str, Any]) -> str:
    """Return an object as one line of JSON, its end included."""
    return json.dumps(value, ensure_ascii=False) + "\n"


def report(card: "RunCard", replies: "Sequence[Reply]") -> dict[str, Any]:
    """Return an answer; seconds are wall clock, speeds tokens a second, log-probabilities natural.

    Of several candidates the first is the answer, all are listed, and what they took is told of them together.
    """
    first = replies[0]
    stats = [reply.stats for reply in replies]
    read = sum(each.prompt_tokens - each.reused_tokens for each in stats)
    made = sum(each.new_tokens for each in stats)
    # Candidates run at the same time.
    prefill = max(each.prefill_seconds for each in stats)
    decode = max(each.decode_seconds for each in stats)
    candidates = {"candidates": [_answer(reply) for reply in replies]} if len(replies) > 1 else {}
    return _answer(first) | {
        "usage": {
            "prompt_tokens": stats[0].prompt_tokens,
            "cached_tokens": stats[0].reused_tokens,
            "completion_tokens": made,
            "total_tokens": stats[0].prompt_tokens + made,
        },
        "timings": {
            "load_seconds": round(card.load_seconds, 4),
            "prefill_seconds": round(prefill, 4),
            "decode_seconds": round(decode, 4),
            "prefill_tokens_per_second": round(rate(read, prefill), 2),
            "decode_tokens_per_second": round(rate(made, decode), 2),
        },
        "model": card.model,
        "recipe": card.recipe,
        **candidates,
    }


def _answer(reply: "Reply") -> dict[str, Any]:
    choices = reply.logprobs
    return {
        "text": reply.text,
        "reasoning": reply.reasoning or None,
        "finish_reason": reply.finish_reason,
        "seed": reply.stats.seed,
    } | ({"logprobs": {"content": [_choice(choice) for choice in choices]}} if choices else {})


def _choice(choice: "Choice") -> dict[str, Any]:
    return {
        "token": choice.text,
        "id": choice.token,
        "logprob": round(choice.logprob, 6),
        "top_logprobs": [
            {"token": other.text, "id": other.token, "logprob": round(other.logprob, 6)} for other in choice.top
        ],
    }
