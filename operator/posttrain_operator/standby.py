"""The status server's view of jobs on any replica: the leader's cache, or what the API server says.

A standby watches nothing, yet reports reach it as often as the leader. It looks up the one job and the one pod that a
report speaks of and believes the answer for a few seconds. The same until the leader's cache is complete.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from posttrain_operator.cache import Cache
from posttrain_operator.cluster import Cluster
from posttrain_operator.cluster.kinds import JOB, POD
from posttrain_operator.jobview import CacheView
from posttrain_operator.records import Key
from posttrain_operator.slim import job_record, pod_record
from posttrain_operator.statusserver.view import JobView

FRESH = 10.0
"""Seconds that an answer is believed, as a token review is."""
_MOST = 4096


@dataclass
class _Known:
    """What was asked of one job. `pods`: uids that were looked up since."""

    cache: Cache = field(default_factory=Cache)
    pods: set[str] = field(default_factory=set)
    asked: float = float("-inf")
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class ReplicaView:
    """Implements statusserver.view.JobsView. `complete`: whether the cache holds everything."""

    def __init__(
        self,
        cluster: Cluster,
        cache: Cache,
        complete: Callable[[], bool],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster, self._cache, self._complete, self._now = cluster, CacheView(cache), complete, now
        self._jobs: OrderedDict[Key, _Known] = OrderedDict()

    async def look(self, namespace: str, name: str, pod: tuple[str, str]) -> None:
        """Looks up what is not known yet: nothing where the cache is complete. ApiError where there is no answer."""
        if self._complete():
            return
        known = self._jobs.setdefault(Key(namespace, name), _Known())
        self._jobs.move_to_end(Key(namespace, name))
        while len(self._jobs) > _MOST:
            self._jobs.popitem(last=False)
        async with known.lock:
            if self._now() - known.asked >= FRESH:
                await self._ask_job(known, namespace, name)
            if known.cache.jobs and pod[1] not in known.pods:
                await self._ask_pod(known, namespace, pod)

    async def _ask_job(self, known: _Known, namespace: str, name: str) -> None:
        found = await self._cluster.get(JOB, namespace, name)
        known.cache, known.pods, known.asked = Cache(), set(), self._now()
        if found is not None:
            known.cache.put_job(job_record(found))

    async def _ask_pod(self, known: _Known, namespace: str, pod: tuple[str, str]) -> None:
        found = await self._cluster.get(POD, namespace, pod[0])
        record = pod_record(found) if found is not None else None
        if record is not None:
            known.cache.put_pod(record)
        known.pods.add(pod[1])

    def job(self, namespace: str, name: str) -> JobView | None:
        return self._view(namespace, name).job(namespace, name)

    def pod_uids(self, namespace: str, name: str) -> frozenset[str]:
        return self._view(namespace, name).pod_uids(namespace, name)

    def _view(self, namespace: str, name: str) -> CacheView:
        known = None if self._complete() else self._jobs.get(Key(namespace, name))
        return self._cache if known is None else CacheView(known.cache)
