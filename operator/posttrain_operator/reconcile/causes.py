"""What a gang restart is for, and whether it uses up the budget. Pure.

Preemption and node loss are the cluster's doing and free. Exit code 143 alone is no preemption: it counts where no
pod of the attempt was deleted, evicted or disrupted, or an image that always ends so would be restarted for ever.
One pod that is asked to end is enough: the others save with it and end with the same code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain_api.reasons import REASONS, Budget, Reason
from posttrain_operator.reconcile.attempt import AttemptView
from posttrain_operator.reconcile.endings import described
from posttrain_operator.reconcile.ends import PodEnd

_UNASKED = "nobody had asked a pod to end, so this restart counts"


@dataclass(frozen=True)
class Cause:
    """`failure`: status.failure. `told`: the same for a message, with the pod in it. `free`: it uses up no budget."""

    failure: Mapping[str, Any]
    told: str
    free: bool = False

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
    free = REASONS[reason].budget is Budget.FREE
    if reason is not Reason.PREEMPTED or _asked(view):
        return Cause(failure, described(end), free)
    message = f"{failure['message']}; {_UNASKED}"
    return Cause({**failure, "message": message[:1024]}, f"{described(end)}; {_UNASKED}")


def _asked(view: AttemptView) -> bool:
    """Whether a pod of the attempt was told to end, or one that may have been is not known any more."""
    unknown = view.recorded - {pod.uid for pod in view.pods}
    return bool(unknown) or any(pod.asked or pod.disruption or pod.pod_reason for pod in view.members)
