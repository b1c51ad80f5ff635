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
from posttrain_operator import claimlook
from posttrain_operator.backends import BACKENDS, backend
from posttrain_operator.backends.configmaps import CA_FILE, PARENTS_FILE
from posttrain_operator.backends.owned import config_name, status_ca_name
from posttrain_operator.backends.pod import StatusEndpoint
from posttrain_operator.cache import Cache
from posttrain_operator.cluster import Cluster
from posttrain_operator.cluster.kinds import CLAIM, CONFIG_MAP, NODE, Kind
from posttrain_operator.facts import Intent, JobFacts, Missing, Note, Observation, StatusServer
from posttrain_operator.findings import Findings, Published, Understood
from posttrain_operator.reconcile import lookups
from posttrain_operator.reconcile.intent import understand
from posttrain_operator.reconcile.relatives import Family, Relative, read
from posttrain_operator.records import ChildRecord, JobRecord, Key
from posttrain_operator.settings import Settings
from posttrain_operator.slim import controller_uid, pod_record

_ADVICE = "create it, or name another; the job then starts by itself"


class Observer:
    """Reads; `bundle` gives the status server's present CA bundle, None while there is no status server."""

    def __init__(
        self, cluster: Cluster, cache: Cache, findings: Findings, settings: Settings, bundle: Callable[[], str | None]
    ) -> None:
        self._cluster, self._cache, self._findings, self._settings = cluster, cache, findings, settings
        self._bundle = bundle
        self.available: frozenset[str] = frozenset(BACKENDS)
        """Kinds of child that the cluster has."""
        self._missed: set[str] = set()

    def missed(self) -> frozenset[str]:
        """Kinds that jobs have asked for and the cluster has not."""
        return frozenset(self._missed)

    async def observe(self, record: JobRecord, job: JobFacts, now: datetime) -> Observation:
        """Everything about the job as of now. ApiError where a look-up is refused."""
        recorded = (job.status.get("backend") or {}).get("kind")
        child = self._cache.child(record.key, record.uid, recorded or self._settings.plan.backend)
        intent = await self._intent(record, job) if lookups.needs_plan(job, child is not None) else Intent()
        kind = backend(recorded or intent.backend).KIND
        self._missed |= {kind} - self.available
        seen = self._from_memory(record, intent, kind)
        first = lookups.before_start(job, intent, child is not None)
        later = lookups.while_running(job, seen, now)
        if later.pods:
            await self._look_at_pods(record.key)
            seen = self._from_memory(record, intent, kind)
        namespace = record.key.namespace
        missing, claim, unbound, notes, unready, server = await asyncio.gather(
            self._missing(namespace, first),
            claimlook.claim_of(self._cluster, namespace, first.own_claim),
            claimlook.unbound(self._cluster, namespace, later.unbound),
            self._notes(namespace, later.events, child),
            self._unready(later.nodes),
            self._status_server(job, has_child=child is not None),
        )
        seen = replace(seen, claim=claim, unbound=unbound)
        return replace(seen, missing=missing, notes=notes, unready_nodes=unready, status_server=server)

    def _from_memory(self, record: JobRecord, intent: Intent, kind: str) -> Observation:
        key = record.key
        pods = self._cache.pods(key)
        return Observation(
            intent=intent,
            timing=self._settings.timing,
            backend=kind,
            child=self._cache.child(key, record.uid, kind),
            pods=tuple(pod for pod in pods if pod.job_uid == record.uid),
            foreign_pods=any(pod.job_uid != record.uid and not pod.gone for pod in pods),
            backend_available=kind in self.available,
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

    async def _intent(self, record: JobRecord, job: JobFacts) -> Intent:
        """A job that has started is planned once more from what it was started with: its parents may be gone."""
        known = await self._remembered(record) if job.has_started and record.parents else {}
        return self._understood(record, {**self._family(record), **known})

    def _understood(self, record: JobRecord, family: Family) -> Intent:
        """Once for the passes that make a child and that write its first status: some 7 % of a start's CPU."""
        last = self._findings.understood.get(record.key)
        if last and (last.uid, last.generation, last.family) == (record.uid, record.generation, family):
            return last.intent
        intent = understand(record.manifest(), family, self._settings.plan)
        self._findings.understood.put(record.key, Understood(record.uid, record.generation, family, intent))
        return intent

    async def _remembered(self, record: JobRecord) -> Family:
        found = await self._cluster.get(CONFIG_MAP, record.key.namespace, config_name(record.key.name)) or {}
        ours = controller_uid(found.get("metadata") or {}) == record.uid
        return read((found.get("data") or {}).get(PARENTS_FILE, "")) if ours else {}

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

    async def _notes(self, namespace: str, uids: Iterable[str], child: ChildRecord | None) -> tuple[Note, ...]:
        """Warnings about pods and about the child; what is told of objects below the child counts as told of it."""
        asked = [(uid, selector) for uid in uids for selector in _told_by(uid, child)]
        found = await asyncio.gather(*(self._cluster.events_about(namespace, selector) for _, selector in asked))
        told = ((uid, event) for (uid, _), events in zip(asked, found, strict=True) for event in events)
        return tuple(replace(note_of(event), about=uid) for uid, event in told if event.get("type") == "Warning")

    async def _unready(self, nodes: Iterable[str]) -> Mapping[str, str | None]:
        names = list(nodes)
        found = await asyncio.gather(*(self._cluster.get(NODE, None, name) for name in names))
        looked = ((name, unready_since(node)) for name, node in zip(names, found, strict=True))
        return {name: since for name, (unready, since) in looked if unready}

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


def _told_by(uid: str, child: ChildRecord | None) -> tuple[str, ...]:
    """Selectors of the Events about the child or a pod of this uid."""
    if child is not None and child.uid == uid:
        return backend(child.kind).told_by(child)
    return (f"involvedObject.uid={uid}",)


def note_of(event: Mapping[str, Any]) -> Note:
    """A core Event; its time is when it was last seen."""
    series = event.get("series") or {}
    times = (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"))
    created = (event.get("metadata") or {}).get("creationTimestamp")
    about = (event.get("involvedObject") or {}).get("uid", "")
    time = next((moment for moment in times if moment), created)
    return Note(about, event.get("reason", ""), event.get("message", ""), time)


def unready_since(node: Mapping[str, Any] | None) -> tuple[bool, str | None]:
    """Whether a node does not answer, and since when; no moment for one that is gone."""
    if node is None:
        return True, None
    metadata, conditions = node.get("metadata") or {}, (node.get("status") or {}).get("conditions") or ()
    ready: Mapping[str, Any] = next((c for c in conditions if c.get("type") == "Ready"), {})
    return ready.get("status") != "True", ready.get("lastTransitionTime") or metadata.get("creationTimestamp")
