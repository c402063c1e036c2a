"""What may reach a terminal: text a model or a file made, without the characters that command the terminal."""

_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_PICTURES[0x7F] = 0x2421
_REPLACED: dict[int, int | None] = {
    **_PICTURES,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
    ord("\r"): None,
}


def printable(text: str) -> str:
    """Return `text` with control characters made visible: escape becomes U+241B, so no sequence reaches the terminal.

    Newlines and tabs stay, carriage returns go. It needs no state, so a stream may be filtered piece by piece, and a
    sequence that never ends cannot swallow what follows it.
    """
    return text.translate(_REPLACED)


def one_line(text: str) -> str:
    """Return `text` as one printable line: an error message stays one line whatever a file put into it."""
    return printable(" ".join(text.split()))
