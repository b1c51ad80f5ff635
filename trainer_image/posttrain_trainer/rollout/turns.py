"""How ranks that generate at their own pace still agree to stop: they take turns together every few seconds.

Called by both rollout engines. How long a completion gets is known to nobody beforehand, so the ranks cannot count
turns; each says at every turn whether it is still busy, and one that has finished goes on taking turns until all have.
"""

from __future__ import annotations

import time

from posttrain_trainer.rollout.base import Stopping
from posttrain_trainer.runtime import Control

SECONDS = 1.0
"""Between turns: far below any grace period, and a rank waits for its slowest peer once a second only."""


class Stopped(Exception):
    """The ranks agreed to stop."""


class Turns:
    """Of one rollout on one rank. `pass_by` often while busy, then `finish` once."""

    def __init__(self, control: Control, stopping: Stopping) -> None:
        self._control = control
        self._stopping = stopping
        self._last = time.monotonic()

    def pass_by(self) -> None:
        """Takes a turn if one is due. Raises Stopped, on every rank at the same turn."""
        if time.monotonic() - self._last >= SECONDS:
            self._take(busy=True)
            self._last = time.monotonic()

    def finish(self) -> None:
        """Takes turns until every rank has finished; at least one. Raises Stopped."""
        while self._take(busy=False):
            pass

    def _take(self, busy: bool) -> bool:
        if self._stopping():
            raise Stopped
        return self._control.any(busy)
