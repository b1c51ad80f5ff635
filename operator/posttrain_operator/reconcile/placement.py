"""Half-placed jobs: some pods have a node, others find none or are over a quota, and nobody else can use what the first
ones hold. Pure.

Without a scheduler that places all or none, two such jobs block each other for ever. So a job that has been half
placed for long enough gives everything back and tries again after a pause: the child is suspended, as in `pauses`,
and the pause differs from job to job, so that two of them do not meet again. A startup deadline ends it as any other
wait. Nothing is lost by it: an attempt that is not whole trains nothing.
"""

from __future__ import annotations

from datetime import datetime

from posttrain_api.reasons import Budget, Reason
from posttrain_operator import clock
from posttrain_operator.actions import Event
from posttrain_operator.facts import JobFacts, Observation
from posttrain_operator.reconcile import budgets, pauses, stalls
from posttrain_operator.reconcile.attempt import AttemptView
from posttrain_operator.reconcile.causes import Cause
from posttrain_operator.records import PodRecord
from posttrain_operator.status import accounting
from posttrain_operator.status.verdict import Verdict, stalled


def giving_back(job: JobFacts, seen: Observation, view: AttemptView, now: datetime) -> Verdict | None:
    """Decides to give the places back; None where the job has all of them, or none, or not for long enough."""
    holding = [pod for pod in view.live if pod.node is not None and not pod.ended]
    if view.closed or not view.recorded or not holding:
        return None
    lack = _homeless(seen, view, now) or _forbidden(job, seen, view, now)
    if lack is None:
        return None
    message = f"{lack}; the others give their places back and all are tried again after a pause"
    cause = Cause({"reason": Reason.UNSCHEDULABLE, "message": message}, message, Budget.FREE)
    pause = pauses.before_placement(job, seen.timing, view.attempts + 1, now)
    verdict = stalled(Reason.UNSCHEDULABLE, message).having(
        attempts=view.attempts + 1,
        attempt={**(job.status.get("attempt") or {}), "podUIDs": list(view.joined())},
        restarts={**budgets.counted(job, cause), **pause},
        usage=accounting.closing(job, now, lost=False),
    )
    return verdict.telling(Event("Warning", Reason.UNSCHEDULABLE, message)).after(0)


def _homeless(seen: Observation, view: AttemptView, now: datetime) -> str | None:
    pods = [pod for pod in view.live if pod.unschedulable is not None and not pod.ended]
    if not pods or max(_age(pod, now) for pod in pods) < seen.timing.half_placed:
        return None
    return f"{len(pods)} of {view.size} pods find no node ({pods[0].name}: {pods[0].unschedulable})"


def _forbidden(job: JobFacts, seen: Observation, view: AttemptView, now: datetime) -> str | None:
    """Pods that a quota forbids find no place either; they have been due since the attempt began. The pods of one that
    has trained end by themselves, and that is charged."""
    missing = stalls.unmade(job, seen, view)
    if missing is None or missing.reason is not Reason.QUOTA_EXCEEDED or pauses.has_run(job, seen, now):
        return None
    began = (job.status.get("attempt") or {}).get("startTime")
    if (clock.seconds_since(began, now) or 0.0) < seen.timing.half_placed:
        return None
    return f"{view.size - len(view.live)} of {view.size} pods cannot be made ({missing.message})"


def _age(pod: PodRecord, now: datetime) -> float:
    """A pod that has no node never had one, so it has been looking since it was made."""
    return clock.seconds_since(pod.created, now) or 0.0
