"""The kinds of child that can run a job: one module each, behind one protocol. Pure: no cluster, no clock.

The rest of the operator makes, watches and reads children through `Backend` and decides nothing by their kind. What
all of them keep, whatever the kind: a child has the job's name and is owned by it; its pods carry our labels and run
one launcher each; a pod's end with a code of 1–127 ends the child, any other failure makes its controller start pods
again. So a gang restart is the same everywhere: the pods of the attempt are deleted, and the next complete set of
others is adopted. After creation a child is touched only to suspend and to resume it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from posttrain_operator.backends import pytorchjob, trainjob
from posttrain_operator.backends.pod import StatusEndpoint
from posttrain_operator.plan.types import Plan
from posttrain_operator.records import ChildRecord, Seat

DEFAULT = pytorchjob.KIND


class Backend(Protocol):
    """What is asked of a kind of child. Objects are whole Kubernetes objects, and may be strange."""

    API_VERSION: str
    KIND: str
    INSTALL: str
    """What a cluster without the kind lacks."""
    AWAITS_FIRST: bool
    """Whether its controller makes the other pods wait for the first one in an init container, which gives up after a
    while: then it makes that pod again."""

    def build(self, plan: Plan, status: StatusEndpoint | None) -> dict[str, Any]:
        """The child. `status` None: the pods report nowhere."""

    def before(self, plan: Plan, status: StatusEndpoint | None) -> tuple[dict[str, Any], ...]:
        """What has to exist before the child: owned by the job, its name says its content."""

    def left(self, job: str, spec_hash: str) -> tuple[tuple[str, str], ...]:
        """(kind, name) of what `before` made for the child of this hash: it goes with the child."""

    def refusal(self, plan: Plan) -> str | None:
        """Why this plan can never run as this kind; None where it can."""

    def suspension(self, resource_version: str, suspend: bool) -> dict[str, Any]:
        """The only patch a child ever gets; refused where somebody else changed it meanwhile."""

    def suspended(self, child: Mapping[str, Any]) -> bool:
        """Whether the child is told to have no pods."""

    def condition(self, kind: str) -> str:
        """What the child's condition is called here: `Succeeded` and `Failed` are the ends of every kind."""

    def seat(self, pod: Mapping[str, Any], job: str) -> Seat | None:
        """Which of the job's pods this is; None where another kind of child made it."""

    def told_by(self, child: ChildRecord) -> tuple[str, ...]:
        """Field selectors of the Events that say why the child's pods are not made."""

    def unmade(self, reason: str) -> bool:
        """Whether an Event of this reason says that."""

    def unseen(self, message: str) -> bool:
        """Whether a refusal means only that what `before` made a moment ago is not known yet."""


BACKENDS: Mapping[str, Backend] = {backend.KIND: backend for backend in (pytorchjob, trainjob)}
"""By kind."""


def backend(kind: str | None) -> Backend:
    """The backend of a kind; the default one for a kind that a newer operator may have recorded."""
    return BACKENDS.get(kind or DEFAULT) or BACKENDS[DEFAULT]
