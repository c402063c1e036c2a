"""The run card and the stats lines as text: what was loaded, how it runs, what replies took. Prints nothing."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qrun.reply import ReplyStats
    from qrun.runcard import RunCard

FINISHED = {
    "length": "stopped at --max-tokens",
    "loop": "stopped: the answer repeated itself (--no-loop-guard lets it)",
    "context": "stopped: the context is full (-c gives more, --overflow roll forgets the oldest turns)",
    "cancelled": "stopped by you",
}
"""What to say of a reply that did not end by itself."""


def size(count: float) -> str:
    """Return bytes as people write them: `512 B`, `64.0 KB`, `12.9 MB`, `1.2 GB`; powers of 1000."""
    for unit in ("B", "KB", "MB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def number(count: int) -> str:
    """Return a count of parameters: `5.1 M`, `21.9 B`."""
    value, unit = (count / 1e9, "B") if count >= 1e9 else (count / 1e6, "M")
    return f"{value:.1f} {unit}" if value < 99.95 else f"{value:.0f} {unit}"


def title(card: "RunCard") -> tuple[str, str]:
    """Return the model's name, and what it is: family and parameters."""
    active = f", {number(card.active_parameters)} active" if card.active_parameters < card.parameters else ""
    return card.model, f"  {card.family}, {number(card.parameters)} parameters{active}"


def rows(card: "RunCard") -> Iterator[tuple[str, str]]:
    """Yield the lines of the run card as (title, value)."""
    named = card.device.lower().startswith(card.backend.lower())
    yield "device", card.device if named else f"{card.backend}, {card.device}"
    yield "weights", f"{card.recipe}, {size(card.weight_bytes)}"
    for line in card.roles:
        yield "", f"{line.role:<9} {line.scheme:<14} {size(line.bytes):>9}"
    yield (
        "cache",
        (
            f"{card.kv}, {card.kv_bytes_per_token / 1024:.2f} KiB a token, "
            f"context {card.context} = {size(card.kv_bytes_per_token * card.context)}"
        ),
    )
    where = "" if card.backend == "cpu" else "of the GPU: "
    yield "memory", f"{where}predicted peak {size(card.predicted_peak)}, measured {size(card.measured_peak)}"
    how = "from the cache of quantized weights" if card.from_store else ""
    quantized = any(line.scheme not in ("bf16", "fp32") for line in card.roles)
    if quantized and not card.from_store:
        how = f"quantized in {card.quantize_seconds:.1f} s"
    yield "loaded", f"in {card.load_seconds:.1f} s" + (f", {how}" if how else "")


def bindings(card: "RunCard") -> Iterator[tuple[str, bool]]:
    """Yield a line of operation, scheme and kernel for each distinct binding, and whether it is a fallback."""
    distinct = list(dict.fromkeys(card.bindings))
    ops = max((len(binding.op) for binding in distinct), default=0)
    schemes = max((len(binding.scheme) for binding in distinct), default=0)
    for binding in distinct:
        slow = "  (fallback)" if binding.fallback else ""
        yield f"{binding.op:<{ops}}  {binding.scheme:<{schemes}}  {binding.kernel}{slow}", binding.fallback


def rate(count: int, seconds: float) -> float:
    """Return tokens a second, 0 where nothing was measured."""
    return count / seconds if seconds > 0 else 0.0


def stats_line(stats: "ReplyStats", finish_reason: str | None) -> str:
    """Return one line on a reply: tokens, speeds, the seed that repeats it, and why it ended if not by itself."""
    read = stats.prompt_tokens - stats.reused_tokens
    parts = [
        f"{stats.new_tokens} tokens, {rate(stats.new_tokens, stats.decode_seconds):.1f} tok/s",
        f"prompt {read} read"
        + (f" + {stats.reused_tokens} reused" if stats.reused_tokens else "")
        + f" in {stats.prefill_seconds:.2f} s",
        f"seed {stats.seed}",
    ]
    return " · ".join([*parts, *([FINISHED[finish_reason]] if finish_reason in FINISHED else [])])


@dataclass
class Totals:
    """What all replies of a chat took."""

    replies: int = 0
    read: int = 0
    reused: int = 0
    written: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def add(self, stats: "ReplyStats") -> None:
        """Count one more reply."""
        self.replies += 1
        self.read += stats.prompt_tokens - stats.reused_tokens
        self.reused += stats.reused_tokens
        self.written += stats.new_tokens
        self.prefill_seconds += stats.prefill_seconds
        self.decode_seconds += stats.decode_seconds

    def rows(self) -> Iterator[tuple[str, str]]:
        """Yield the lines on all of them as (title, value)."""
        speed = rate(self.written, self.decode_seconds)
        yield "chat", f"{self.replies} replies, {self.written} tokens written, {speed:.1f} tok/s"
        share = self.reused / max(1, self.read + self.reused)
        speed = rate(self.read, self.prefill_seconds)
        yield "prompts", f"{self.read} tokens read, {speed:.1f} tok/s, and {self.reused} reused ({share:.0%})"
