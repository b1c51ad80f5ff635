"""Makes the observation that `reconcile` decides on: from the cache, and from the few look-ups that it asks for.

Called by the worker. On a healthy job's way there is one look-up: its claims, before it starts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from posttrain_api.reasons import Reason
from posttrain_operator.backends.configmaps import CA_FILE
from posttrain_operator.backends.owned import status_ca_name
from posttrain_operator.backends.pod import StatusEndpoint
from posttrain_operator.cache import Cache
from posttrain_operator.cluster import Cluster
from posttrain_operator.cluster.kinds import CLAIM, CONFIG_MAP, NODE, Kind
from posttrain_operator.facts import Intent, JobFacts, Missing, Note, Observation, StatusServer
from posttrain_operator.findings import Findings, Published
from posttrain_operator.reconcile import lookups
from posttrain_operator.reconcile.intent import Family, Relative, understand
from posttrain_operator.records import JobRecord, Key
from posttrain_operator.settings import Settings
from posttrain_operator.slim import pod_record

_ADVICE = "create it, or name another; the job then starts by itself"


class Observer:
    """Reads; `bundle` gives the status server's present CA bundle, None while there is no status server."""

    def __init__(
        self, cluster: Cluster, cache: Cache, findings: Findings, settings: Settings, bundle: Callable[[], str | None]
    ) -> None:
        self._cluster, self._cache, self._findings, self._settings = cluster, cache, findings, settings
        self._bundle = bundle
        self.backend_available = True

    async def observe(self, record: JobRecord, job: JobFacts, now: datetime) -> Observation:
        """Everything about the job as of now. ApiError where a look-up is refused."""
        child = self._cache.children.get(record.key)
        intent = self._intent(record) if lookups.needs_plan(job, child is not None) else Intent()
        seen = self._from_memory(record, intent)
        first = lookups.before_start(job, intent, child is not None)
        later = lookups.while_running(job, seen, now)
        if later.pods:
            await self._look_at_pods(record.key)
            seen = self._from_memory(record, intent)
        missing, notes, lost, server = await asyncio.gather(
            self._missing(record.key.namespace, first),
            self._notes(record.key.namespace, later.events),
            self._lost(later.nodes),
            self._status_server(job, has_child=child is not None),
        )
        return replace(seen, missing=missing, notes=notes, lost_nodes=lost, status_server=server)

    def _from_memory(self, record: JobRecord, intent: Intent) -> Observation:
        key = record.key
        pods = self._cache.pods(key)
        return Observation(
            intent=intent,
            timing=self._settings.timing,
            child=self._cache.children.get(key),
            pods=tuple(pod for pod in pods if pod.job_uid == record.uid),
            foreign_pods=any(pod.job_uid != record.uid and not pod.gone for pod in pods),
            backend_available=self.backend_available,
            config=self._findings.config.get(key),
            obstacle=self._findings.obstacle.get(key),
            refusal=self._findings.refusal.get(key),
        )

    async def _look_at_pods(self, key: Key) -> None:
        """What the watch has not told: the cache takes what is newer."""
        for found in await self._cluster.pods_of(*key):
            pod = pod_record(found)
            if pod is not None:
                self._cache.put_pod(pod)

    def _intent(self, record: JobRecord) -> Intent:
        return understand(record.manifest(), self._family(record), self._settings.plan)

    def _family(self, record: JobRecord) -> Family:
        """The job's parents, and theirs as long as they are not finished."""
        family: dict[str, Relative] = {}
        waiting = list(record.parents)
        while waiting:
            name = waiting.pop()
            found = self._cache.jobs.get(Key(record.key.namespace, name))
            if name in family or found is None:
                continue
            family[name] = relative_of(found)
            waiting.extend(() if family[name].outcome else found.parents)
        return family

    def forget(self, key: Key) -> None:
        """The job is gone."""
        self._findings.forget(key)

    async def _missing(self, namespace: str, wanted: lookups.Lookups) -> tuple[Missing, ...]:
        claims = [self._absent(CLAIM, namespace, name, Reason.STORAGE_NOT_FOUND) for name in wanted.claims]
        maps = [self._absent(CONFIG_MAP, namespace, name, Reason.CONFIG_MAP_NOT_FOUND) for name in wanted.config_maps]
        return tuple(missing for missing in await asyncio.gather(*claims, *maps) if missing)

    async def _absent(self, kind: Kind, namespace: str, name: str, reason: Reason) -> Missing | None:
        key = (kind.kind, namespace, name)
        if self._findings.exists.get(key):
            return None
        if await self._cluster.get(kind, namespace, name) is None:
            return Missing(reason, f"{kind.kind} {name} does not exist in namespace {namespace}; {_ADVICE}")
        self._findings.exists.put(key, True)
        return None

    async def _notes(self, namespace: str, uids: Iterable[str]) -> tuple[Note, ...]:
        found = await asyncio.gather(*(self._cluster.events_of(namespace, uid) for uid in uids))
        return tuple(note_of(event) for events in found for event in events if event.get("type") == "Warning")

    async def _lost(self, nodes: Iterable[str]) -> frozenset[str]:
        names = list(nodes)
        found = await asyncio.gather(*(self._cluster.get(NODE, None, name) for name in names))
        return frozenset(name for name, node in zip(names, found, strict=True) if node is None or not _is_ready(node))

    async def _status_server(self, job: JobFacts, has_child: bool) -> StatusServer | None:
        if not self._settings.status_url:
            return None
        bundle, endpoint = self._bundle(), StatusEndpoint(self._settings.status_url)
        if job.terminal or bundle is None:
            return StatusServer(endpoint, bundle, bundle)
        return StatusServer(endpoint, bundle, await self._published(job, has_child))

    async def _published(self, job: JobFacts, has_child: bool) -> str | None:
        """The bundle in the job's ConfigMap: looked up once for a job that runs already, then remembered."""
        known = self._findings.published.get(job.key)
        if known and known.uid == job.uid:
            return known.bundle
        if not has_child:
            return None
        found = await self._cluster.get(CONFIG_MAP, job.key.namespace, status_ca_name(job.key.name))
        bundle = ((found or {}).get("data") or {}).get(CA_FILE)
        self._findings.published[job.key] = Published(job.uid, bundle)
        return bundle


