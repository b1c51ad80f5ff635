"""A whole attempt: are its pods there, do they run, has the loop started, and what keeps them from it. Pure."""

from __future__ import annotations

from datetime import datetime

from posttrain_api.reasons import Reason
from posttrain_operator import clock
from posttrain_operator.facts import JobFacts, Observation
from posttrain_operator.reconcile import stalls
from posttrain_operator.reconcile.attempt import AttemptView
from posttrain_operator.reconcile.restarts import extended
from posttrain_operator.records import PodRecord
from posttrain_operator.status.health import health
from posttrain_operator.status.verdict import Verdict, running, stalled, starting

_BEFORE_THE_LOOP = frozenset({"Preparing", "Waiting", "Loading"})


def following(job: JobFacts, seen: Observation, view: AttemptView, now: datetime) -> Verdict:
    """Stalled, Pending, Initializing or Running."""
    missing = stalls.find(job, seen, view, now)
    if missing:
        verdict = stalled(missing.reason, missing.message).after(seen.timing.retry)
    else:
        verdict = _phase(job, seen, view, now)
    attempt = extended(view, seen, job, now)
    return verdict.having(attempt=dict(attempt)) if attempt else verdict


def _phase(job: JobFacts, seen: Observation, view: AttemptView, now: datetime) -> Verdict:
    pods = view.live
    if len(pods) < view.size:
        state = "Pending" if view.attempts == 1 else "Restarting"
        message = f"{len(pods)} of {view.size} pods exist"
        return starting(state, "PodsMissing", message).after(_patience(seen, now))
    unready = [pod for pod in pods if not (pod.ready or pod.phase == "Succeeded")]
    if unready:
        return _unready(unready, view).after(seen.timing.mount if _placing(unready) else None)
    wait = _until_running(job, seen, pods, now)
    if wait > 0:
        phase = str(job.progress.get("phase") or "starting").lower()
        return starting("Initializing", "Preparing", f"all pods are ready; rank 0 is {phase}").after(wait)
    return running(f"{view.size} pod(s) are training", health(job.progress))


def _patience(seen: Observation, now: datetime) -> float:
    """Soon after the child was made its pods are due at once; later the reason has been looked up already."""
    age = clock.seconds_since(seen.child.created if seen.child else None, now) or 0.0
    return seen.timing.missing_pods if age < 2 * seen.timing.missing_pods else seen.timing.retry


def _placing(unready: list[PodRecord]) -> bool:
    return any(pod.phase == "Pending" for pod in unready)


def _unready(unready: list[PodRecord], view: AttemptView) -> Verdict:
    started = view.attempts > 1 or any(pod.phase == "Running" for pod in view.live)
    message = f"{view.size - len(unready)} of {view.size} pods are ready"
    held = next((pod for pod in unready if pod.waiting), None)
    if held and held.waiting:
        message += f"; pod {held.name} waits: {held.waiting.reason}: {held.waiting.message[:256]}"
    return starting("Initializing" if started else "Pending", "PodsStarting", message)


def _until_running(job: JobFacts, seen: Observation, pods: tuple[PodRecord, ...], now: datetime) -> float:
    """0 where the loop has started: rank 0 says so, or no reports come and all pods have been ready for long enough."""
    if seen.status_server is None:
        return 0.0
    begun = clock.parse((job.status.get("attempt") or {}).get("startTime"))
    reported = clock.parse(job.progress.get("lastUpdateTime"))
    recent = reported and (now - reported).total_seconds() < 3 * seen.timing.silence
    if reported and recent and (begun is None or reported >= begun):
        return seen.timing.silence if job.progress.get("phase") in _BEFORE_THE_LOOP else 0.0
    youngest = min((clock.seconds_since(pod.ready_since, now) or 0.0 for pod in pods), default=0.0)
    return max(0.0, seen.timing.silence - youngest)


def conflict(job: JobFacts, seen: Observation) -> Verdict | None:
    """The child of our name is another's, or on its way out."""
    child = seen.child
    if child is None:
        return None
    if child.owner_uid == job.uid and not child.deleting:
        return None
    if child.deleting or _former(child.owner_uid, job):
        message = f"waits until the earlier {child.kind} {child.key.name} is deleted"
        return starting("Pending", "CleaningUp", message).after(seen.timing.settle)
    message = f"a {child.kind} named {child.key.name} exists and is not this job's; delete it or rename the job"
    return stalled(Reason.NAME_CONFLICT, message).after(seen.timing.retry)


def _former(owner_uid: str | None, job: JobFacts) -> bool:
    """A child with our label and another owner belongs to an earlier job of this name: the garbage collector takes
    it."""
    return owner_uid is not None and owner_uid != job.uid
