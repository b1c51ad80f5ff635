"""What a gang restart is for, and whether it uses up the budget. Pure.

Preemption and node loss are the cluster's doing and free. Exit code 143 alone is no preemption: it counts where no
pod of the attempt was deleted, evicted or disrupted, or an image that always ends so would be restarted for ever.
One pod that is asked to end is enough: the others save with it and end with the same code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from posttrain_api.reasons import REASONS, Budget, Reason
from posttrain_operator import clock
from posttrain_operator.reconcile.attempt import AttemptView
from posttrain_operator.reconcile.endings import described
from posttrain_operator.reconcile.ends import NEVER_RAN, PodEnd
from posttrain_operator.records import PodRecord

_UNASKED = "nobody had asked a pod to end, so this restart counts"


@dataclass(frozen=True)
class Cause:
    """`failure`: status.failure. `told`: the same for a message, with the pod in it. `budget`: what the restart uses
    up, besides total."""

    failure: Mapping[str, Any]
    told: str
    budget: Budget = Budget.TOTAL

    @property
    def free(self) -> bool:
        return self.budget is Budget.FREE

    @property
    def reason(self) -> Reason:
        return Reason(self.failure["reason"])


def lost(message: str) -> Cause:
    """Pods that are gone for a reason that nobody knows."""
    return Cause({"reason": Reason.PEER_LOST, "message": message}, message)


def cause_from(end: PodEnd, view: AttemptView) -> Cause:
    """A pod's end as the cause of a restart."""
    failure = end.to_failure()
    reason = Reason(failure["reason"])
    if reason is not Reason.PREEMPTED or _asked(view):
        return Cause(failure, described(end), _budget(end, reason))
    message = f"{failure['message']}; {_UNASKED}"
    return Cause({**failure, "message": message[:1024]}, f"{described(end)}; {_UNASKED}")


def _budget(end: PodEnd, reason: Reason) -> Budget:
    """A container that never began reads like one that was killed and is no process of ours: its node or its image may
    be mended, so it is tried as often as total allows."""
    never_ran = end.pod.end is not None and end.pod.end.reason in NEVER_RAN
    return Budget.TOTAL if never_ran else REASONS[reason].budget or Budget.TOTAL


def _asked(view: AttemptView) -> bool:
    """Whether a pod of the attempt was told to end, or one that may have been is not known any more."""
    unknown = view.recorded - {pod.uid for pod in view.pods}
    ends = [end for pod in view.members if (end := clock.parse(pod.end.finished_at if pod.end else None))]
    first = min(ends, default=None)
    return bool(unknown) or any(_told(pod, first) or pod.disruption or pod.pod_reason for pod in view.members)


def _told(pod: PodRecord, first: datetime | None) -> bool:
    """Whether it was asked to end before the first pod of the attempt did. Times are whole seconds, so a deletion in
    the same second counts as the answer to that end, where the child's controller gives such answers."""
    return pod.asked and (pod.asked_at is None or first is None or pod.asked_at < first)
