"""The two deadlines of runPolicy. Pure.

startupDeadlineSeconds runs while the job could run and does not: from its first visit, or from the moment it last ran
or was suspended. activeDeadlineSeconds counts the time of all attempts.
"""

from __future__ import annotations

from datetime import datetime

from posttrain_api.reasons import Reason
from posttrain_operator.facts import JobFacts
from posttrain_operator.status import accounting
from posttrain_operator.status.verdict import Verdict, failed


def startup(job: JobFacts, now: datetime) -> Verdict | None:
    """StartupTimeout where training has not begun in time."""
    limit = job.policy("startupDeadlineSeconds")
    if limit is None or job.suspend or startup_seconds(job, now) < limit:
        return None
    last = job.condition("Running").get("message") or "no pod became ready"
    return failed(Reason.STARTUP_TIMEOUT, f"training did not begin within startupDeadlineSeconds ({limit} s): {last}")


def startup_seconds(job: JobFacts, now: datetime) -> float:
    """How long the job has been trying to start; 0 while it runs or is suspended."""
    if job.holds("Running") or job.holds("Suspended"):
        return 0.0
    return min(job.since("Running", now), job.since("Suspended", now))


def active(job: JobFacts, now: datetime) -> Verdict | None:
    """DeadlineExceeded where all attempts together took too long."""
    limit = job.policy("activeDeadlineSeconds")
    if limit is None or accounting.active_seconds(job, now) < limit:
        return None
    return failed(Reason.DEADLINE_EXCEEDED, f"the job ran longer than activeDeadlineSeconds ({limit} s)")


def next_look(job: JobFacts, now: datetime) -> float | None:
    """Seconds until the nearer deadline; None where none is running."""
    waits = []
    startup_limit, active_limit = job.policy("startupDeadlineSeconds"), job.policy("activeDeadlineSeconds")
    if startup_limit is not None and not (job.suspend or job.holds("Running") or job.holds("Suspended")):
        waits.append(startup_limit - startup_seconds(job, now))
    if active_limit is not None and accounting.is_open(job):
        waits.append(active_limit - accounting.active_seconds(job, now))
    return max(0.05, min(waits)) if waits else None