def relative_of(record: JobRecord) -> Relative:
    """What another job needs to know of this one."""
    manifest = record.manifest()
    status: Mapping[str, Any] = manifest["status"]
    held = {c["type"]: c for c in status.get("conditions") or () if c.get("status") == "True"}
    return Relative(
        name=record.key.name,
        uid=record.uid,
        stage=str(manifest["spec"].get("stage", "")),
        outcome="Succeeded" if "Complete" in held else "Failed" if "Failed" in held else "",
        reason=str(status.get("reason", "")),
        parents=record.parents,
        output=status.get("output"),
        lineage=tuple(status.get("lineage") or ()),
        checkpoint=(status.get("checkpoints") or {}).get("last"),
        best=(status.get("checkpoints") or {}).get("best"),
        resolved=status.get("resolved") or {},
    )


def note_of(event: Mapping[str, Any]) -> Note:
    """A core Event; its time is when it was last seen."""
    series = event.get("series") or {}
    times = (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"))
    created = (event.get("metadata") or {}).get("creationTimestamp")
    about = (event.get("involvedObject") or {}).get("uid", "")
    time = next((moment for moment in times if moment), created)
    return Note(about, event.get("reason", ""), event.get("message", ""), time)


def _is_ready(node: Mapping[str, Any]) -> bool:
    conditions = (node.get("status") or {}).get("conditions") or ()
    return any(c.get("type") == "Ready" and c.get("status") == "True" for c in conditions)
