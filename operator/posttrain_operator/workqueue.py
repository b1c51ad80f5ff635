"""The work queue: which job is looked at next.

client-go's rules: a key waits at most once, never two workers on one key, a key that is added while it is worked on
runs again afterwards, so no hint is lost. A key that failed comes back after 1 s, 2 s, 4 s … with jitter. Filled by
`watch` and `resync`, emptied by the workers. All of it is memory: after a restart everything is listed and added
again.
"""

from __future__ import annotations

import asyncio
import heapq
import random
import time
from collections import deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class KeyQueue(Generic[K]):
    """The rules without a clock: every moment is an argument, in seconds of any monotonic clock."""

    def __init__(self) -> None:
        self._ready: deque[tuple[K, float]] = deque()
        self._dirty: set[K] = set()
        self._processing: set[K] = set()
        self._due: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._pushed = 0

    def __len__(self) -> int:
        """Keys that are ready to be worked on."""
        return len(self._ready)

    def oldest(self) -> float | None:
        """Since when the key that has waited longest is ready; None where none is."""
        return self._ready[0][1] if self._ready else None

    def add(self, key: K, now: float = 0.0) -> None:
        """The key is to be looked at as soon as possible."""
        if key in self._dirty:
            return
        self._dirty.add(key)
        if key not in self._processing:
            self._ready.append((key, now))

    def add_at(self, key: K, moment: float) -> None:
        """The key is to be looked at no later than `moment`; an earlier wish stands."""
        if moment >= self._due.get(key, float("inf")):
            return
        self._due[key] = moment
        self._pushed += 1  # keys need no order: the number decides between equal moments
        heapq.heappush(self._heap, (moment, self._pushed, key))

    def pop(self, now: float) -> K | None:
        """The next key, now being worked on; None where none is ready."""
        self._release(now)
        if not self._ready:
            return None
        key, _ = self._ready.popleft()
        self._dirty.discard(key)
        self._processing.add(key)
        return key

    def done(self, key: K, now: float = 0.0) -> None:
        """The key is no longer worked on; it runs again where it was added meanwhile."""
        self._processing.discard(key)
        if key in self._dirty:
            self._ready.append((key, now))

    def next_due(self) -> float | None:
        """When the next delayed key becomes ready."""
        while self._heap and self._due.get(self._heap[0][2]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def _release(self, now: float) -> None:
        while (moment := self.next_due()) is not None and moment <= now:
            key = heapq.heappop(self._heap)[2]
            del self._due[key]
            self.add(key, moment)


class Backoff(Generic[K]):
    """Seconds until a failed key is tried again: base·2ⁿ up to `limit`, times 0.5 to 1 by chance."""

    def __init__(self, base: float, limit: float, chance: Callable[[], float] = random.random) -> None:
        self._base, self._limit, self._chance = base, limit, chance
        self._failures: dict[K, int] = {}

    def failed(self, key: K) -> float:
        """Counts one more failure and says how long to wait."""
        count = self._failures.get(key, 0)
        self._failures[key] = count + 1
        full = min(self._limit, self._base * 2.0 ** min(count, 30))
        return full * (0.5 + self._chance() / 2)

    def failures(self, key: K) -> int:
        """How often the key has failed in a row."""
        return self._failures.get(key, 0)

    def succeeded(self, key: K) -> None:
        """Forgets the key's failures."""
        self._failures.pop(key, None)


class WorkQueue(Generic[K]):
    """KeyQueue on the monotonic clock (the event loop's own), with workers that wait."""

    def __init__(self, backoff: Backoff[K]) -> None:
        self._keys: KeyQueue[K] = KeyQueue()
        self._backoff = backoff
        self._turn = asyncio.Lock()
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        return len(self._keys)

    def waited(self) -> float:
        """Seconds that the oldest ready key has waited; 0 where none is ready."""
        oldest = self._keys.oldest()
        return 0.0 if oldest is None else max(0.0, time.monotonic() - oldest)

    def add(self, key: K) -> None:
        self._keys.add(key, time.monotonic())
        self._wake.set()

    def add_after(self, key: K, seconds: float) -> None:
        if seconds <= 0:
            return self.add(key)
        self._keys.add_at(key, time.monotonic() + seconds)
        self._wake.set()
        return None

    def retry(self, key: K) -> float:
        """Adds the key again after its backoff; returns the seconds."""
        delay = self._backoff.failed(key)
        self.add_after(key, delay)
        return delay

    def succeeded(self, key: K) -> None:
        self._backoff.succeeded(key)

    def done(self, key: K) -> None:
        self._keys.done(key, time.monotonic())
        self._wake.set()

    async def get(self) -> K:
        """Waits for the next key. Call `done` with it afterwards, whatever happened."""
        async with self._turn:
            while True:
                self._wake.clear()
                now = time.monotonic()
                if (key := self._keys.pop(now)) is not None:
                    return key
                await self._sleep(self._keys.next_due(), now)

    async def _sleep(self, due: float | None, now: float) -> None:
        try:
            async with asyncio.timeout(None if due is None else max(0.0, due - now)):
                await self._wake.wait()
        except TimeoutError:
            return
