"""How pods ended, and which end is the cause. Pure.

The trainer's launcher says by exit code and termination message what happened; OOM kills, evictions, node loss and
preemption come from the pod's own state. The first failing pod in time is the cause; peers that only lost it
(PeerLost) are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Any

from posttrain_api.reasons import REASONS, Effect, Reason, reason_of_exit_code
from posttrain_api.records import MAX_LOG_TAIL_BYTES, Failure, Success, parse_termination
from posttrain_operator import clock
from posttrain_operator.records import End, PodRecord

_NODE_LOST = frozenset({"DeletionByTaintManager", "DeletionByPodGC"})
_NODE_LOST_POD = frozenset({"NodeLost", "NodeShutdown"})
NEVER_RAN = frozenset({"StartError", "ContainerCannotRun", "RunContainerError"})
"""Reasons of a container's end that say that it did not begin."""
_LATEST = datetime.max.replace(tzinfo=UTC)


class Fate(Enum):
    """What an end means for the job."""

    SUCCESS = "success"
    """Rank 0's success record."""
    DONE = "done"
    """Exit code 0 without a record: a worker that finished, or a master that said nothing."""
    PERMANENT = "permanent"
    RETRYABLE = "retryable"


@dataclass(frozen=True)
class PodEnd:
    """One pod's end, read. `time`: of the first sign of it; the far future where nobody knows."""

    pod: PodRecord
    fate: Fate
    reason: Reason | None = None
    message: str = ""
    failure: Failure | None = None
    success: Success | None = None
    time: datetime = _LATEST

    def to_failure(self) -> dict[str, Any]:
        """status.failure."""
        said, end = self.failure, self.pod.end or End()
        fields: dict[str, Any] = {
            "reason": self.reason,
            "message": self.message[:1024],
            "replica": replica(self.pod),
            "rank": said.rank if said else None,
            "node": self.pod.node,
            "exitCode": end.exit_code,
            "signal": said.signal if said else _signal(end),
            "step": said.step if said else None,
            "logTail": said.log_tail if said else _log_tail(end),
        }
        return {name: value for name, value in fields.items() if value is not None}


def _signal(end: End) -> int | None:
    """Of a container that left no word: what the kubelet says, else what its exit code means to a shell."""
    if end.signal:
        return end.signal
    return end.exit_code - 128 if end.exit_code is not None and 128 < end.exit_code < 160 else None


def _log_tail(end: End) -> str | None:
    """Of a container that left no word: the kubelet gives the end of its log in its place; the runtime, why it never
    began."""
    if not end.exit_code or end.reason in NEVER_RAN:
        return None
    return end.message.encode()[-MAX_LOG_TAIL_BYTES:].decode(errors="ignore") or None


def replica(pod: PodRecord) -> str:
    """`master-0`, `worker-3`."""
    return f"{pod.role.lower()}-{pod.index}"


def read_ends(pods: Iterable[PodRecord]) -> list[PodEnd]:
    """The ends of all pods that have ended, the first in time first; the master before workers of the same moment."""
    ends = [read_end(pod) for pod in pods if pod.ended]
    return sorted(ends, key=lambda end: (end.time, end.pod.role != "Master", end.pod.index))


def read_end(pod: PodRecord) -> PodEnd:
    """One pod's end. Exit codes 1–127 are permanent whatever else is said: the training-operator decides by them."""
    end = pod.end or End(exit_code=0 if pod.phase == "Succeeded" else None)
    said = parse_termination(end.message)
    if end.exit_code == 0:
        success = said if isinstance(said, Success) else None
        return PodEnd(pod, Fate.SUCCESS if success else Fate.DONE, success=success, time=_time(None, end, pod))
    failure = said if isinstance(said, Failure) else None
    permanent = end.exit_code is not None and end.exit_code < 128
    reason = _permanent(end, failure) if permanent else _retryable(pod, end, failure)
    return PodEnd(
        pod,
        Fate.PERMANENT if permanent else Fate.RETRYABLE,
        reason,
        _message(pod, end, failure),
        failure,
        time=_time(failure, end, pod),
    )


def _permanent(end: End, failure: Failure | None) -> Reason:
    if failure and REASONS[failure.reason].effect is Effect.FAILED:
        return failure.reason
    reason = reason_of_exit_code(end.exit_code or 1)
    return reason if REASONS[reason].effect is Effect.FAILED else Reason.INTERNAL_ERROR


def _retryable(pod: PodRecord, end: End, failure: Failure | None) -> Reason:
    if end.reason == "OOMKilled" or (pod.pod_reason == "Evicted" and "memory" in pod.pod_message):
        return Reason.OUT_OF_MEMORY
    if pod.disruption in _NODE_LOST or pod.pod_reason in _NODE_LOST_POD:
        return Reason.NODE_LOST
    if pod.disruption or pod.pod_reason in ("Evicted", "Preempting"):
        return Reason.PREEMPTED
    if failure and REASONS[failure.reason].effect is Effect.RESTART:
        return failure.reason
    return Reason.PEER_LOST if end.exit_code is None else reason_of_exit_code(end.exit_code)


def _message(pod: PodRecord, end: End, failure: Failure | None) -> str:
    if failure:
        return failure.message
    if end.exit_code is None:
        return end.message or pod.pod_message or f"pod {pod.name} is gone and its end is not known"
    told = end.message.strip().splitlines()
    return f"pod {pod.name} ended with exit code {end.exit_code}" + (f": {told[-1][:512]}" if told else "")


def _time(failure: Failure | None, end: End, pod: PodRecord) -> datetime:
    written = failure.time if failure else None
    return clock.parse(written) or clock.parse(end.finished_at) or clock.parse(pod.deleting_since) or _LATEST


def cause_of(ends: Sequence[PodEnd]) -> PodEnd:
    """The cause among retryable ends in order of time: the first that is more than a peer's loss."""
    return next((end for end in ends if end.reason is not Reason.PEER_LOST), ends[0])
