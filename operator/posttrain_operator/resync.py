"""The safety nets under the watches: the initial lists, a slow resync, and a comparison of the cache with the cluster.

kopf does not tell of deletions that it missed while its stream was away, and a watch that died silently looks like a
quiet cluster. So the metadata of everything is listed now and then: what is gone is dropped, and a cache that stays
behind ends the process.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from posttrain_operator.cache import Cache
from posttrain_operator.cluster import Cluster
from posttrain_operator.cluster.api import resource_path
from posttrain_operator.cluster.errors import ApiError
from posttrain_operator.cluster.kinds import CHILDREN, JOB, POD, Kind
from posttrain_operator.facts import JobFacts
from posttrain_operator.records import Key
from posttrain_operator.settings import Timing
from posttrain_operator.watch import BackendsChanged, Streams
from posttrain_operator.workqueue import WorkQueue

log = logging.getLogger(__name__)
_CACHED = {JOB: "jobs", POD: "pods"} | {kind: kind.kind for kind in CHILDREN}
_POLL = 0.05
_DEAD, _OPEN, _REOPENED = 6, 3, 1
"""Behind twice running with an open stream, a watch is dead. One that the API server keeps ending is behind as it
should, but six times running no more."""


class Diverged(Exception):
    """A watch has stayed behind the cluster for so long that it is dead. The process ends and starts anew."""


class Lost(NamedTuple):
    """An object of the cache that the cluster has no more, without any watch having said so."""

    kind: Kind
    key: Key
    uid: str


@dataclass(frozen=True)
class Differences:
    """`behind`: by kind, how many objects the cache lacks or has in an older version. `reopened`: kinds whose streams
    were not open all the time: these are late, and may be as they should."""

    lost: tuple[Lost, ...]
    behind: Mapping[Kind, int]
    reopened: frozenset[Kind]


Told = Callable[[str, str, int], None]
"""Told of a comparison: the kind, the problem (`lost` or `behind`), how many objects have it."""


class Lists:
    """Compares the cluster with the cache for all watched kinds and `namespaces` (empty: all)."""

    def __init__(
        self, cluster: Cluster, cache: Cache, streams: Streams, kinds: tuple[Kind, ...], namespaces: tuple[str, ...]
    ) -> None:
        self._cluster, self._cache, self._streams, self._kinds = cluster, cache, streams, kinds
        self._namespaces: tuple[str | None, ...] = namespaces or (None,)

    def _paths(self, kind: Kind) -> set[str]:
        """Of the watch streams that must be open."""
        return {resource_path(kind.api_version, kind.plural, namespace) for namespace in self._namespaces}

    async def delivered(self) -> None:
        """Returns once every stream is open and everything that then existed is in the cache."""
        paths = {path for kind in self._kinds for path in self._paths(kind)}
        await _until(lambda: paths <= self._streams.opened)
        for kind in self._kinds:
            listed = await self._listed(kind)
            await _until(lambda kind=kind, listed=listed: not self._unknown(kind, listed))  # type: ignore[misc]

    async def compare(self, patience: float) -> Differences:
        """Lists everything once, and says what the watches have not made good `patience` seconds later."""
        lives = dict(self._streams.lives)
        before = {kind: self._cache.versions(_CACHED[kind]) for kind in self._kinds}
        listed = {kind: await self._listed(kind) for kind in self._kinds}
        await asyncio.sleep(patience)
        lost = [gone for kind in self._kinds for gone in self._lost(kind, before[kind], listed[kind])]
        behind = {kind: len(self._unknown(kind, listed[kind], exact=True)) for kind in self._kinds}
        return Differences(tuple(lost), behind, self._reopened(lives))

    def _reopened(self, before: Mapping[str, int]) -> frozenset[Kind]:
        """`before`: the streams' lives at the beginning."""
        now = self._streams.lives
        lived = {path for path, opening in before.items() if now.get(path) == opening}
        return frozenset(kind for kind in self._kinds if not self._paths(kind) <= lived)

    def _lost(self, kind: Kind, before: dict[str, tuple[Key, str]], listed: dict[str, str]) -> list[Lost]:
        """What the cache had before the list, has still, and the cluster had no more."""
        now = self._cache.versions(_CACHED[kind])
        return [Lost(kind, key, uid) for uid, (key, _) in before.items() if uid not in listed and uid in now]

    def _unknown(self, kind: Kind, listed: dict[str, str], exact: bool = False) -> list[str]:
        cached = self._cache.versions(_CACHED[kind])
        missing = [uid for uid in listed if uid not in cached and not self._cache.was_deleted(uid)]
        older = [uid for uid in listed if exact and uid in cached and _older(cached[uid][1], listed[uid])]
        return missing + older

    async def _listed(self, kind: Kind) -> dict[str, str]:
        """uid -> resourceVersion. Pods without our job label are not ours, whatever manages them."""
        return {m["uid"]: m["resourceVersion"] async for m in self._metadata(kind) if kind is not POD or _has_job(m)}

    async def _metadata(self, kind: Kind) -> AsyncIterator[dict[str, Any]]:
        for namespace in self._namespaces:
            async for metadata in self._cluster.list_metadata(kind, namespace):
                yield metadata


