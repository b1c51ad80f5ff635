"""The global brake: all workers rest while the API server asks for it or does not answer.

The worker pulls it where a pass met no answer; the API client tells it of every answer, and after one that is an
answer the rests grow from the shortest again. Without it a thousand jobs would each run into the same wall, and use
their own back-offs up on it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

from posttrain_operator.cluster.errors import is_outage

_MOST = 10
"""A server may ask for a rest of so many times our own longest; one that asks for a day is mistaken."""


class Brake:
    """`first`: seconds after the first failure, doubled with each further one up to `limit`."""

    def __init__(
        self,
        first: float = 0.5,
        limit: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._first, self._limit, self._clock, self._chance = first, limit, clock, chance
        self._until = 0.0
        self._failures = 0

    @property
    def rest(self) -> float:
        """Seconds that everybody still waits; 0 where nothing is wrong."""
        return max(0.0, self._until - self._clock())

    def pull(self, retry_after: float | None) -> float:
        """Everybody waits what the server asked for or a little more; without a wish 0.75 to 1.25 times the back-off.
        Retry-After: 0 is no wish.

        Requests that fail together count once. Returns the seconds.
        """
        if self.rest == 0:
            self._failures += 1
        if retry_after:
            delay = min(retry_after, _MOST * self._limit) * (1 + self._chance() / 4)
        else:
            delay = min(self._limit, self._first * 2.0 ** min(self._failures - 1, 30)) * (0.75 + self._chance() / 2)
        self._until = max(self._until, self._clock() + delay)
        return delay

    def heard(self, _method: str, code: int, _seconds: float) -> None:
        """An observer of `cluster.api`: whatever the server refused, it is there."""
        if code and not is_outage(code):
            self._failures = 0

    async def wait(self) -> None:
        """Returns when the rest is over."""
        # Until the moment has passed, which may be moved on while we wait.
        while (rest := self.rest) > 0:  # noqa: ASYNC110
            await asyncio.sleep(rest)
