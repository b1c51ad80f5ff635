"""Time and GPU time of a job. Pure.

`usage.activeSeconds` is the sum over attempts that ended; the attempt that is open counts from its startTime to now.
The rest follows: GPU seconds are active seconds times GPUs, so that nothing drifts apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from posttrain_operator import clock
from posttrain_operator.facts import JobFacts


def is_open(job: JobFacts) -> bool:
    """Whether an attempt has pods now: begun, not closed by a restart, not suspended, not finished."""
    attempt = job.status.get("attempt") or {}
    begun = "startTime" in attempt and attempt.get("number") == job.status.get("attempts")
    return begun and not job.holds("Suspended") and not job.terminal


def open_seconds(job: JobFacts, now: datetime) -> float:
    """Seconds of the attempt that runs now; 0 where none is open."""
    started = (job.status.get("attempt") or {}).get("startTime")
    return max(0.0, clock.seconds_since(started, now) or 0.0) if is_open(job) else 0.0


def active_seconds(job: JobFacts, now: datetime) -> float:
    """Seconds with pods admitted, over all attempts: what activeDeadlineSeconds is judged on."""
    return float((job.status.get("usage") or {}).get("activeSeconds", 0)) + open_seconds(job, now)


def closing(job: JobFacts, now: datetime, lost: bool) -> dict[str, Any]:
    """status.usage once the open attempt has ended; `lost`: by a failure, so that what it did since the last checkpoint
    is lost. `now`: when it ended."""
    usage = dict(job.status.get("usage") or {})
    usage["activeSeconds"] = int(active_seconds(job, now))
    if lost:
        usage["gpuSecondsLost"] = int(usage.get("gpuSecondsLost", 0)) + int(
            _unsaved_seconds(job, now) * gpus(job.status)
        )
    return usage


def with_gpu_seconds(job: JobFacts, status: Mapping[str, Any], now: datetime) -> dict[str, Any]:
    """status.usage with gpuSeconds up to now."""
    usage = dict(status.get("usage") or {})
    closed = usage.get("activeSeconds", 0) != (job.status.get("usage") or {}).get("activeSeconds", 0)
    seconds = float(usage.get("activeSeconds", 0)) + (0.0 if closed else open_seconds(job, now))
    # Whole seconds are kept of each attempt: what was told is never taken back for a rest of one.
    total = max(int(seconds * gpus(status)), int(usage.get("gpuSeconds", 0)))
    return {"gpuSecondsLost": 0, "activeSeconds": 0, **usage, "gpuSeconds": total}


def gpus(status: Mapping[str, Any]) -> int:
    """GPUs of the whole job, as the status says."""
    return int((status.get("resources") or {}).get("gpus", 0))


def corrected(job: JobFacts) -> dict[str, Any] | None:
    """status.usage where a checkpoint is reported only after its attempt was given up: what it holds is not lost.
    None where there is nothing to put right; status.checkpoints is written with it, so that it is done once."""
    attempt, told = job.status.get("attempt") or {}, job.progress.get("checkpoint") or {}
    end, start = (clock.parse(attempt.get(field)) for field in ("endTime", "startTime"))
    if end is None or start is None or not told:
        return None
    total = (end - start).total_seconds()
    before = (job.status.get("checkpoints") or {}).get("last") or {}
    kept = _since(before, end, total) - _since(told, end, total)
    usage = dict(job.status.get("usage") or {})
    usage["gpuSecondsLost"] = max(0, int(usage.get("gpuSecondsLost", 0)) - int(kept * gpus(job.status)))
    return usage if kept > 0 else None


def _unsaved_seconds(job: JobFacts, now: datetime) -> float:
    return _since(job.checkpoint, now, open_seconds(job, now))


def _since(checkpoint: Mapping[str, Any], end: datetime, total: float) -> float:
    """Seconds of an attempt of `total` seconds from its last checkpoint to its end."""
    saved = clock.seconds_since(checkpoint.get("time"), end)
    return total if saved is None else min(total, max(0.0, saved))
