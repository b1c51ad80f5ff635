"""Ends the process when the lease is lost and the event loop does not see to it: it may hang, or have been frozen.

A thread, because the loop cannot watch itself. It takes no lock and awaits nothing. Started and stopped by `app`.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

from posttrain_operator.leader.fence import Fence

log = logging.getLogger(__name__)
EXIT_LOST = 4
_LOOK, _GRACE = 0.1, 0.5


class Watchdog:
    """Ends the process half a second after the lease was lost; until then it may end by itself and in order."""

    def __init__(self, fence: Fence, end: Callable[[int], None] = os._exit) -> None:
        self._fence, self._end = fence, end
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lease watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """The lease is given up, or was never held: nothing to watch."""
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(_LOOK):
            overdue = self._fence.overdue()
            if overdue > _GRACE:
                log.critical("the lease was lost %.1f s ago and the process still runs: it ends now", overdue)
                self._end(EXIT_LOST)
                return
