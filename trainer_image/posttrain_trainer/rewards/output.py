"""What a reward's process prints: into the rank's log, but never more than a little for each call.

A function that prints in a loop would fill the log's volume, or block on a full pipe until its deadline. So all of it
is read, the beginning of it is logged and the rest is counted.
"""

from __future__ import annotations

import logging
import os

log = logging.getLogger(__name__)

MOST_BYTES = 8192
"""Logged of one call."""
_CHUNK = 1 << 16
_CHUNKS = 64
"""Read at one look, so that a flood does not keep the rank from looking at its clock."""


class Output:
    """Standard output and error of the process that scores for `name`; `file`: the pipe's end, which it closes."""

    def __init__(self, name: str, file: int) -> None:
        os.set_blocking(file, False)
        self.name = name
        self.file: int | None = file
        self._left = MOST_BYTES
        self._dropped = 0
        self._begun = b""
        self._last = ""

    def begin(self) -> None:
        """A new call: it may print again. Says how much of the last one was left out."""
        self.look()
        self._say(self._begun)
        self._begun = b""
        if self._dropped:
            log.info("reward %s: %d bytes more that it printed are not shown", self.name, self._dropped)
        self._left, self._dropped = MOST_BYTES, 0

    def look(self) -> None:
        """Reads what is there."""
        for _ in range(_CHUNKS if self.file is not None else 0):
            try:
                data = os.read(self.file, _CHUNK) if self.file is not None else b""
            except BlockingIOError:
                return
            if not data:
                self._close()
                return
            self._take(data)

    def end(self) -> str:
        """The process is gone: the last line that it printed, empty where there is none."""
        self.begin()
        self._close()
        return self._last

    def _take(self, data: bytes) -> None:
        shown = data[: self._left]
        self._left -= len(shown)
        self._dropped += len(data) - len(shown)
        *lines, self._begun = (self._begun + shown).split(b"\n")
        for line in lines:
            self._say(line)

    def _say(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        if text:
            self._last = text
            log.info("reward %s: %s", self.name, text)

    def _close(self) -> None:
        if self.file is not None:
            os.close(self.file)
            self.file = None
