"""The fence around the control loop's writes: none is sent by a replica that does not lead at that very moment.

`elector` moves its end on with each renewal, `cluster.api` asks it before each write, `watchdog` reads how long it has
been overdue. It asks nobody: one comparison with the local clock, so that it also holds for the first
thing that a process does after it was frozen.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

from posttrain_operator.cluster.errors import Fenced
from posttrain_operator.cluster.writes import Write


def local_clock() -> float:
    """Seconds that go on while the machine sleeps: Linux's monotonic clock would stand still."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Fence:
    """Closed until `allow` was called, and again when the moment given there has passed or after `shut`."""

    def __init__(self, clock: Callable[[], float] = local_clock) -> None:
        self.clock = clock
        self._until = -math.inf
        self._shut = False
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    def allow(self, until: float) -> None:
        """Writes may be sent before this moment of the local clock."""
        self._until = until

    def shut(self) -> None:
        """No write any more, whatever the clock says."""
        self._shut = True

    def overdue(self) -> float:
        """For how many seconds a replica that led has not led any more; negative while it leads."""
        return self.clock() - self._until if self._until > -math.inf else -math.inf

    def before(self, write: Write) -> None:
        """A gate of `cluster.writes`: Fenced where the write must not be sent."""
        if self._shut or self.clock() >= self._until:
            raise Fenced(0, "Fenced", "not sent: this replica does not lead")
        self._inside += 1
        self._empty.clear()

    def after(self, write: Write) -> None:
        self._inside -= 1
        if not self._inside:
            self._empty.set()

    async def emptied(self, seconds: float) -> bool:
        """Whether every write that was under way got its answer within so many seconds."""
        try:
            await asyncio.wait_for(self._empty.wait(), seconds)
        except TimeoutError:
            return False
        return True
