"""What `reconcile` is given: the job, its last status and one frozen observation of everything else.

Made by the observer (the only place that does I/O), read by `reconcile` and `status`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from posttrain_api import names
from posttrain_api.reasons import Reason
from posttrain_operator import clock
from posttrain_operator.backends import DEFAULT
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

    @property
    def stall_seconds(self) -> int:
        """After how long without an advance the job hangs."""
        return self.policy("stallSeconds") or names.STALL_SECONDS

    @property
    def has_started(self) -> bool:
        """Whether the status tells of a child; there may be one that it does not tell of yet."""
        return "backend" in self.status

    @property
    def stalled_since(self) -> str | None:
        """When the attempt that runs was found to stand still; None: it was not."""
        attempt = self.status.get("attempt") or {}
        current = attempt.get("number") == self.status.get("attempts") and not self.terminal
        return attempt.get("stalledTime") if current else None

    @property
    def checkpoint(self) -> Mapping[str, Any]:
        """The newest checkpoint that is known: reported already, or in the status; empty where there is none."""
        last = (self.status.get("checkpoints") or {}).get("last")
        return self.progress.get("checkpoint") or last or {}

    @property
    def checkpoint_step(self) -> int:
        """Its step; -1 where there is none."""
        return int(self.checkpoint.get("step", -1))

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
    backend: str = DEFAULT
    """Kind of the child that runs the plan."""
    failure: Reason | None = None
    waiting: str | None = None
    message: str = ""
    lineage: tuple[Mapping[str, Any], ...] = ()
    display_name: str = ""
    """Of the starting model, where its URI would not say it: the job that it comes from."""
    parents: str = ""
    """What the plan was made from besides the spec, as text that is kept with the configuration."""


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
    what: str = ""
    """Its kind and name, for a message."""


@dataclass(frozen=True)
class Claimed:
    """A claim that has the name of the one a job makes. `made_for`: name of the job that ours was made for, empty where
    it is not ours; `owner_uid`: None where it is retained."""

    name: str
    uid: str
    made_for: str
    owner_uid: str | None
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
    backend: str = DEFAULT
    """Kind of the job's child: as recorded, else as the spec and the operator's settings say."""
    child: ChildRecord | None = None
    pods: tuple[PodRecord, ...] = ()
    foreign_pods: bool = False
    backend_available: bool = True
    missing: tuple[Missing, ...] = ()
    config: Found | None = None
    obstacle: Found | None = None
    refusal: Refusal | None = None
    claim: Claimed | None = None
    """What has the name of the claim that the job makes, before it starts."""
    unbound: tuple[Missing, ...] = ()
    """Of claims that pods wait for, why they have no volume."""
    notes: tuple[Note, ...] = ()
    unready_nodes: Mapping[str, str | None] = field(default_factory=dict)
    """Of the nodes that were looked at, those that do not answer: since when; None: the node is gone."""
    status_server: StatusServer | None = None
