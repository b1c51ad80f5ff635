"""For how long nothing has got on: the launcher's look at the marks that ranks leave (signs.py).

Only changes count, and they are timed by our own monotonic clock: neither a clock that is set nor one of another
machine can make a hang, or hide one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from posttrain_trainer import signs


class Pulse:
    """Of all marks in a folder. Looked at about every second."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._clock = clock
        self._marks: dict[str, int] = {}
        self._since = 0.0

    def look(self) -> float | None:
        """On the monotonic clock, when something got on for the last time; None before the first mark."""
        marks = signs.marks(self._folder)
        if marks != self._marks:
            self._marks, self._since = marks, self._clock()
        return self._since if marks else None
