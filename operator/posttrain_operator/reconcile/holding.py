"""A training that one of its guards has suspended: no pods until the user has said so. Pure.

That a job is held is the status's own reason (GuardSuspended): written first, before the child is suspended and takes
the pods with it, and the word of every pass until spec.suspend is true. From then on the job is suspended by its user,
and goes on as any such job does.
"""

from __future__ import annotations

from datetime import datetime

from posttrain_api.reasons import Reason
from posttrain_operator.facts import JobFacts, Observation
from posttrain_operator.reconcile.attempt import AttemptView
from posttrain_operator.reconcile.endings import described
from posttrain_operator.reconcile.ends import PodEnd, read_ends
from posttrain_operator.reconcile.restarts import condemned
from posttrain_operator.reconcile.suspension import set_suspend
from posttrain_operator.status import accounting
from posttrain_operator.status.verdict import Verdict, starting, suspended


def holding(job: JobFacts, seen: Observation, view: AttemptView, now: datetime) -> Verdict | None:
    """Decides to hold the job, carries it out, or goes on holding it; None where no guard has asked, or the user has
    spoken since."""
    if job.suspend:
        return None
    if job.status.get("reason") == Reason.GUARD_SUSPENDED:
        return _held(job, seen, view, now)
    end = _asked(seen, view)
    return None if end is None else _decided(job, end)


def _asked(seen: Observation, view: AttemptView) -> PodEnd | None:
    """The end of a recorded pod that asks for it. Once the child is suspended it was answered."""
    if view.closed or seen.child is None or seen.child.suspended:
        return None
    ends = read_ends(pod for pod in view.pods if pod.uid in view.recorded)
    return next((end for end in ends if end.reason is Reason.GUARD_SUSPENDED), None)


def _decided(job: JobFacts, end: PodEnd) -> Verdict:
    verdict = starting(job.status.get("state", "Running"), Reason.GUARD_SUSPENDED, described(end))
    return verdict.having(failure=end.to_failure()).after(0)


def _held(job: JobFacts, seen: Observation, view: AttemptView, now: datetime) -> Verdict:
    """Pods that replaced the ended ones before the child was suspended are not to train on: they get no grace. Where a
    restart had been decided before the guard's word was read, none of the pods is."""
    child, message = seen.child, str(job.status.get("message") or "a guard has suspended the training")
    if view.live or (child is not None and not child.suspended):
        stopping = starting(job.status.get("state", "Running"), Reason.GUARD_SUSPENDED, message)
        stopping = stopping.doing(delete=condemned(view.live if view.closed else view.fresh, seen, now))
        due = child is not None and not child.suspended and not child.deleting
        return stopping.doing(patch=(set_suspend(child, True),)).after(0) if due and child is not None else stopping
    verdict = suspended(Reason.GUARD_SUSPENDED, message)
    return verdict.having(usage=accounting.closing(job, now, lost=False)) if view.number else verdict
