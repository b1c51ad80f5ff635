"""Puts a new status together and says whether it differs from the last, and which events its changes are worth."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from posttrain_api.reasons import Reason
from posttrain_operator import clock
from posttrain_operator.actions import Event
from posttrain_operator.facts import Intent, JobFacts
from posttrain_operator.status import accounting, learned
from posttrain_operator.status.conditions import MAX_MESSAGE, merge
from posttrain_operator.status.refusals import refusal_warning
from posttrain_operator.status.saving import grace_warning
from posttrain_operator.status.verdict import Verdict

_VOLATILE = ("usage",)
"""Grows by itself: refreshed with every write, never the reason for one."""
_WARNINGS = ("Failed", "Stalled", "TrainingHealthy")


def build(job: JobFacts, intent: Intent, verdict: Verdict, now: datetime) -> dict[str, Any]:
    """The whole status that we own. Finished jobs change in nothing but observedGeneration."""
    if job.terminal:
        return _seen(job, now)
    status = {**job.status, **learned.planned(job, intent)}
    status |= learned.reported(status, job.progress)
    status |= {"observedGeneration": job.generation, "state": verdict.state}
    status |= {"reason": verdict.reason, "message": verdict.message[:MAX_MESSAGE]}
    status["conditions"] = merge(job.status.get("conditions") or (), verdict.conditions, job.generation, now)
    if verdict.state == "Failed":
        status["failure"] = {"reason": verdict.reason, "message": status["message"]}
    if usage := accounting.corrected(job):
        status["usage"] = usage
    status |= verdict.changes
    status = {field: value for field, value in status.items() if value is not None}
    return {**status, **_times(job, status, now)}


def _seen(job: JobFacts, now: datetime) -> dict[str, Any]:
    conditions = merge(job.status.get("conditions") or (), {}, job.generation, now)
    return {**job.status, "observedGeneration": job.generation, "conditions": conditions}


def _times(job: JobFacts, status: Mapping[str, Any], now: datetime) -> dict[str, Any]:
    """startTime with the first pods; completionTime and duration at the end, because a duration that stands still is
    wrong."""
    times: dict[str, Any] = {}
    start = status.get("startTime") or (status.get("attempt") or {}).get("startTime")
    if start:
        times["startTime"] = start
    if _is(status, "Finished"):
        times["completionTime"] = clock.render(now)
        times |= {"duration": clock.render_duration(clock.seconds_since(start, now) or 0)} if start else {}
    if "attempt" in status:
        times["usage"] = accounting.with_gpu_seconds(job, status, now)
    return times


def _is(status: Mapping[str, Any], kind: str) -> bool:
    return any(c["type"] == kind and c["status"] == "True" for c in status.get("conditions") or ())


def differs(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether the new status is worth a write."""

    def stable(status: Mapping[str, Any]) -> dict[str, Any]:
        return {field: value for field, value in status.items() if field not in _VOLATILE}

    return stable(old) != stable(new)


def transitions(job: JobFacts, new: Mapping[str, Any]) -> tuple[Event, ...]:
    """Events for what changed: Complete, Failed, Suspended, Running and Stalled turning True, Stalled for another
    reason, saves that have become too slow."""
    found = []
    for condition in new.get("conditions") or ():
        old = job.condition(condition["type"])
        turned = condition["status"] == "True" and old.get("status") != "True"
        other = (
            condition["type"] == "Stalled"
            and condition["status"] == "True"
            and old.get("reason") != condition["reason"]
        )
        if condition["type"] in ("Complete", "Failed", "Suspended", "Running", "Stalled") and (turned or other):
            found.append(_event(condition))
        if condition["type"] == "TrainingHealthy" and condition["status"] == "False" and _is_news(old, condition):
            found.append(_event(condition))
    told = (grace_warning(job.status, new), refusal_warning(job.status, new))
    return (*found, *(event for event in told if event))


def _is_news(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return (old.get("status"), old.get("reason")) != (new["status"], new["reason"])


def _event(condition: Mapping[str, Any]) -> Event:
    bad = condition["type"] in _WARNINGS or condition["reason"] == Reason.GUARD_SUSPENDED
    kind = "Warning" if bad else "Normal"
    return Event(kind, condition["reason"], condition.get("message") or condition["type"])
