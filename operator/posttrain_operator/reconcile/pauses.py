"""A pause before the next attempt where the last one never trained. Pure.

A container that cannot start ends within a second, and the training-operator makes its successor at once: without a
pause the whole budget of restarts would be gone before anybody could mend an image. The pause is written with the
decision to restart (`status.restarts.notBefore`) and kept by suspending the child, the one way to keep the
training-operator from making pods; `suspension` carries it out. An attempt that has trained is followed at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from posttrain_api.reasons import Reason
from posttrain_operator import clock
from posttrain_operator.facts import JobFacts, Observation
from posttrain_operator.settings import Timing

_LONGEST, _ROUNDED = 1.5, 3.0
"""A pause is drawn up to so many times as long as it is called, and written in whole seconds."""


def has_run(job: JobFacts, seen: Observation, now: datetime) -> bool:
    """Whether the recorded attempt was ever Running: it is, or the condition has flipped since the attempt began.

    Where nobody reports, pods that are ready count as running, and a container that ends at once was ready too: there
    it must have lasted.
    """
    lasting = 0.0 if seen.status_server else seen.timing.silence
    if job.holds("Running"):
        return job.since("Running", now) >= lasting
    began = clock.parse((job.status.get("attempt") or {}).get("startTime"))
    flipped = clock.parse(job.condition("Running").get("lastTransitionTime"))
    if began is None or flipped is None or flipped <= began:
        return False
    return (flipped - began).total_seconds() >= lasting


def pause(job: JobFacts, seen: Observation, now: datetime) -> dict[str, Any]:
    """What the decision adds to status.restarts: nothing after an attempt that ran, else twice the last pause."""
    if has_run(job, seen, now):
        return {}
    seconds = _longer(job, seen.timing.restart, seen.timing.restart_limit)
    return _written(seconds, seconds, now)


def before_placement(job: JobFacts, timing: Timing, attempt: int, now: datetime) -> dict[str, Any]:
    """The same where pods found no node: 0.5 to 1.5 of the doubled pause. What is drawn depends on the job and the
    attempt alone, so that a pass that is repeated decides the same."""
    seconds = _longer(job, timing.placement, timing.placement_limit)
    drawn = int.from_bytes(hashlib.sha256(f"{job.uid}/{attempt}".encode()).digest()[:4], "big") / 2**32
    return {**_written(seconds, seconds * (0.5 + drawn), now), "pauseReason": str(Reason.UNSCHEDULABLE)}


def _longer(job: JobFacts, first: float, most: float) -> float:
    last = float((job.status.get("restarts") or {}).get("pauseSeconds", 0))
    return min(most, 2 * last or first)


def _written(seconds: float, wait: float, now: datetime) -> dict[str, Any]:
    # Whole seconds, as times are written; a pause must not be lost in them.
    return {"pauseSeconds": max(1, round(seconds)), "notBefore": clock.render(now + timedelta(seconds=wait + 1))}


def lifted(restarts: Mapping[str, Any]) -> dict[str, Any]:
    """status.restarts without any pause."""
    return {key: value for key, value in restarts.items() if key not in ("notBefore", "pauseSeconds", "pauseReason")}


def is_for_placement(status: Mapping[str, Any]) -> bool:
    """Whether the pause is one for pods that found no node."""
    return (status.get("restarts") or {}).get("pauseReason") == Reason.UNSCHEDULABLE


def remaining(status: Mapping[str, Any], now: datetime) -> float:
    """Seconds until the next attempt may begin; 0 where nothing holds it back.

    A rest that is longer than the pause ever was is a clock's that was set back since: nobody waits for it to catch up.
    """
    restarts = status.get("restarts") or {}
    passed = clock.seconds_since(restarts.get("notBefore"), now)
    rest = 0.0 if passed is None else max(0.0, -passed)
    return rest if rest <= _LONGEST * float(restarts.get("pauseSeconds", 0)) + _ROUNDED else 0.0
