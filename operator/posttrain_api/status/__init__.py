"""The status of a PostTrainingJob: what its readers may rely on.

The CRD is generated from these models. Everything but `progress` is written by the operator's reconcile (field
manager posttrain-status);
`progress` by the status server alone (posttrain-progress), and reconcile copies its checkpoint, dataReport and
resolved onto the fields
above it. Conditions are the contract, `state` a summary for people.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from posttrain_api.base import Model
from posttrain_api.spec.fields import optional
from posttrain_api.status.parts import (
    Attempt,
    Backend,
    Checkpoints,
    Condition,
    DataReport,
    Failure,
    LineageEntry,
    ModelStatus,
    OutputStatus,
    ResourceUse,
    Restarts,
    State,
    Usage,
)
from posttrain_api.status.progress import Progress
from posttrain_api.status.resolved import ResolvedSpec
from posttrain_api.status.times import RFC3339

__all__ = ["CONDITIONS", "JobStatus"]

CONDITIONS = ("Validated", "Suspended", "Running", "Complete", "Failed", "Finished", "Stalled", "TrainingHealthy")
"""Every condition; all are set on the first visit."""


class JobStatus(Model):
    """What the operator knows about the job."""

    observed_generation: int | None = optional(
        "metadata.generation that this status speaks of", example=1, ge=0, le=2**62
    )
    state: State | None = optional(
        "Summary of the conditions for people; new values may be added, programs read the conditions", example="Running"
    )
    reason: str | None = optional(
        "Why the job is in this state, one word; docs/reasons has a page for each",
        example="Unschedulable",
        max_length=64,
    )
    message: str | None = optional(
        "The same in a sentence, with the next step", example="waits for base-pretrain", max_length=2048
    )
    start_time: RFC3339 | None = optional("When the first pod of the job started", example="2026-01-31T12:00:00Z")
    completion_time: RFC3339 | None = optional("When the job ended, either way", example="2026-01-31T14:00:00Z")
    duration: str | None = optional("Time from start to end; none before the end", example="2h05m10s", max_length=32)
    resolved: ResolvedSpec | None = optional(
        "Effective values under the spec's names; Auto until the trainer has prepared", example={"tuning": "LoRA"}
    )
    resources: ResourceUse | None = optional("What the job asks the cluster for", example={"gpus": 16, "pods": 2})
    attempts: int | None = optional("Attempts so far, the present one included", example=1, ge=0, le=2**31 - 1)
    restarts: Restarts | None = optional("Restarts of the whole gang", example={"total": 1})
    attempt: Attempt | None = optional("The present attempt", example={"number": 1})
    model: ModelStatus | None = optional("The starting model", example={"displayName": "Qwen2.5-1.5B-Instruct"})
    backend: Backend | None = optional(
        "The child that runs the pods; once set the spec is immutable", example={"kind": "PyTorchJob", "name": "my-job"}
    )
    checkpoints: Checkpoints | None = optional("Saved states", example={"count": 2})
    data_report: DataReport | None = optional("What became of the rows", example={"rows": 1000, "used": 998})
    output: OutputStatus | None = optional("The exported model", example={"uri": "pvc://runs/my-job/3f0c/output"})
    failure: Failure | None = optional(
        "The first failure that ended an attempt or the job", example={"reason": "StorageFull"}
    )
    usage: Usage | None = optional("What the job has used", example={"gpuSeconds": 7200})
    lineage: Annotated[tuple[LineageEntry, ...], Field(max_length=64)] | None = optional(
        "Jobs that this one's model comes from, oldest first", example=[{"job": "base-pretrain", "stage": "Pretrain"}]
    )
    conditions: (
        Annotated[
            tuple[Condition, ...], Field(max_length=16, json_schema_extra={"x-kubernetes-list-map-keys": ["type"]})
        ]
        | None
    ) = optional("The contract: " + ", ".join(CONDITIONS), example=[{"type": "Finished", "status": "True"}])
    progress: Progress | None = optional(
        "Latest report of the trainer", example={"display": "46%", "headline": "loss=0.82"}
    )
