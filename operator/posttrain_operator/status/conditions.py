"""The eight conditions: always all of them, flipped only when their status changes, terminal ones never again.

`reason` and `message` may follow without a flip; `lastTransitionTime` may not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from posttrain_operator import clock

TYPES = ("Validated", "Suspended", "Running", "Complete", "Failed", "Finished", "Stalled", "TrainingHealthy")
TERMINAL = frozenset({"Complete", "Failed", "Finished"})
MAX_MESSAGE = 1024


@dataclass(frozen=True)
class Condition:
    """One condition as wanted. `status`: True, False or Unknown."""

    status: str
    reason: str
    message: str = ""


DEFAULTS: Mapping[str, Condition] = {
    "Validated": Condition("Unknown", "NotChecked"),
    "Suspended": Condition("False", "NotSuspended"),
    "Running": Condition("False", "NotStarted"),
    "Complete": Condition("False", "NotFinished"),
    "Failed": Condition("False", "NotFinished"),
    "Finished": Condition("False", "NotFinished"),
    "Stalled": Condition("False", "NotStalled"),
    "TrainingHealthy": Condition("Unknown", "NotRunning"),
}


def merge(
    previous: Iterable[Mapping[str, Any]], wanted: Mapping[str, Condition], generation: int, now: datetime
) -> list[dict[str, Any]]:
    """All conditions in their fixed order. What `wanted` leaves out stays as it was."""
    before = {str(c.get("type")): c for c in previous}
    return [_merged(kind, before.get(kind), wanted.get(kind), generation, now) for kind in TYPES]


def _merged(
    kind: str, before: Mapping[str, Any] | None, wanted: Condition | None, generation: int, now: datetime
) -> dict[str, Any]:
    final = before is not None and kind in TERMINAL and before.get("status") == "True"
    if before is not None and (final or wanted is None):
        return {**before, "observedGeneration": generation}
    condition = wanted or DEFAULTS[kind]
    same = before is not None and before.get("status") == condition.status
    return {
        "type": kind,
        "status": condition.status,
        "reason": condition.reason,
        "message": condition.message[:MAX_MESSAGE],
        "lastTransitionTime": before["lastTransitionTime"] if before and same else clock.render(now),
        "observedGeneration": generation,
    }
