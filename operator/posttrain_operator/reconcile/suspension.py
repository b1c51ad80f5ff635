"""The user's `suspend` once a child exists. Pure.

The child's own suspend deletes its pods; the trainer saves on SIGTERM. What the pods say at their end is read before
(`endings` comes first), because a suspended child ignores it. Resuming waits until no old pod is left.
"""

from __future__ import annotations

from datetime import datetime

from posttrain_api.reasons import Reason
from posttrain_operator.actions import Object, Patch
from posttrain_operator.backends import pytorchjob
from posttrain_operator.facts import JobFacts, Observation
from posttrain_operator.reconcile.attempt import AttemptView
from posttrain_operator.records import ChildRecord
from posttrain_operator.status import accounting
from posttrain_operator.status.verdict import Verdict, starting, suspended


def set_suspend(child: ChildRecord, suspend: bool) -> Patch:
    """The patch of the child, refused where it changed meanwhile."""
    return Patch(Object.CHILD, child.key.name, pytorchjob.suspension(child.resource_version, suspend))


def suspension(job: JobFacts, seen: Observation, view: AttemptView, now: datetime) -> Verdict | None:
    """Suspends, waits, or resumes; None where neither is wanted."""
    child = seen.child
    assert child is not None
    if job.suspend:
        return _suspend(job, child, view, now)
    return _resume(job, child, view) if child.suspended else None


def _suspend(job: JobFacts, child: ChildRecord, view: AttemptView, now: datetime) -> Verdict:
    if not child.suspended:
        stopping = starting(job.status.get("state", "Pending"), "Suspending", "the pods save their state and stop")
        return stopping.doing(patch=(set_suspend(child, True),))
    if view.live:
        return starting(job.status.get("state", "Pending"), "Suspending", f"waits for {len(view.live)} pod(s) to stop")
    verdict = suspended(
        Reason.USER_SUSPENDED, "spec.suspend is true; set it to false to go on from the last checkpoint"
    )
    return verdict.having(usage=accounting.closing(job, now, lost=False)) if view.number else verdict


def _resume(job: JobFacts, child: ChildRecord, view: AttemptView) -> Verdict:
    """The next attempt is decided on with the patch; a crash between them costs nothing, its pods are all new."""
    verdict = starting("Restarting" if view.number else "Pending", "Resuming", "the pods are being made again")
    if view.live:
        return starting("Suspended", "Resuming", f"waits for {len(view.live)} old pod(s) to go")
    return verdict.having(attempts=max(1, view.number + 1)).doing(patch=(set_suspend(child, False),))
