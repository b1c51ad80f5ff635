"""How late the event loop is: everything here runs on one loop, so one slow step makes all others wait.

Started by `app`, told to the metrics. Lease renewal, probes and status reports are what suffers first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

INTERVAL = 0.1


async def measure_lag(observe: Callable[[float], None], interval: float = INTERVAL) -> None:
    """For ever: sleeps `interval` seconds and tells how many seconds later than that it woke up."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + interval
        await asyncio.sleep(interval)
        observe(max(0.0, loop.time() - due))
