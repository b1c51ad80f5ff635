"""What `reconcile` is given: the job, its last status and one frozen observation of everything else.

Made by the observer (the only place that does I/O), read by `reconcile` and `status`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from posttrain_api.reasons import Reason
from posttrain_operator import clock
from posttrain_operator.backends.pod import StatusEndpoint
from posttrain_operator.plan.types import Plan
from posttrain_operator.records import ChildRecord, JobRecord, Key, PodRecord
from posttrain_operator.settings import Timing


@dataclass(frozen=True)
class JobFacts:
    """The job as reconcile sees it. `status` is the last one written, without `progress`, which another manager owns.

    The spec is read raw: once a job runs, a newer operator's stricter rules must not stop it.
    """

    key: Key
    uid: str
    generation: int
    deleting: bool
    created: str | None
    spec: Mapping[str, Any]
    status: Mapping[str, Any]
    progress: Mapping[str, Any]

    @classmethod
    def of(cls, record: JobRecord) -> JobFacts:
        manifest = record.manifest()
        status = dict(manifest["status"])
        progress = status.pop("progress", None) or {}
        created = manifest["metadata"].get("creationTimestamp")
        return cls(
            record.key, record.uid, record.generation, record.deleting, created, manifest["spec"], status, progress
        )

    @property
    def suspend(self) -> bool:
        return bool(self.spec.get("suspend"))

    def policy(self, field_name: str) -> int | None:
        """A number of runPolicy; None where it is not set."""
        value = (self.spec.get("runPolicy") or {}).get(field_name)
        return value if isinstance(value, int) else None

    def condition(self, kind: str) -> Mapping[str, Any]:
        """The last condition of a type; empty where there is none."""
        conditions = self.status.get("conditions") or ()
        return next((c for c in conditions if c.get("type") == kind), {})

    def holds(self, kind: str) -> bool:
        return self.condition(kind).get("status") == "True"

    @property
    def terminal(self) -> bool:
        return self.holds("Complete") or self.holds("Failed")

    def since(self, kind: str, now: datetime) -> float:
        """Seconds since the condition last flipped; 0 where it never was written."""
        return clock.seconds_since(self.condition(kind).get("lastTransitionTime"), now) or 0.0


@dataclass(frozen=True)
class Intent:
    """What the spec asks for: exactly one of `plan`, `failure` and `waiting`."""

    plan: Plan | None = None
    failure: Reason | None = None
    waiting: str | None = None
    message: str = ""
    lineage: tuple[Mapping[str, Any], ...] = ()
    display_name: str = ""
    """Of the starting model, where its URI would not say it: the job that it comes from."""


@dataclass(frozen=True)
class Missing:
    """An object that the pods need and that is not there."""

    reason: Reason
    message: str


@dataclass(frozen=True)
class Found:
    """An object that already has the name of one of ours."""

    uid: str
    owner_uid: str | None
    spec_hash: str = ""
    deleting: bool = False


@dataclass(frozen=True)
class Refusal:
    """The API server's answer to our last try to create the child or its configuration; `kind`: which of the two."""

    status: int
    message: str
    kind: str = "PyTorchJob"


@dataclass(frozen=True)
class Note:
    """A warning Event about the child or a pod. `time`: when it was last seen."""

    about: str
    reason: str
    message: str
    time: str | None = None


@dataclass(frozen=True)
class StatusServer:
    """Where to report, the CA bundle (None: the server is not up yet), and the bundle that the job's ConfigMap has."""

    endpoint: StatusEndpoint
    bundle: str | None
    published: str | None = None

    @property
    def unpublished(self) -> str | None:
        """The bundle that has to be written to the job's ConfigMap."""
        return self.bundle if self.bundle and self.bundle != self.published else None


@dataclass(frozen=True)
class Observation:
    """Everything but the job. `foreign_pods`: pods of an earlier job of this name are still there."""

    intent: Intent
    timing: Timing
    child: ChildRecord | None = None
    pods: tuple[PodRecord, ...] = ()
    foreign_pods: bool = False
    backend_available: bool = True
    missing: tuple[Missing, ...] = ()
    config: Found | None = None
    obstacle: Found | None = None
    refusal: Refusal | None = None
    notes: tuple[Note, ...] = ()
    lost_nodes: frozenset[str] = field(default_factory=frozenset)
    status_server: StatusServer | None = None