async def _until(holds: Callable[[], bool]) -> None:
    # Polled, not signalled: this happens once, at the start, and kopf gives no signal for it.
    while not holds():  # noqa: ASYNC110
        await asyncio.sleep(_POLL)


def _has_job(metadata: dict[str, Any]) -> bool:
    labels = metadata.get("labels")
    return isinstance(labels, dict) and "posttrain.dev/job-name" in labels


def _older(cached: str, listed: str) -> bool:
    return cached.isdigit() and listed.isdigit() and int(cached) < int(listed)


async def compare_forever(lists: Lists, cache: Cache, queue: WorkQueue[Key], timing: Timing, told: Told) -> None:
    """Drops what is gone; Diverged where the cache stays behind in a kind. An API server that does not answer is no
    verdict."""
    doubt: Counter[Kind] = Counter()
    while True:
        await asyncio.sleep(timing.divergence)
        try:
            found = await lists.compare(timing.settle)
        except ApiError as error:
            log.warning("the cache was not compared: %s", error)
            continue
        _drop(found.lost, cache, queue)
        _tell(found, told)
        for kind, behind in found.behind.items():
            more = _REOPENED if kind in found.reopened else _OPEN
            doubt[kind] = doubt[kind] + more if behind else 0
        if dead := [f"{found.behind[kind]} of {kind.kind}" for kind, points in doubt.items() if points >= _DEAD]:
            raise Diverged(f"objects are newer in the cluster than in the cache: {', '.join(dead)}")


def _drop(lost: Iterable[Lost], cache: Cache, queue: WorkQueue[Key]) -> None:
    for kind, key, uid in lost:
        log.warning("%s of %s/%s is gone and no watch said so", kind.kind, *key)
        dependents = cache.dependents(key) if kind is JOB else frozenset()
        cache.drop_uid(_CACHED[kind], key, uid)
        for each in (key, *dependents):
            queue.add(each)


def _tell(found: Differences, told: Told) -> None:
    for kind, behind in found.behind.items():
        told(kind.kind, "behind", behind)
        told(kind.kind, "lost", sum(1 for lost in found.lost if lost.kind is kind))


async def resync_forever(cache: Cache, queue: WorkQueue[Key], timing: Timing) -> None:
    """Looks at every job that is not finished once in each period, spread over it."""
    while True:
        keys = list(active_jobs(cache))
        for number, key in enumerate(keys):
            queue.add_after(key, timing.resync * (number + 1) / (len(keys) + 1))
        await asyncio.sleep(timing.resync)


def active_jobs(cache: Cache) -> Iterable[Key]:
    """The jobs that are not finished; a finished one that waits for its TTL has its own timer."""
    return (key for key, record in list(cache.jobs.items()) if not JobFacts.of(record).terminal)


async def discover_forever(
    cluster: Cluster, timing: Timing, had: frozenset[Kind], missed: Callable[[], frozenset[str]]
) -> None:
    """BackendsChanged when a kind of child comes or goes; often while one that jobs wait for is missing, seldom
    otherwise. `missed`: the names of the kinds that jobs wait for."""
    rested = 0.0
    while True:
        await asyncio.sleep(timing.discovery_missing)
        rested += timing.discovery_missing
        if rested < timing.discovery and not missed():
            continue
        rested = 0.0
        try:
            has = await present(cluster)
        except ApiError as error:
            log.warning("the cluster's kinds were not read: %s", error)
            continue
        if has != had:
            raise BackendsChanged(f"{_change(has, had)}: starting anew")


async def present(cluster: Cluster) -> frozenset[Kind]:
    """The kinds of child that the API server serves."""
    served = await asyncio.gather(*(cluster.has_kind(kind) for kind in CHILDREN))
    return frozenset(kind for kind, there in zip(CHILDREN, served, strict=True) if there)


def _change(has: frozenset[Kind], had: frozenset[Kind]) -> str:
    came = [f"{kind.kind} is served now" for kind in has - had]
    return ", ".join(sorted([*came, *(f"{kind.kind} is no longer served" for kind in had - has)]))
