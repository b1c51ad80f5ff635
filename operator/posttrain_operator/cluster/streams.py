"""What a watch stream must not do to whoever reads it: break a line in two, or begin anew a hundred times a second.

kopf reads watches line by line and ends for good at half a line and at an ERROR event that is not 410; both are an API
server in trouble, not a reason to forget everything that is known. It also opens a stream anew at once when one ends.
So the session of the watches hands out whole lines only, turns an ERROR event into the end of the stream (kopf then
goes on from the last version it saw), and holds back streams that keep ending at once.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp

log = logging.getLogger(__name__)
_ERROR = b'{"type":"ERROR"'
_GONE = 410
SHORT_LIFE = 5.0
"""Seconds: a stream that ends sooner has told nothing."""


class WholeLines:
    """A response's content, of which only whole lines are read. Everything else is the content's own."""

    def __init__(self, content: aiohttp.StreamReader) -> None:
        self._content = content

    def __getattr__(self, name: str) -> Any:
        return getattr(self._content, name)

    async def iter_chunked(self, size: int) -> AsyncIterator[bytes]:
        """Chunks that end with a line. ClientPayloadError at an ERROR event other than 410."""
        rest = b""
        async for data in self._content.iter_chunked(size):
            whole, newline, rest = (rest + data).rpartition(b"\n")
            if newline:
                _raise_error(whole)
                yield whole + newline
        if rest:
            log.warning("a watch stream ended in the middle of a line: %s", rest[:100].decode(errors="replace"))


def _raise_error(lines: bytes) -> None:
    """ClientPayloadError for the first ERROR event; one of code 410 is left to the reader, who then lists anew."""
    if not lines.startswith(_ERROR) and b"\n" + _ERROR not in lines:  # the common case costs one search
        return
    for line in lines.split(b"\n"):
        told = _error_in(line) if line.startswith(_ERROR) else None
        if told is not None and told.get("code") != _GONE:
            log.warning("a watch stream told of an error, it is opened anew: %s", told.get("message"))
            raise aiohttp.ClientPayloadError(f"the API server ended the watch: {told.get('message')}")


def _error_in(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line).get("object")
    except ValueError:
        return None
    return found if isinstance(found, dict) else {}


class WatchResponse(aiohttp.ClientResponse):
    """A response whose content is read by whole lines where it is a watch's."""

    async def start(self, connection: Any) -> aiohttp.ClientResponse:
        await super().start(connection)
        if is_watch(self.url) and self.status == 200:
            self.content: Any = WholeLines(self.content)
        return self


def is_watch(url: Any) -> bool:
    """Whether a request asks for a stream."""
    return bool(url.query.get("watch") == "true")


class Pace:
    """How long a stream that ended early waits before it is opened again: `first`·2ⁿ s up to `limit`, jittered."""

    def __init__(self, first: float = 0.5, limit: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._first, self._limit, self._clock = first, limit, clock
        self._opened: dict[str, float] = {}
        self._early: dict[str, int] = {}

    def opened(self, path: str) -> None:
        """A stream of this path delivers from now on."""
        self._opened[path] = self._clock()

    def delay(self, path: str) -> float:
        """Seconds to wait before the path is asked for again; 0 where its last stream lived, or never was."""
        opened = self._opened.pop(path, None)
        if opened is None:  # the first, or a request that is tried again: its sender has a back-off of its own
            return 0.0
        if self._clock() - opened >= SHORT_LIFE:
            self._early.pop(path, None)
            return 0.0
        count = self._early.get(path, 0)
        self._early[path] = count + 1
        return float(min(self._limit, self._first * 2.0 ** min(count, 30)) * (0.5 + random.random() / 2))
