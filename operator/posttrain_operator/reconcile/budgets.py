"""How many restarts a job has left, by cause. Pure.

`total` counts every restart that is not free and never starts anew. Each other budget counts the restarts of its cause
since the last checkpoint: once a later one is committed the job has shown that it gets on, and the budget is whole.
The spec may be edited while the job runs, so limits are read from it at the moment of the decision.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain_api.reasons import Budget
from posttrain_api.spec.run import RESTARTS
from posttrain_operator.facts import JobFacts
from posttrain_operator.reconcile.causes import Cause


def exhausted(job: JobFacts, cause: Cause) -> str | None:
    """Why the cause may not be followed by another restart; None where it may."""
    if cause.free:
        return None
    spent = {Budget.TOTAL: _total(job.status.get("restarts") or {})}
    spent.setdefault(cause.budget, since_checkpoint(job).get(cause.budget, 0))
    over = next((budget for budget, times in spent.items() if times >= limit(job, budget)), None)
    return None if over is None else _sentence(over, limit(job, over), cause)


def _sentence(budget: Budget, allowed: int, cause: Cause) -> str:
    times = {0: "no restart", 1: "one restart"}.get(allowed, f"{allowed} restarts")
    since = "" if budget is Budget.TOTAL or allowed == 0 else " without a later checkpoint"
    said = f"runPolicy.restarts.{budget} allows {times}{since}"
    return f"{said}; the last cause is {cause.reason}: {cause.failure['message']}"


def limit(job: JobFacts, budget: Budget) -> int:
    """What the spec allows, or the built-in number."""
    said = ((job.spec.get("runPolicy") or {}).get("restarts") or {}).get(budget)
    return said if isinstance(said, int) else RESTARTS[budget]


def since_checkpoint(job: JobFacts) -> dict[str, int]:
    """What the budgets were charged with since the newest checkpoint; nothing where it is newer than the last count."""
    restarts = job.status.get("restarts") or {}
    progressed = job.checkpoint_step > _step(restarts)
    return {} if progressed else {str(k): int(v) for k, v in (restarts.get("sinceCheckpoint") or {}).items()}


def counted(job: JobFacts, cause: Cause) -> dict[str, Any]:
    """status.restarts with one more, without the pause before it."""
    restarts = job.status.get("restarts") or {}
    causes, spent = dict(restarts.get("byCause") or {}), since_checkpoint(job)
    causes[str(cause.reason)] = int(causes.get(str(cause.reason), 0)) + 1
    if cause.budget not in (Budget.FREE, Budget.TOTAL):
        spent[str(cause.budget)] = spent.get(str(cause.budget), 0) + 1
    step = max(job.checkpoint_step, _step(restarts))
    return {
        "total": _total(restarts) + (0 if cause.free else 1),
        "byCause": causes,
        **({"sinceCheckpoint": spent} if spent else {}),
        **({"checkpointStep": step} if step >= 0 else {}),
    }


def _total(restarts: Mapping[str, Any]) -> int:
    return int(restarts.get("total", 0))


def _step(restarts: Mapping[str, Any]) -> int:
    return int(restarts.get("checkpointStep", -1))
