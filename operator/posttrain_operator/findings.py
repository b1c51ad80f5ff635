"""What was found out about objects that are not watched, and what a spec was understood to ask for, for a short while.

Filled by the executor (names that were taken, refusals) and the observer (claims that exist, intents), read by the
observer. Everything here may be forgotten at any time: the next try finds it again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from posttrain_operator.facts import Found, Intent, Refusal
from posttrain_operator.reconcile.relatives import Family
from posttrain_operator.records import Key

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
_MOST_UNDERSTOOD = 1000
"""Each takes 20 KiB, and ten thousand jobs may wait."""


class Recent(Generic[K, V]):
    """A map whose entries are believed for `seconds`; of more than `most` the oldest go."""

    def __init__(self, seconds: float, clock: Callable[[], float], most: float = math.inf) -> None:
        self._seconds, self._clock, self._most = seconds, clock, most
        self._entries: dict[K, tuple[float, V]] = {}

    def get(self, key: K) -> V | None:
        entry = self._entries.get(key)
        return entry[1] if entry and self._clock() - entry[0] < self._seconds else None

    def put(self, key: K, value: V) -> None:
        self._entries.pop(key, None)
        self._entries[key] = (self._clock(), value)
        if len(self._entries) > self._most:
            del self._entries[next(iter(self._entries))]

    def drop(self, key: K) -> None:
        self._entries.pop(key, None)

    def sweep(self) -> None:
        """Drops what is no longer believed."""
        limit = self._clock() - self._seconds
        for key in [key for key, (at, _) in self._entries.items() if at <= limit]:
            del self._entries[key]


@dataclass(frozen=True)
class Published:
    """The CA bundle in the ConfigMap of the job of this uid."""

    uid: str
    bundle: str | None


@dataclass(frozen=True)
class Understood:
    """An intent with all that it was made from."""

    uid: str
    generation: int
    family: Family
    intent: Intent


class Findings:
    """All of them, by job."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self.config: Recent[Key, Found] = Recent(seconds, clock)
        self.obstacle: Recent[Key, Found] = Recent(seconds, clock)
        self.refusal: Recent[Key, Refusal] = Recent(seconds, clock)
        self.exists: Recent[tuple[str, str, str], bool] = Recent(seconds, clock)
        self.understood: Recent[Key, Understood] = Recent(seconds, clock, _MOST_UNDERSTOOD)
        self.published: dict[Key, Published] = {}

    def forget(self, key: Key) -> None:
        """The job is gone."""
        self.published.pop(key, None)
        for findings in self._by_job():
            findings.drop(key)

    def sweep(self) -> None:
        """Called now and then, so that memory does not grow."""
        for findings in self._by_job():
            findings.sweep()
        self.exists.sweep()

    def _by_job(self) -> tuple[Recent[Key, Any], ...]:
        return (self.config, self.obstacle, self.refusal, self.understood)
