"""The user's `suspend` once a child exists, and the pause before an attempt. Pure.

The child's own suspend deletes its pods; the trainer saves on SIGTERM. What the pods say at their end is read before
(`endings` comes first), because a suspended child ignores it. Resuming waits until no old pod is left.
"""

from __future__ import annotations

from datetime import datetime

from posttrain_api.reasons import Reason
from posttrain_operator.actions import Object, Patch
from posttrain_operator.backends import backend
from posttrain_operator.facts import JobFacts, Observation
from posttrain_operator.reconcile import pauses
from posttrain_operator.reconcile.attempt import AttemptView, over
from posttrain_operator.reconcile.restarts import condemned
from posttrain_operator.records import ChildRecord
from posttrain_operator.status import accounting
from posttrain_operator.status.verdict import Verdict, stalled, starting, suspended


def set_suspend(child: ChildRecord, suspend: bool) -> Patch:
    """The patch of the child, refused where it changed meanwhile."""
    body = backend(child.kind).suspension(child.resource_version, suspend)
    return Patch(Object(child.kind), child.key.name, body)


def suspension(job: JobFacts, seen: Observation, view: AttemptView, now: datetime) -> Verdict | None:
    """Suspends, waits, or resumes; None where neither is wanted."""
    child = seen.child
    assert child is not None
    if job.suspend:
        return _suspend(job, seen, view, now)
    # A pause is before an attempt: one that has begun is not stopped for it, whatever another machine's clock says.
    wait = pauses.remaining(job.status, now) if view.closed else 0.0
    if wait > 0:
        return _hold(job, seen, view, now).after(wait)
    return _resume(job, seen, view, now) if child.suspended else None


def _suspend(job: JobFacts, seen: Observation, view: AttemptView, now: datetime) -> Verdict:
    """Pods of an attempt that runs save first; those of one that is over are still condemned."""
    child = seen.child
    assert child is not None
    if not child.suspended:
        stopping = starting(job.status.get("state", "Pending"), "Suspending", "the pods save their state and stop")
        return stopping.doing(patch=(set_suspend(child, True),)).after(0)  # no watch need tell of our own patch
    if view.live:
        message = f"waits for {len(view.live)} pod(s) to stop"
        return _clearing(starting(job.status.get("state", "Pending"), "Suspending", message), seen, view, now)
    verdict = suspended(
        Reason.USER_SUSPENDED, "spec.suspend is true; set it to false to go on from the last checkpoint"
    )
    return verdict.having(usage=accounting.closing(job, now, lost=False)) if view.number else verdict


def _hold(job: JobFacts, seen: Observation, view: AttemptView, now: datetime) -> Verdict:
    """No pods until the pause is over. Those that were made meanwhile are condemned with the others, and the child's
    suspension alone would give them their whole grace period."""
    child = seen.child
    assert child is not None
    verdict = _waiting(job, view)
    attempt = {**(job.status.get("attempt") or {}), "podUIDs": list(view.joined())}
    verdict = verdict.having(attempt=attempt) if view.closed else verdict
    if not child.suspended:
        return verdict.doing(patch=(set_suspend(child, True),)).after(0)
    return _clearing(verdict, seen, view, now)


def _clearing(verdict: Verdict, seen: Observation, view: AttemptView, now: datetime) -> Verdict:
    """Pods of an attempt that is over do not wait out their grace."""
    return verdict.doing(delete=condemned(view.old_live, seen, now)) if view.closed else verdict


def _waiting(job: JobFacts, view: AttemptView) -> Verdict:
    restarts, cause = job.status["restarts"], job.status.get("failure") or {}
    begins = f"attempt {view.attempts} begins after {restarts['notBefore']}"
    if pauses.is_for_placement(job.status):
        message = f"{begins}: not all pods found a node, those that had one gave it back"
        return stalled(Reason.UNSCHEDULABLE, message)
    message = f"{begins}: the last one ended before it trained: {cause.get('message', 'its end is not known')}"
    return starting("Restarting", str(cause.get("reason", "Restarting")), message)


def _resume(job: JobFacts, seen: Observation, view: AttemptView, now: datetime) -> Verdict:
    """The next attempt is decided on first: from then on what the old pods said is of the past, whatever becomes of the
    patch. Where the suspension was taken back before the last pod had gone, the old attempt's time is not yet added."""
    assert seen.child is not None
    verdict = starting("Restarting" if view.number else "Pending", "Resuming", "the pods are being made again")
    if view.live:
        state = "Restarting" if view.closed else "Suspended"
        waiting = starting(state, "Resuming", f"waits for {len(view.live)} old pod(s) to go")
        return _clearing(waiting, seen, view, now)
    past = over(job, view)
    if view.closed and not past:
        return verdict.having(attempts=view.number + 1).doing(patch=(set_suspend(seen.child, False),))
    if view.number and not view.closed:
        verdict = verdict.having(usage=accounting.closing(job, now, lost=False))
    verdict = verdict.having(attempts=view.number + 1).after(0)
    return verdict.having(attempt=past, attempts=past["number"] + 1) if past else verdict
