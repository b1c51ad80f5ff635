"""Carries out what `reconcile` wants: creations, patches, deletions, then the status, then events.

Called by the worker; the answers go into the cache at once, so that the next pass does not wait for the watch. A name
that is taken and a refusal are findings for the next pass, not errors.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from posttrain_api import names
from posttrain_operator.actions import Actions, Create, Delete, Object, Patch
from posttrain_operator.backends import backend
from posttrain_operator.backends.configmaps import CA_FILE
from posttrain_operator.cache import Cache
from posttrain_operator.cluster import Cluster, Deletion
from posttrain_operator.cluster.errors import AlreadyExists, Conflict, Forbidden, Invalid, WebhookFailed
from posttrain_operator.cluster.kinds import CHILDREN, CLAIM, CONFIG_MAP, JOB, POD, TRAINING_RUNTIME, Kind
from posttrain_operator.facts import Found, Refusal
from posttrain_operator.findings import Findings, Published
from posttrain_operator.recorder import Recorder
from posttrain_operator.records import JobRecord, Key
from posttrain_operator.slim import child_record, controller_uid, job_record

log = logging.getLogger(__name__)
_KINDS: Mapping[Object, Kind] = {
    Object(kind.kind): kind for kind in (*CHILDREN, TRAINING_RUNTIME, POD, CONFIG_MAP, CLAIM)
}
_OBJECT_MANAGER = "posttrain-operator"
_REFUSED = (Forbidden, Invalid, WebhookFailed)
_UNSEEN = (0.05, 0.1, 0.25, 0.5)
"""Seconds between two tries to make a child whose controller does not know yet what it needs."""


class Executor:
    """Writes; decides nothing."""

    def __init__(self, cluster: Cluster, cache: Cache, findings: Findings, recorder: Recorder) -> None:
        self._cluster, self._cache, self._findings, self._recorder = cluster, cache, findings, recorder

    async def execute(self, job: JobRecord, actions: Actions) -> bool:
        """Everything in its order. False: something was in the way and is now a finding; look again at once."""
        if not await self._create_all(job, actions):
            return False
        for patch in actions.patch:
            await self._patch(job.key, patch)
        await self._delete_all(job.key, actions.delete)
        if actions.status is not None:
            job = await self._write_status(job, actions.status)
        if actions.attempt_uids is not None:
            self._cache.status_took_ends(job.key, actions.attempt_uids)
        for event in actions.events:
            self._recorder.record(job, event)
        return True

    async def look_again(self, key: Key) -> None:
        """Takes the job and its child as the API server has them now: what the watch told of them is in doubt.

        What is taken for deleted never comes back, so an answer that the whole kind is not there does not count.
        """
        job, *_ = await asyncio.gather(self._cluster.get(JOB, *key), *(self._child_again(k, key) for k in CHILDREN))
        known_job = self._cache.jobs.get(key)
        if job is not None:
            self._cache.put_job(job_record(job))
        elif known_job is not None and await self._cluster.has_kind(JOB):
            self._cache.drop_job(key, known_job.uid)

    async def _child_again(self, kind: Kind, key: Key) -> None:
        known = next((child for child in self._cache.children(key) if child.kind == kind.kind), None)
        found = await self._cluster.get(kind, *key)
        if found is not None:
            self._cache.put_child(child_record(found))
        elif known is not None and await self._cluster.has_kind(kind):
            self._cache.drop_child(key, known.uid)

    async def _create_all(self, job: JobRecord, actions: Actions) -> bool:
        """What pods mount first, all at once; then the child."""
        first = [create for create in actions.create if not create.kind.is_child]
        last = [create for create in actions.create if create.kind.is_child]
        made = await asyncio.gather(*(self._create(job, create) for create in first))
        return all(made) and all([await self._create(job, create) for create in last])

    async def _create(self, job: JobRecord, create: Create) -> bool:
        if create.upsert:
            await self._publish(job, create)
            return True
        try:
            made = await self._post(job.key.namespace, create)
        except AlreadyExists:
            return await self._note_taken(job, create)
        except _REFUSED as error:
            self._findings.refusal.put(job.key, Refusal(error.status, error.message, create.kind))
            return False
        self._note_made(job.key, create, made)
        return True

    async def _post(self, namespace: str, create: Create) -> dict[str, Any]:
        """POST; once more and again where the child's controller has not seen yet what was made for it just now."""
        for pause in _UNSEEN if create.kind.is_child else ():
            try:
                return await self._cluster.create(_KINDS[create.kind], namespace, create.body)
            except (Forbidden, Invalid) as error:
                if not backend(create.kind).unseen(error.message):
                    raise
                await asyncio.sleep(pause)
        return await self._cluster.create(_KINDS[create.kind], namespace, create.body)

    async def _publish(self, job: JobRecord, create: Create) -> None:
        """The CA bundle. Where it is refused the pods report to nobody, which disturbs no training."""
        try:
            await self._upsert(job, create)
        except (*_REFUSED, AlreadyExists) as error:
            log.warning("%s/%s: the CA bundle was refused, its pods cannot report: %s", *job.key, error)
        else:
            self._findings.published[job.key] = Published(job.uid, create.body["data"][CA_FILE])

    async def _upsert(self, job: JobRecord, create: Create) -> None:
        """Makes it, or changes the one that is this job's already. AlreadyExists where the name is somebody else's."""
        kind, namespace = _KINDS[create.kind], job.key.namespace
        try:
            await self._cluster.create(kind, namespace, create.body)
        except AlreadyExists:
            taken = await self._cluster.get(kind, namespace, create.name)
            if taken and controller_uid(taken["metadata"]) != job.uid:
                raise
            await self._cluster.apply(kind, namespace, create.body, _OBJECT_MANAGER)

    def _note_made(self, key: Key, create: Create, made: Mapping[str, Any]) -> None:
        if create.kind.is_child:
            log.info("%s/%s: %s created", key.namespace, key.name, create.kind)
            self._findings.obstacle.drop(key)
            self._cache.put_child(child_record(made))
        elif create.kind is Object.CONFIG_MAP:
            self._findings.config.put(key, found_of(made))

    async def _note_taken(self, job: JobRecord, create: Create) -> bool:
        """The name is taken: by our own object of an earlier try, or by somebody else's."""
        taken = await self._cluster.get(_KINDS[create.kind], job.key.namespace, create.name)
        if taken is None or create.kind is Object.CLAIM:  # the next pass looks whose it is
            return False
        found = found_of(taken)
        if create.kind is Object.CONFIG_MAP:
            self._findings.config.put(job.key, found)
            wanted = create.body["metadata"]["annotations"][names.ANNOTATION_SPEC_HASH]
            return found.owner_uid == job.uid and found.spec_hash == wanted
        hidden = create.kind.is_child and self._cache.was_deleted(found.uid)
        if found.owner_uid == job.uid and not hidden:
            if create.kind.is_child:
                self._cache.put_child(child_record(taken))
            return True
        if hidden:  # the watch, which selects by label, has lost it from sight though it has not ended
            found = replace(found, owner_uid=None, what=f"{found.what} whose labels somebody has changed")
        self._findings.obstacle.put(job.key, found)
        return False

    async def _patch(self, key: Key, patch: Patch) -> None:
        patched = await self._cluster.merge_patch(_KINDS[patch.kind], key.namespace, patch.name, patch.body)
        self._cache.put_child(child_record(patched))

    async def _delete_all(self, key: Key, deletions: Sequence[Delete]) -> None:
        """The child last: while it is there, a process that dies in between finds what is left to be deleted. What is
        refused is raised behind it: a policy that keeps a ConfigMap must not keep pods running."""
        first = (self._delete(key, each) for each in deletions if not each.kind.is_child)
        problems = [each for each in await asyncio.gather(*first, return_exceptions=True) if each is not None]
        for problem in problems:
            if not isinstance(problem, _REFUSED):
                raise problem
        await asyncio.gather(*(self._delete(key, each) for each in deletions if each.kind.is_child))
        for problem in problems:
            raise problem

    async def _delete(self, key: Key, deletion: Delete) -> None:
        uid = deletion.uid or await self._own(key, deletion)
        try:
            if uid is not None:
                how = Deletion(uid, deletion.grace_seconds)
                await self._cluster.delete(_KINDS[deletion.kind], key.namespace, deletion.name, how)
        except Conflict:
            # Another object of the name: the one that was meant is gone.
            log.debug("%s/%s: %s %s has another uid", *key, deletion.kind, deletion.name)
        if deletion.kind is Object.CONFIG_MAP:
            self._findings.config.drop(key)

    async def _own(self, key: Key, deletion: Delete) -> str | None:
        """The uid of what has this name, if it is the job's: somebody else's object of the name is left alone."""
        found = await self._cluster.get(_KINDS[deletion.kind], key.namespace, deletion.name)
        job = self._cache.jobs.get(key)
        if found is None or job is None or controller_uid(found["metadata"]) != job.uid:
            return None
        return str(found["metadata"]["uid"])

    async def _write_status(self, job: JobRecord, status: Mapping[str, Any]) -> JobRecord:
        namespace, name = job.key
        written = await self._cluster.apply_status(namespace, name, status, names.STATUS_MANAGER, job.resource_version)
        record = job_record(written)
        self._cache.put_job(record)
        return record


def found_of(obj: Mapping[str, Any]) -> Found:
    """An object that was in the way, or that was just made."""
    metadata = obj["metadata"]
    spec_hash = (metadata.get("annotations") or {}).get(names.ANNOTATION_SPEC_HASH, "")
    what = f"{obj.get('kind', 'object')} named {metadata['name']}"
    return Found(metadata["uid"], controller_uid(metadata), spec_hash, "deletionTimestamp" in metadata, what)
