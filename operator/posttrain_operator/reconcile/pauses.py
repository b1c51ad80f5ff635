"""A pause before the next attempt where the last one never trained. Pure.

A container that cannot start ends within a second, and the training-operator makes its successor at once: without a
pause the whole budget of restarts would be gone before anybody could mend an image. The pause is written with the
decision to restart (`status.restarts.notBefore`) and kept by suspending the child, the one way to keep the
training-operator from making pods; `suspension` carries it out. An attempt that has trained is followed at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from posttrain_operator import clock
from posttrain_operator.facts import JobFacts
from posttrain_operator.settings import Timing


def has_run(job: JobFacts) -> bool:
    """Whether the recorded attempt was ever Running: it is, or the condition has flipped since the attempt began."""
    if job.holds("Running"):
        return True
    began = clock.parse((job.status.get("attempt") or {}).get("startTime"))
    flipped = clock.parse(job.condition("Running").get("lastTransitionTime"))
    return began is not None and flipped is not None and flipped > began


def pause(job: JobFacts, timing: Timing, now: datetime) -> dict[str, Any]:
    """What the decision adds to status.restarts: nothing after an attempt that ran, else twice the last pause."""
    if has_run(job):
        return {}
    last = float((job.status.get("restarts") or {}).get("pauseSeconds", 0))
    seconds = min(timing.restart_limit, 2 * last or timing.restart)
    # Whole seconds, as times are written; a pause must not be lost in them.
    end = now + timedelta(seconds=seconds + 1)
    return {"pauseSeconds": max(1, round(seconds)), "notBefore": clock.render(end)}


def remaining(status: Mapping[str, Any], now: datetime) -> float:
    """Seconds until the next attempt may begin; 0 where nothing holds it back."""
    passed = clock.seconds_since((status.get("restarts") or {}).get("notBefore"), now)
    return 0.0 if passed is None else max(0.0, -passed)
