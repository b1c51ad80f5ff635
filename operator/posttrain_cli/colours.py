"""Colour on a terminal, plain text everywhere else (NO_COLOR is respected)."""

from __future__ import annotations

import os
from typing import TextIO

_CODES = {"red": "31", "green": "32", "yellow": "33", "blue": "34"}


def paint(text: str, colour: str, stream: TextIO) -> str:
    """The text, coloured where `stream` is a terminal. KeyError for a colour that is not in the table."""
    code = _CODES[colour]
    if not stream.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{code}m{text}\x1b[0m"
