"""The cache as the status server sees it: read-only, from memory, asked for every report."""

from __future__ import annotations

from posttrain_operator.cache import Cache
from posttrain_operator.facts import JobFacts
from posttrain_operator.records import Key
from posttrain_operator.statusserver.view import JobView, view_of


class CacheView:
    """Implements statusserver.view.JobsView."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    async def look(self, namespace: str, name: str, pod: tuple[str, str]) -> None:
        """Nothing to do: the watches keep it."""

    def job(self, namespace: str, name: str) -> JobView | None:
        """The job, or None where the cache has none."""
        record = self._cache.jobs.get(Key(namespace, name))
        return None if record is None else view_of(record)

    def pod_uids(self, namespace: str, name: str) -> frozenset[str]:
        """The job's pods that exist. A pod that a restart has condemned is no longer heard: it speaks of the past."""
        key = Key(namespace, name)
        record = self._cache.jobs.get(key)
        if record is None:
            return frozenset()
        status = JobFacts.of(record).status
        attempt = status.get("attempt") or {}
        condemned = (
            frozenset(attempt.get("podUIDs") or ()) if attempt.get("number") != status.get("attempts") else frozenset()
        )
        live = {pod.uid for pod in self._cache.pods(key) if pod.job_uid == record.uid and not pod.gone}
        return frozenset(live - condemned)
