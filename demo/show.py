"""What the demo prints: numbered steps with their time, plain text, colours on a terminal only.

Used by the demo's steps and nowhere else. It never decides anything.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator

BOLD, GREEN, RED, DIM, PLAIN = "\033[1m", "\033[32m", "\033[31m", "\033[2m", "\033[0m"


def coloured(text: str, colour: str) -> str:
    """The text in a colour where standard output is a terminal and NO_COLOR is unset."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"{colour}{text}{PLAIN}"


def line(text: str = "", colour: str | None = None) -> None:
    """One line, at once: the output may be a pipe."""
    print(coloured(text, colour) if colour else text, flush=True)


def block(text: str) -> None:
    """Indented lines, for the output of a command."""
    for each in text.rstrip().splitlines():
        line(f"    {each}")


class Steps:
    """Numbers the steps and says what each one took."""

    def __init__(self) -> None:
        self._number = 0
        self._began = time.monotonic()

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Announces a step; says its seconds when it ended well, and nothing where it did not."""
        self._number += 1
        line()
        line(f"[{self._number}] {title}", BOLD)
        began = time.monotonic()
        yield
        line(f"    done in {time.monotonic() - began:.0f} s", DIM)

    def total(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began
