"""A token bucket per key: how often one pod may report, and how often one address may fail to authenticate.

Used by the handlers, in memory, on one event loop. Buckets that are full again are forgotten, so memory follows the
number of keys that are active, not that ever were.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class _Bucket:
    tokens: float
    at: float


class RateLimiter:
    """`burst` requests at once, then one every `interval` seconds, for each key."""

    def __init__(self, burst: int, interval: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst = burst
        self._interval = interval
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}
        self._sweep_at = clock()

    def take(self, key: str) -> float:
        """0.0 where the request may go on, else the seconds until the next one may."""
        bucket = self._current(key)
        if bucket.tokens < 1:
            return (1 - bucket.tokens) * self._interval
        bucket.tokens -= 1
        self._buckets[key] = bucket
        return 0.0

    def wait(self, key: str) -> float:
        """As `take`, but uses nothing up: for limits that count failures only."""
        return max(0.0, (1 - self._current(key).tokens) * self._interval)

    def _current(self, key: str) -> _Bucket:
        now = self._clock()
        self._sweep(now)
        known = self._buckets.get(key)
        if known is None:
            return _Bucket(self._burst, now)
        known.tokens = min(self._burst, known.tokens + (now - known.at) / self._interval)
        known.at = now
        return known

    def _sweep(self, now: float) -> None:
        full_after = self._burst * self._interval
        if now - self._sweep_at < full_after:
            return
        self._sweep_at = now
        self._buckets = {key: each for key, each in self._buckets.items() if now - each.at < full_after}
