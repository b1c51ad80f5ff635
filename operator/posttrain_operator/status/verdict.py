"""Verdicts: what a pass found out about a job, in the words of the API. Each constructor sets the conditions that
belong together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from posttrain_api.reasons import Reason
from posttrain_operator.actions import Create, Delete, Event, Patch
from posttrain_operator.status.conditions import DEFAULTS, Condition

HEALTHY = Condition("True", "Training")
ACCEPTED = Condition("True", "Accepted", "the spec is accepted and its references are resolved")


@dataclass(frozen=True)
class Verdict:
    """State, reason and message of the status, its conditions, other fields that change (None removes one), and the
    writes."""

    state: str
    reason: str
    message: str
    conditions: Mapping[str, Condition] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    create: tuple[Create, ...] = ()
    patch: tuple[Patch, ...] = ()
    delete: tuple[Delete, ...] = ()
    events: tuple[Event, ...] = ()
    requeue_after: float | None = None
    silent: bool = False
    """Write no status in this pass: the next one, at once, says more."""

    def having(self, **changes: Any) -> Verdict:
        """With more status fields changed."""
        return replace(self, changes={**self.changes, **changes})

    def doing(
        self, create: tuple[Create, ...] = (), patch: tuple[Patch, ...] = (), delete: tuple[Delete, ...] = ()
    ) -> Verdict:
        """With more writes."""
        return replace(self, create=self.create + create, patch=self.patch + patch, delete=self.delete + delete)

    def telling(self, event: Event) -> Verdict:
        """With one more event."""
        return replace(self, events=(*self.events, event))

    def after(self, seconds: float | None) -> Verdict:
        """Looked at again no later than this."""
        if seconds is None or (self.requeue_after is not None and self.requeue_after <= seconds):
            return self
        return replace(self, requeue_after=max(0.0, seconds))


def _open(reason: str, message: str) -> dict[str, Condition]:
    """Conditions of a job that neither runs nor is finished."""
    return {**DEFAULTS, "Validated": ACCEPTED, "Running": Condition("False", reason, message)}


def starting(state: str, reason: str, message: str) -> Verdict:
    """On its way: Pending, Initializing or Restarting."""
    return Verdict(state, reason, message, _open(reason, message))


def running(message: str, healthy: Condition = HEALTHY) -> Verdict:
    """Every pod is ready and the loop has started. healthy: TrainingHealthy."""
    conditions = {
        **_open("", ""),
        "Running": Condition("True", "Training", message),
        "TrainingHealthy": healthy,
    }
    return Verdict("Running", "Training", message, conditions)


def suspended(reason: Reason, message: str) -> Verdict:
    """No pods on purpose. A job that waits for another is Pending to its reader: it never had any."""
    waits = reason is Reason.WAITING_FOR_DEPENDENCY
    unknown = Condition("Unknown", reason, message)
    conditions = {
        **_open(reason, message),
        "Validated": unknown if waits else ACCEPTED,
        "Suspended": Condition("True", reason, message),
    }
    return Verdict("Pending" if waits else "Suspended", reason, message, conditions)


def stalled(reason: Reason, message: str) -> Verdict:
    """Waits for a person or a missing object."""
    conditions = {**_open(reason, message), "Stalled": Condition("True", reason, message)}
    return Verdict("Pending", reason, message, conditions)


def _finished(reason: str, message: str) -> dict[str, Condition]:
    return {
        "Suspended": Condition("False", "Finished"),
        "Running": Condition("False", "Finished"),
        "Finished": Condition("True", reason, message),
        "Stalled": Condition("False", "Finished"),
    }


def failed(reason: Reason, message: str) -> Verdict:
    """The end. A spec that was refused is also not validated."""
    refused = reason in (Reason.INVALID_SPEC, Reason.UNSUPPORTED, Reason.DEPENDENCY_CYCLE)
    conditions = {
        **_finished(reason, message),
        "Failed": Condition("True", reason, message),
        "Complete": Condition("False", reason),
        "TrainingHealthy": Condition("Unknown", "NotRunning"),
    }
    if refused:
        conditions["Validated"] = Condition("False", reason, message)
    return Verdict("Failed", reason, message, conditions)


def succeeded(message: str) -> Verdict:
    conditions = {
        **_finished("Succeeded", message),
        "Validated": ACCEPTED,
        "Complete": Condition("True", "Succeeded", message),
        "Failed": Condition("False", "Succeeded"),
        "TrainingHealthy": Condition("True", "Succeeded"),
    }
    return Verdict("Succeeded", "Succeeded", message, conditions)
