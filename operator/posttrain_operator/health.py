"""What the probes answer from: flags that the operator sets, nothing that is asked of the cluster at that moment.

`app` and `leader` set them, the HTTP endpoints /livez and /readyz read them. Ready is a standby that knows who leads,
and a leader whose every initial list has been delivered: one that leads and watches nothing must never look ready.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class Health:
    """`standing_by`: another replica leads. `lists_delivered` is set once; `beat` is called by the event loop; `detail`
    says what is waited for."""

    def __init__(self, limit_seconds: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.standing_by = False
        self.lists_delivered = False
        self.stopping = False
        self.detail = "starting"
        self._limit, self._clock = limit_seconds, clock
        self._last_beat = clock()

    def beat(self) -> None:
        """The event loop got round."""
        self._last_beat = self._clock()

    @property
    def ready(self) -> bool:
        return (self.standing_by or self.lists_delivered) and not self.stopping

    @property
    def alive(self) -> bool:
        return self._clock() - self._last_beat < self._limit
