"""The loop's lag is told when something blocks the loop."""

from __future__ import annotations

import asyncio
import contextlib
import time

from posttrain_operator.looplag import measure_lag


async def test_a_blocked_loop_is_seen() -> None:
    seen: list[float] = []
    task = asyncio.create_task(measure_lag(seen.append, 0.001))
    await asyncio.sleep(0.01)
    time.sleep(0.1)  # noqa: ASYNC251  what the measurement is for
    await asyncio.sleep(0.01)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert max(seen) > 0.09
    assert all(lag >= 0 for lag in seen)
