"""The output of a child process: passed on line by line, the last lines kept for the termination message."""

from __future__ import annotations

import re
import sys
import threading
from collections import deque
from typing import IO

from posttrain_api.records import MAX_LOG_TAIL_BYTES

KEPT_LINES = 500
MAX_LINE_BYTES = 4096
_PREFIX = re.compile(r"^\[rank(\d+)\]: ?")
RANK_TEMPLATE = "[rank${rank}]: "
"""What torchrun puts before each line of a rank."""


class LogStream:
    """Copies a child's output to ours in a thread."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._thread: threading.Thread | None = None

    def follow(self, stream: IO[bytes]) -> None:
        """Starts copying until the stream ends."""
        self._thread = threading.Thread(target=self._copy, args=(stream,), name="posttrain-log", daemon=True)
        self._thread.start()

    def finish(self, seconds: float = 5.0) -> None:
        """Waits for the end of the stream; a process that we could not end may hold it open for longer."""
        if self._thread is not None:
            self._thread.join(seconds)

    def tail(self, rank: int | None = None) -> str:
        """The last 2 KiB: the lines of this rank where it wrote any, else all lines."""
        lines = list(self._lines)
        if rank is not None:
            own = [_PREFIX.sub("", line) for line in lines if line.startswith(f"[rank{rank}]:")]
            lines = own or lines
        return "\n".join(lines).encode()[-MAX_LOG_TAIL_BYTES:].decode(errors="ignore")

    def _copy(self, stream: IO[bytes]) -> None:
        out = sys.stdout.buffer
        for line in stream:
            out.write(line)
            out.flush()
            self._lines.append(line[-MAX_LINE_BYTES:].decode(errors="replace").rstrip("\r\n"))
