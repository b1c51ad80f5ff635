"""A restart whose cause shows late. Pure.

Peers notice a loss before its cause is known: a node counts as lost only after a minute, and a rank may fail long
before its pod has ended. The restart was then decided as PeerLost; when the cause shows while the old pods go, what was
counted and told is put right, and a cause that is free gives the budget back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from posttrain_api.reasons import Reason
from posttrain_operator.actions import Event
from posttrain_operator.facts import JobFacts, Observation
from posttrain_operator.reconcile import budgets, nodes
from posttrain_operator.reconcile.attempt import AttemptView
from posttrain_operator.reconcile.causes import Cause, cause_from
from posttrain_operator.reconcile.ends import Fate, PodEnd, read_ends
from posttrain_operator.reconcile.restarts import exhausted
from posttrain_operator.status import accounting
from posttrain_operator.status.verdict import Verdict, starting

_CONSEQUENCES = frozenset({Reason.PEER_LOST, Reason.PREEMPTED})


def revising(job: JobFacts, seen: Observation, view: AttemptView, now: datetime) -> Verdict | None:
    """Names the cause of a restart that was decided without one; None where there is nothing to put right."""
    if not view.closed or not _without_a_cause(job.status):
        return None
    cause = _cause(seen, view, now)
    if cause is None:
        return None
    before = replace(job, status={**job.status, "restarts": _uncounted(job.status["restarts"])})
    if cause.reason is Reason.GUARD_SUSPENDED:  # the job is held, which is no restart
        held = starting("Restarting", cause.reason, cause.told)
        return held.having(restarts=before.status["restarts"], failure=dict(cause.failure)).after(0)
    end = exhausted(before, cause)
    if end is not None:
        return end.having(usage=accounting.closing(job, now, lost=False))
    message = f"attempt {view.attempts} begins: {cause.told}"
    kept = {key: value for key, value in job.status["restarts"].items() if key != "sinceCheckpoint"}
    restarts = {**kept, **budgets.counted(before, cause)}
    verdict = starting("Restarting", cause.reason, message).having(restarts=restarts, failure=dict(cause.failure))
    return verdict.telling(Event("Warning", cause.reason, f"the cause of the restart: {cause.told}")).after(0)


def _without_a_cause(status: Mapping[str, Any]) -> bool:
    """Only a restart has ended the attempt with a time: a resumption has not, though an older restart left its failure
    behind."""
    if "endTime" not in (status.get("attempt") or {}):
        return False
    counted = ((status.get("restarts") or {}).get("byCause") or {}).get(Reason.PEER_LOST, 0)
    return (status.get("failure") or {}).get("reason") == Reason.PEER_LOST and counted > 0


def _cause(seen: Observation, view: AttemptView, now: datetime) -> Cause | None:
    """What the recorded pods say that our own deletion cannot have made them say; else the node of one of them."""
    recorded = [pod for pod in view.pods if pod.uid in view.recorded]
    told = (end for end in read_ends(recorded) if end.fate is Fate.RETRYABLE and _is_told(end))
    end = next(told, None)
    return cause_from(end, view) if end else nodes.loss(recorded, seen, now)


def _is_told(end: PodEnd) -> bool:
    if end.reason in _CONSEQUENCES and not end.pod.disruption:
        return False
    by_kernel = end.pod.end is not None and end.pod.end.reason == "OOMKilled"
    return bool(by_kernel or end.pod.disruption or end.pod.pod_reason or end.failure)


def _uncounted(restarts: Mapping[str, Any]) -> dict[str, Any]:
    """status.restarts with one PeerLost less."""
    causes = {**restarts["byCause"], str(Reason.PEER_LOST): restarts["byCause"][Reason.PEER_LOST] - 1}
    kept = {reason: count for reason, count in causes.items() if count}
    return {**restarts, "total": max(0, int(restarts.get("total", 0)) - 1), "byCause": kept}
