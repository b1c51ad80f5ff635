"""What the watches have told, in memory: jobs, their children, their pods and the last end state of pods that are gone.

Filled by `watch` (and by the answers to our own writes), read by the observer and, through `view`, by the status
server. A failed pod is deleted within milliseconds, so its end is kept here until the status has taken it. Nothing
here awaits.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

from posttrain_operator.records import ChildRecord, JobRecord, Key, PodRecord

_TOMBSTONES = 8192
_MAX_GONE_PER_JOB = 4096


class Cache:
    """Latest records; an older resourceVersion never replaces a newer one, and a deleted uid never comes back."""

    def __init__(self) -> None:
        self.jobs: dict[Key, JobRecord] = {}
        self._children: defaultdict[Key, dict[str, ChildRecord]] = defaultdict(dict)
        self._pods: defaultdict[Key, dict[str, PodRecord]] = defaultdict(dict)
        self._dependents: defaultdict[Key, set[Key]] = defaultdict(set)
        self._deleted: OrderedDict[str, None] = OrderedDict()

    def put_job(self, job: JobRecord) -> None:
        old = self.jobs.get(job.key)
        if job.uid in self._deleted or (old and not _newer(job, old)):
            return
        if old:
            self._unlink(old)
        self.jobs[job.key] = job
        for parent in job.parents:
            self._dependents[Key(job.key.namespace, parent)].add(job.key)

    def drop_job(self, key: Key, uid: str) -> None:
        self._bury(uid)
        job = self.jobs.get(key)
        if job is None or job.uid != uid:
            return
        self._unlink(job)
        del self.jobs[key]
        self._forget_gone(key, frozenset())

    def put_child(self, child: ChildRecord) -> None:
        if child.uid in self._deleted:
            return
        old = self._children[child.key].get(child.kind)
        if not (old and not _newer(child, old)):
            self._children[child.key][child.kind] = child

    def drop_child(self, key: Key, uid: str) -> None:
        self._bury(uid)
        left = {kind: child for kind, child in self._children.get(key, {}).items() if child.uid != uid}
        if left:
            self._children[key] = left
        else:
            self._children.pop(key, None)

    def child(self, key: Key, owner: str | None, kind: str) -> ChildRecord | None:
        """The child that job `owner` has; without one, whatever has its name and the kind that it wants.

        After a change of backend the child of an earlier job of this name may still be going.
        """
        of_name = self._children.get(key, {})
        own = (child for child in of_name.values() if owner is not None and child.owner_uid == owner)
        return next(own, of_name.get(kind))

    def children(self, key: Key) -> tuple[ChildRecord, ...]:
        """Children of this name, whoever owns them: one of a kind at most."""
        return tuple(self._children.get(key, {}).values())

    def put_pod(self, pod: PodRecord) -> None:
        old = self._pods[pod.job].get(pod.uid)
        if pod.uid not in self._deleted and not (old and not _newer(pod, old)):
            self._pods[pod.job][pod.uid] = _remembering(pod, old)

    def drop_pod(self, pod: PodRecord) -> None:
        """The pod is gone; `pod` is what was last seen of it and is kept."""
        self._bury(pod.uid)
        if pod.job in self.jobs:
            self._pods[pod.job][pod.uid] = _remembering(pod, self._pods[pod.job].get(pod.uid)).as_gone()
        else:
            self._pods[pod.job].pop(pod.uid, None)
            self._tidy(pod.job)

    def pods(self, key: Key) -> tuple[PodRecord, ...]:
        """Live pods of the job's child and their remembered ends, in order of name and uid."""
        owned = (pod for pod in self._pods.get(key, {}).values() if pod.owned)
        return tuple(sorted(owned, key=lambda pod: (pod.name, pod.uid)))

    def all_pods(self) -> Iterable[PodRecord]:
        """Every live pod."""
        return [pod for pods in self._pods.values() for pod in pods.values() if not pod.gone]

    def dependents(self, key: Key) -> frozenset[Key]:
        """The jobs whose `fromJob` names this one."""
        return frozenset(self._dependents.get(key, ()))

    def status_took_ends(self, key: Key, attempt_uids: Iterable[str]) -> None:
        """The job's status is written: of pods that are gone, only the recorded attempt's are still needed."""
        self._forget_gone(key, frozenset(attempt_uids))

    def versions(self, kind: str) -> dict[str, tuple[Key, str]]:
        """Of every live object of a kind (jobs, pods, or a kind of child): uid -> (its job, resourceVersion)."""
        if kind == "pods":
            return {pod.uid: (pod.job, pod.resource_version) for pod in self.all_pods()}
        if kind == "jobs":
            return {job.uid: (key, job.resource_version) for key, job in self.jobs.items()}
        return {child.uid: (child.key, child.resource_version) for child in self._all_children() if child.kind == kind}

    def _all_children(self) -> Iterable[ChildRecord]:
        return [child for of_name in self._children.values() for child in of_name.values()]

    def was_deleted(self, uid: str) -> bool:
        """Whether the object was seen to go, not long ago."""
        return uid in self._deleted

    def drop_uid(self, kind: str, key: Key, uid: str) -> None:
        """An object whose deletion was never told is dropped."""
        if kind == "jobs":
            self.drop_job(key, uid)
        elif kind != "pods":
            self.drop_child(key, uid)
        elif pod := self._pods.get(key, {}).get(uid):
            self.drop_pod(pod)

    def counts(self) -> Mapping[str, int]:
        return {"jobs": len(self.jobs), "children": len(list(self._all_children())), "pods": len(list(self.all_pods()))}

    def _forget_gone(self, key: Key, keep: frozenset[str]) -> None:
        pods = self._pods.get(key, {})
        gone = [uid for uid, pod in pods.items() if pod.gone and uid not in keep]
        kept = [uid for uid, pod in pods.items() if pod.gone and uid in keep]
        for uid in [*gone, *kept[_MAX_GONE_PER_JOB:]]:
            del pods[uid]
        self._tidy(key)

    def _tidy(self, key: Key) -> None:
        if not self._pods.get(key):
            self._pods.pop(key, None)

    def _unlink(self, job: JobRecord) -> None:
        for parent in job.parents:
            key = Key(job.key.namespace, parent)
            self._dependents[key].discard(job.key)
            if not self._dependents[key]:
                del self._dependents[key]

    def _bury(self, uid: str) -> None:
        self._deleted[uid] = None
        while len(self._deleted) > _TOMBSTONES:
            self._deleted.popitem(last=False)


def _remembering(pod: PodRecord, old: PodRecord | None) -> PodRecord:
    """The kubelet's last deletion has no grace any more: that somebody asked, and when, is known from before."""
    return replace(pod, asked=True, asked_at=old.asked_at) if old and old.asked else pod


def _newer(new: JobRecord | ChildRecord | PodRecord, old: JobRecord | ChildRecord | PodRecord) -> bool:
    """Whether `new` may replace `old`: another object of the name, or a later version of the same."""
    if new.uid != old.uid:
        return True
    return _version(new.resource_version) >= _version(old.resource_version)


def _version(text: str) -> int:
    return int(text) if text.isdigit() else 0
