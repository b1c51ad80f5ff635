"""Models of earlier jobs: where a parent's model is, and, where that is an adapter, what it has to be laid on. Pure.

An adapter alone is no model. Each job says in `status.resolved.model` what it started from: `uri` (with `revision`)
is the whole model at the root of the chain, `adapters` the adapters of earlier jobs on it, oldest first. So one
parent's status tells the whole chain, though the jobs further back may be gone. Called by `model` for the starting
model and for the reference; it never looks at a claim.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from posttrain_api.reasons import Reason
from posttrain_api.records import Output
from posttrain_api.spec.references import JobRef, ModelJobRef, ObjectRef
from posttrain_operator.plan.context import Context
from posttrain_operator.plan.errors import PlanError, refuse
from posttrain_operator.plan.sources import Location, locate
from posttrain_operator.plan.types import Parent

Kind = Literal["answers", "scores", "either"]
"""What a model has to do where it is named."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class ModelPlace:
    """A whole model and the adapters that are merged into it, oldest first."""

    base: Location
    adapters: tuple[Location, ...] = ()
    base_secret: str | None = None
    """Secret of the base, which its first job named."""
    shape: Mapping[str, Any] = field(default_factory=dict)
    """status.resolved.lora of the job that trained the last adapter."""

    @property
    def places(self) -> tuple[Location, ...]:
        """Everything that has to be mounted."""
        return (self.base, *self.adapters)


def parent_of(context: Context, reference: JobRef, path: str) -> Parent:
    """The finished parent. PlanError(WaitingForDependency) where the caller gave none: waiting is the operator's
    business."""
    parent = context.parents.get(reference.name)
    if parent is None:
        raise refuse(
            f"{path}.name",
            "names a job that has not succeeded yet",
            reference.name,
            "wait for it, or name another job",
            Reason.WAITING_FOR_DEPENDENCY,
        )
    return parent


def trained(context: Context, reference: ModelJobRef, path: str, kind: Kind) -> ModelPlace:
    """The model that the parent has trained, its output or its best; with the chain below it where it is an adapter."""
    parent = parent_of(context, reference, path)
    _check_kind(parent, kind, path)
    uri = _uri(parent, reference, path)
    if not uri.startswith("pvc://"):
        raise _unsupported(f"{path}.name", "names a job whose output is on no claim", uri)
    model = locate(uri, None, context.settings, f"{path}.name")
    return _laid_on(context, parent, model, path) if _output(parent).format == "peft" else ModelPlace(model)


def _output(parent: Parent) -> Output:
    assert parent.output is not None  # of one that has failed nothing but its checkpoint is taken
    return parent.output


def _check_kind(parent: Parent, kind: Kind, path: str) -> None:
    """The empty stage of a job that nobody has seen is any."""
    if kind == "answers" and parent.stage == "RewardModel":
        raise _unsupported(f"{path}.name", "names a reward model, which scores and cannot answer", parent.name)
    if kind == "scores" and parent.stage not in ("RewardModel", ""):
        rule = f"names a job of stage {parent.stage}, whose model answers and cannot score"
        raise _unsupported(f"{path}.name", rule, parent.name)


def _unsupported(path: str, rule: str, value: object) -> PlanError:
    return refuse(path, rule, value, "name another job, or give the model's location as uri", Reason.UNSUPPORTED)


def _uri(parent: Parent, reference: ModelJobRef, path: str) -> str:
    if reference.checkpoint != "Best":
        return _output(parent).uri
    if parent.best is None:
        raise refuse(
            f"{path}.checkpoint",
            f"asks for the best model of {parent.name}, which kept none",
            "Best",
            "write Output, or run that job again under another name with evaluation: {everySteps: …, keepBest: true}"
            " and name that one",
            Reason.DEPENDENCY_FAILED,
        )
    return parent.best.uri


def _laid_on(context: Context, parent: Parent, adapter: Location, path: str) -> ModelPlace:
    model = parent.resolved.get("model") or {}
    shape = parent.resolved.get("lora") or {}
    if not model.get("uri"):
        raise refuse(
            f"{path}.name",
            "names a job whose output is an adapter and whose status does not say of which model",
            parent.name,
            "run that job again under another name, or with output: {mergeAdapter: true}, and name that one",
            Reason.DEPENDENCY_FAILED,
        )
    secret = (model.get("secretRef") or {}).get("name")
    base = locate(_pinned(model), ObjectRef(name=secret) if secret else None, context.settings, f"{path}.name")
    earlier = [str(uri) for uri in model.get("adapters") or ()]
    if shape.get("continueAdapter"):  # its output is the last of them, trained further
        earlier = earlier[:-1]
    below = tuple(locate(uri, None, context.settings, f"{path}.name") for uri in earlier)
    return ModelPlace(base, (*below, adapter), secret, shape)


def _pinned(model: Mapping[str, Any]) -> str:
    """The base's URI at the commit that the parent was trained on."""
    uri, revision = str(model["uri"]), str(model.get("revision") or "")
    if uri.startswith("hf://") and _COMMIT.fullmatch(revision):
        return f"{uri.partition('@')[0]}@{revision}"
    return uri
