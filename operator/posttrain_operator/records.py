"""Slim records of what is watched: the few fields that decisions are made from.

Made by `slim` from whole objects, kept by `cache`, read by `reconcile`. Whole bodies are never kept: ten thousand of
them would not fit in memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, NamedTuple


class Key(NamedTuple):
    """A job by namespace and name; its children have the same."""

    namespace: str
    name: str


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A PostTrainingJob. `raw`: JSON of its slim manifest; `parents`: the jobs that `fromJob` names."""

    key: Key
    uid: str
    resource_version: str
    generation: int
    deleting: bool
    parents: tuple[str, ...]
    raw: bytes

    def manifest(self) -> dict[str, Any]:
        """metadata, spec and status as plain JSON types."""
        parsed: dict[str, Any] = json.loads(self.raw)
        return parsed


@dataclass(frozen=True, slots=True)
class ConditionRecord:
    """One condition of a child. `since`: lastTransitionTime as written."""

    status: str
    reason: str = ""
    message: str = ""
    since: str | None = None


@dataclass(frozen=True, slots=True)
class Seat:
    """Which of its job's pods a pod is. `owned`: the job's child controls it. `ends_peers`: the child's controller
    deletes the others where one fails."""

    role: str
    index: int
    owned: bool
    ends_peers: bool = False


@dataclass(frozen=True, slots=True)
class ChildRecord:
    """A job's child of some backend's kind. `owner_uid`: the controller's uid; `conditions` by the backends' common
    names (Succeeded, Failed)."""

    key: Key
    uid: str
    resource_version: str
    owner_uid: str | None
    spec_hash: str
    suspended: bool
    deleting: bool
    created: str | None
    conditions: Mapping[str, ConditionRecord] = field(default_factory=dict)
    kind: str = "PyTorchJob"

    def holds(self, condition: str) -> bool:
        """Whether the condition is True."""
        found = self.conditions.get(condition)
        return found is not None and found.status == "True"


@dataclass(frozen=True, slots=True)
class End:
    """How the trainer's container ended. `exit_code` None: no container of ours ended (eviction, init failure)."""

    exit_code: int | None = None
    signal: int | None = None
    reason: str = ""
    """The container's (OOMKilled, Error, …)."""
    message: str = ""
    finished_at: str | None = None
    initial: bool = False
    """Whether an init container failed: ours never began."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A container that cannot start: Kubernetes' reason and message."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class PodRecord:
    """A pod of a job. `gone`: deleted; then this is the last that was seen of it."""

    job: Key
    job_uid: str
    name: str
    uid: str
    resource_version: str
    role: str
    """`Master` or `Worker`."""
    index: int
    phase: str
    created: str | None
    node: str | None = None
    deleting_since: str | None = None
    grace: int | None = None
    ready: bool = False
    ready_since: str | None = None
    unschedulable: str | None = None
    waiting: Waiting | None = None
    end: End | None = None
    pod_reason: str = ""
    pod_message: str = ""
    disruption: str = ""
    """Reason of the DisruptionTarget condition."""
    mounted: bool = False
    """Whether its volumes are there: the kubelet makes the sandbox after them (PodReadyToStartContainers)."""
    asked: bool = False
    """Whether it was told to end before it ended: deleted with a grace (a drain, a suspension), by whomever."""
    asked_at: datetime | None = None
    """When, where the child's controller deletes the peers of a failed pod itself; None: it never does."""
    owned: bool = False
    """Whether the job's child controls it. A pod that only wears the labels is none of the job's."""
    gone: bool = False

    @property
    def ended(self) -> bool:
        """Whether it will never run again."""
        return self.gone or self.phase in ("Succeeded", "Failed")

    def as_gone(self) -> PodRecord:
        return replace(self, gone=True)
