"""Sizes that shapes are padded to, because an Intel GPU compiles for each one anew. It knows no operation."""

ROWS = 128
KEYS = 256
"""Positions that a length is a multiple of."""


def bucket(tokens: int) -> int:
    """The rows that ``tokens`` are padded to: 8, 16, 32, 64, 128, then multiples of 128."""
    if tokens > ROWS:
        return -(-tokens // ROWS) * ROWS
    return max(8, 1 << (tokens - 1).bit_length())


def key_length(positions: int) -> int:
    """The positions that a cache's are padded to, multiples of 256."""
    return -(-positions // KEYS) * KEYS
