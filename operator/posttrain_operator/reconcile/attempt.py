"""An attempt: the set of pod uids that train together, as the status records it, held against the pods that are
there. Pure.

`attempts` counts attempts that were decided on, `attempt.number` is the one whose pods are recorded. While `attempts`
is larger, the recorded pods are condemned: they are deleted, and the next complete set of others is adopted. So a
decision is in the status before a pod is deleted, and a crash between the two loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from posttrain_operator import clock
from posttrain_operator.backends import backend
from posttrain_operator.facts import JobFacts, Observation
from posttrain_operator.records import End, PodRecord


@dataclass(frozen=True)
class AttemptView:
    """`size`: pods of a complete attempt. `recorded`: uids in the status. `pods`: live ones and remembered ends."""

    attempts: int
    number: int
    size: int
    recorded: frozenset[str]
    pods: tuple[PodRecord, ...]

    @classmethod
    def of(cls, job: JobFacts, seen: Observation) -> AttemptView:
        attempt: Mapping[str, Any] = job.status.get("attempt") or {}
        vain = _in_vain(seen)
        return cls(
            attempts=max(1, int(job.status.get("attempts", 0))),
            number=int(attempt.get("number", 0)),
            size=_size(job, seen),
            recorded=frozenset(attempt.get("podUIDs") or ()) - vain,
            pods=tuple(pod for pod in seen.pods if pod.uid not in vain),
        )

    @property
    def closed(self) -> bool:
        """Whether the recorded pods are of the past: the next attempt is decided on and has no pods yet."""
        return self.attempts > self.number

    @property
    def live(self) -> tuple[PodRecord, ...]:
        return tuple(pod for pod in self.pods if not pod.gone)

    @property
    def old_live(self) -> tuple[PodRecord, ...]:
        """Recorded pods that still exist."""
        return tuple(pod for pod in self.live if pod.uid in self.recorded)

    @property
    def fresh(self) -> tuple[PodRecord, ...]:
        """Pods that exist and are not recorded."""
        return tuple(pod for pod in self.live if pod.uid not in self.recorded)

    @property
    def members(self) -> tuple[PodRecord, ...]:
        """Pods whose ends decide: the recorded ones, and, while the set is incomplete, everything seen besides."""
        if self.closed or len(self.recorded) < self.size:
            return self.pods
        return tuple(pod for pod in self.pods if pod.uid in self.recorded)

    @property
    def replaced(self) -> bool:
        """Whether a recorded pod has a successor: more pods than there is room for, or two of one name."""
        if self.closed or not self.fresh:
            return False
        names = {pod.name for pod in self.pods if pod.uid in self.recorded}
        crowded = len(self.recorded) + len(self.fresh) > self.size
        return crowded or any(pod.name in names for pod in self.fresh)

    def joined(self) -> tuple[str, ...]:
        """Sorted uids of the recorded and all other pods seen."""
        return tuple(sorted(self.recorded | {pod.uid for pod in self.pods}))


def _in_vain(seen: Observation) -> frozenset[str]:
    """uids of pods that have waited for the first one in vain: it finds no node, or pulls its image. They have lost
    nobody and are made again until it is there, so the attempt goes on with their successors.

    A pod that gives up though the first one was there is a failure like any other.
    """
    if not backend(seen.backend).AWAITS_FIRST:
        return frozenset()
    firsts = [pod for pod in seen.pods if pod.role == "Master" and pod.ready and not pod.ended]
    waited = (pod for pod in seen.pods if pod.role != "Master" and pod.end and pod.end.initial)
    return frozenset(pod.uid for pod in waited if not any(_was_there(first, pod.end, seen) for first in firsts))


def _was_there(first: PodRecord, end: End | None, seen: Observation) -> bool:
    ready, ended = clock.parse(first.ready_since), clock.parse(end.finished_at if end else None)
    return ready is None or ended is None or (ended - ready).total_seconds() >= seen.timing.named


def _size(job: JobFacts, seen: Observation) -> int:
    if seen.intent.plan:
        return seen.intent.plan.config.topology.nodes
    return int((job.status.get("resources") or {}).get("pods", 1))


def adopted(view: AttemptView, number: int, now: datetime) -> dict[str, Any]:
    """status.attempt of a new attempt: the pods that are not recorded yet; one that has died already is its failure."""
    uids = sorted(pod.uid for pod in view.pods if pod.uid not in view.recorded)
    return {"number": number, "startTime": clock.render(now), "podUIDs": uids}


def over(job: JobFacts, view: AttemptView) -> dict[str, Any]:
    """status.attempt of an attempt that is over with all its pods, where some of them ended before anybody had recorded
    them: what these said is not the next one's failure. Empty where all are recorded."""
    if all(pod.uid in view.recorded for pod in view.pods):
        return {}
    attempt = job.status.get("attempt") or {}
    return {**attempt, "number": max(1, view.number), "podUIDs": list(view.joined())}


def ripe(view: AttemptView, seen: Observation, now: datetime) -> float:
    """Seconds until the fresh pods are worth recording: none when they are complete or one has ended, a moment
    otherwise."""
    pods = view.fresh
    if len(pods) >= view.size or any(pod.ended for pod in pods):
        return 0.0
    oldest = max((clock.seconds_since(pod.created, now) or 0.0 for pod in pods), default=0.0)
    return max(0.0, seen.timing.forming - oldest)
