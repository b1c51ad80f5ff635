"""What `reconcile` wants done. Executed in this order: create, patch, delete, then the status, then events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Object(StrEnum):
    """The kinds that reconcile may touch."""

    PYTORCHJOB = "PyTorchJob"
    TRAINJOB = "TrainJob"
    TRAINING_RUNTIME = "TrainingRuntime"
    POD = "Pod"
    CONFIG_MAP = "ConfigMap"
    CLAIM = "PersistentVolumeClaim"

    @property
    def is_child(self) -> bool:
        """Whether it is what a backend runs a job as."""
        return self in (Object.PYTORCHJOB, Object.TRAINJOB)


@dataclass(frozen=True)
class Create:
    """POST one object. `name` is also in the body. `upsert`: apply it instead, it is ours and may change."""

    kind: Object
    name: str
    body: Mapping[str, Any]
    upsert: bool = False


@dataclass(frozen=True)
class Patch:
    """Merge patch; the body carries the resourceVersion."""

    kind: Object
    name: str
    body: Mapping[str, Any]


@dataclass(frozen=True)
class Delete:
    """Delete the object of this uid only (None: whichever has the name)."""

    kind: Object
    name: str
    uid: str | None = None
    grace_seconds: int | None = None


@dataclass(frozen=True)
class Event:
    """One event about the job, recorded after the status write succeeded."""

    kind: str
    """`Normal` or `Warning`."""
    reason: str
    message: str


@dataclass(frozen=True)
class Actions:
    """One pass. `status` None: nothing to write. `requeue_after` seconds; 0 at once, None when something changes."""

    create: tuple[Create, ...] = ()
    patch: tuple[Patch, ...] = ()
    delete: tuple[Delete, ...] = ()
    status: Mapping[str, Any] | None = None
    events: tuple[Event, ...] = ()
    requeue_after: float | None = None
    attempt_uids: frozenset[str] | None = None
    """The recorded attempt after this pass: remembered ends of other pods may be forgotten. None: keep them all."""

    @property
    def nothing(self) -> bool:
        """Whether nothing at all is written."""
        return not (self.create or self.patch or self.delete or self.status is not None or self.events)
