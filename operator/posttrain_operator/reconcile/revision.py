"""A restart whose cause shows late. Pure.

Peers notice a loss before its cause is known: a node counts as lost only after a minute, and a rank may fail long
before its pod has ended. The restart was then decided as PeerLost; when the cause shows while the old pods go, what was
counted and told is put right, and a cause that is free gives the budget back. Where a guard had asked to suspend the
training, whatever the restart was decided for, the job is held instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from posttrain_api.reasons import Reason
from posttrain_operator.actions import Event
from posttrain_operator.facts import JobFacts, Observation
from posttrain_operator.reconcile import budgets, nodes, pauses
from posttrain_operator.reconcile.attempt import AttemptView
from posttrain_operator.reconcile.causes import Cause, cause_from
from posttrain_operator.reconcile.ends import Fate, PodEnd, read_ends
from posttrain_operator.reconcile.restarts import exhausted
from posttrain_operator.status import accounting
from posttrain_operator.status.verdict import Verdict, starting

_CONSEQUENCES = frozenset({Reason.PEER_LOST, Reason.PREEMPTED})


def revising(job: JobFacts, seen: Observation, view: AttemptView, now: datetime) -> Verdict | None:
    """Names the cause of a restart that was decided without one; None where there is nothing to put right."""
    # Only a restart has ended the attempt with a time: a resumption has not, though an older restart left its failure.
    ended = (job.status.get("attempt") or {}).get("endTime")
    if not view.closed or ended is None:
        return None
    # What was made since replaced the recorded pods, and joined them only to be deleted with them.
    pods = [pod for pod in view.pods if pod.uid in view.recorded and not (pod.created and pod.created > ended)]
    ends = [end for end in read_ends(pods) if end.fate is Fate.RETRYABLE and _is_told(end)]
    return _held(job, view, ends) or _named(
        job, view, cause_from(ends[0], view) if ends else nodes.loss(pods, seen, now), now
    )


def _held(job: JobFacts, view: AttemptView, ends: list[PodEnd]) -> Verdict | None:
    """A guard's word, once: it is the failure from then on. To be held is no restart, and no pause follows it."""
    asked = next((end for end in ends if end.reason is Reason.GUARD_SUSPENDED), None)
    if asked is None or (job.status.get("failure") or {}).get("reason") == Reason.GUARD_SUSPENDED:
        return None
    cause, restarts = cause_from(asked, view), job.status.get("restarts") or {}
    counted = _uncounted(restarts) if _without_a_cause(job.status) else restarts
    # While the user suspends the job it is known and holds nothing.
    held = starting("Restarting", "Suspending" if job.suspend else cause.reason, cause.told)
    return held.having(restarts=pauses.lifted(counted), failure=dict(cause.failure)).after(0)


def _named(job: JobFacts, view: AttemptView, cause: Cause | None, now: datetime) -> Verdict | None:
    """The cause, where the restart was counted without one."""
    if cause is None or not _without_a_cause(job.status):
        return None
    before = replace(job, status={**job.status, "restarts": _uncounted(job.status["restarts"])})
    end = exhausted(before, cause)
    if end is not None:
        return end.having(usage=accounting.closing(job, now, lost=False))
    message = f"attempt {view.attempts} begins: {cause.told}"
    kept = {key: value for key, value in job.status["restarts"].items() if key != "sinceCheckpoint"}
    restarts = {**(pauses.lifted(kept) if cause.free else kept), **budgets.counted(before, cause)}
    verdict = starting("Restarting", cause.reason, message).having(restarts=restarts, failure=dict(cause.failure))
    return verdict.telling(Event("Warning", cause.reason, f"the cause of the restart: {cause.told}")).after(0)


def _without_a_cause(status: Mapping[str, Any]) -> bool:
    """Whether the last restart was counted as the loss of a peer."""
    counted = ((status.get("restarts") or {}).get("byCause") or {}).get(Reason.PEER_LOST, 0)
    return (status.get("failure") or {}).get("reason") == Reason.PEER_LOST and counted > 0


def _is_told(end: PodEnd) -> bool:
    """Whether our own deletion cannot have made the pod say it."""
    if end.reason in _CONSEQUENCES and not end.pod.disruption:
        return False
    by_kernel = end.pod.end is not None and end.pod.end.reason == "OOMKilled"
    return bool(by_kernel or end.pod.disruption or end.pod.pod_reason or end.failure)


def _uncounted(restarts: Mapping[str, Any]) -> dict[str, Any]:
    """status.restarts with one PeerLost less."""
    causes = {**restarts["byCause"], str(Reason.PEER_LOST): restarts["byCause"][Reason.PEER_LOST] - 1}
    kept = {reason: count for reason, count in causes.items() if count}
    return {**restarts, "total": max(0, int(restarts.get("total", 0)) - 1), "byCause": kept}
