"""Makes untrusted text safe for a terminal, a picture or a spreadsheet."""

from __future__ import annotations

import unicodedata

_DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def _is_control(character: str) -> bool:
    return character in _DIRECTIONS or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


def has_control(text: str) -> bool:
    """Whether text has a control character, a line break, or a lone surrogate."""
    return not (text.isascii() and text.isprintable()) and any(map(_is_control, text))


def printable(text: str) -> str:
    """Replaces control characters, which could act on a terminal, by `?`."""
    if not has_control(text):
        return text
    return "".join("?" if _is_control(character) else character for character in text)


def csv_cell(text: str) -> str:
    """Prefixes an apostrophe to text that a spreadsheet would compute or that begins with one."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "'")) else text


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, 300 characters at most, or else its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
