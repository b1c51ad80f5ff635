"""Why pods do not start, read from pods, from Events and from the API server's answers. Pure.

A stall is never the end: the job is looked at again, and the condition is cleared as soon as nothing is found here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime

from posttrain_api.reasons import Reason
from posttrain_operator import clock
from posttrain_operator.backends import backend
from posttrain_operator.backends.owned import config_name
from posttrain_operator.facts import JobFacts, Missing, Observation
from posttrain_operator.reconcile import claims
from posttrain_operator.reconcile.attempt import AttemptView
from posttrain_operator.records import PodRecord

_IMAGE = frozenset({"ImagePullBackOff", "ErrImagePull", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable"})
_NOT_FOUND = re.compile(r'(secret|configmap|persistentvolumeclaim)s? "([^"]+)" not found', re.IGNORECASE)
_BY_OBJECT = {
    "secret": (Reason.SECRET_NOT_FOUND, "Secret"),
    "configmap": (Reason.CONFIG_MAP_NOT_FOUND, "ConfigMap"),
    "persistentvolumeclaim": (Reason.STORAGE_NOT_FOUND, "PersistentVolumeClaim"),
}


def find(job: JobFacts, seen: Observation, view: AttemptView, now: datetime) -> Missing | None:
    """The first reason found, in order: images, missing objects, placement, pods that cannot be made."""
    live = view.live
    return (
        _first(_waiting(job, pod, seen.backend) for pod in live)
        or _first(_mount(pod, seen) for pod in live)
        or _first(_unplaced(pod, seen, now) for pod in live)
        or unmade(job, seen, view)
    )


def _first(found: Iterable[Missing | None]) -> Missing | None:
    return next((missing for missing in found if missing), None)


def _waiting(job: JobFacts, pod: PodRecord, kind: str) -> Missing | None:
    if pod.waiting is None or pod.ended:
        return None
    if pod.waiting.reason in _IMAGE:
        return _steady(
            job, Missing(Reason.IMAGE_PULL_FAILED, f"pod {pod.name}: {pod.waiting.message or pod.waiting.reason}")
        )
    config = pod.waiting.reason == "CreateContainerConfigError"
    return not_found(pod.waiting.message, job.key.name, kind) if config else None


def _steady(job: JobFacts, missing: Missing) -> Missing:
    """Keeps the first message of a stall whose wording swings between an error and its back-off."""
    last = job.condition("Stalled")
    same = last.get("status") == "True" and last.get("reason") == missing.reason
    return Missing(missing.reason, last["message"]) if same and last.get("message") else missing


def not_found(message: str, job: str, kind: str) -> Missing | None:
    """A Secret, ConfigMap or claim that a message of Kubernetes says is not there. `job`: the job's name, `kind`: its
    child's kind."""
    found = _NOT_FOUND.search(message)
    if not found:
        return None
    reason, thing = _BY_OBJECT[found[1].lower()]
    advice = "create it, the pods then start by themselves"
    if (thing, found[2]) == ("ConfigMap", config_name(job)):
        advice = f"it is the job's own: kubectl delete {kind.lower()} {job}, both are then made again"
    return Missing(reason, f"{thing} {found[2]} does not exist in the job's namespace; {advice}")


def _mount(pod: PodRecord, seen: Observation) -> Missing | None:
    """Its Events live for an hour, so they count only until the pod says that its volumes are mounted."""
    if pod.phase != "Pending" or pod.mounted:
        return None
    failed = (note for note in seen.notes if note.about == pod.uid and note.reason == "FailedMount")
    return _first(not_found(note.message, pod.job.name, seen.backend) for note in failed)


def _unplaced(pod: PodRecord, seen: Observation, now: datetime) -> Missing | None:
    if pod.unschedulable is None or pod.ended:
        return None
    missing = not_found(pod.unschedulable, pod.job.name, seen.backend)
    if missing:
        return missing
    if seen.unbound and claims.waited_for(pod):
        return seen.unbound[0]
    patient = (clock.seconds_since(pod.created, now) or 0) >= seen.timing.mount
    return Missing(Reason.UNSCHEDULABLE, f"pod {pod.name}: {pod.unschedulable}") if patient else None


def unmade(job: JobFacts, seen: Observation, view: AttemptView) -> Missing | None:
    """Pods are missing and the child's own Events say why; older ones than the last time all ran, or than a pod's last
    end, do not count."""
    if seen.child is None or len(view.live) >= view.size:
        return None
    its = backend(seen.child.kind)
    moments = [job.condition("Running").get("lastTransitionTime"), *(p.end.finished_at for p in seen.pods if p.end)]
    since = max((moment for each in moments if (moment := clock.parse(each))), default=None)
    notes = [n for n in seen.notes if n.about == seen.child.uid and its.unmade(n.reason)]
    recent = [n for n in notes if since is None or (clock.parse(n.time) or since) >= since]
    if not recent:
        return None
    latest = max(recent, key=lambda note: note.time or "")
    return Missing(refusal_reason(latest.message), latest.message)


def refusal_reason(message: str) -> Reason:
    """Which reason the API server's refusal of a pod or child is."""
    if "exceeded quota" in message or "must specify limits" in message:
        return Reason.QUOTA_EXCEEDED
    return Reason.POD_SECURITY_DENIED if "PodSecurity" in message else Reason.UNSCHEDULABLE
