"""`status.progress`: the trainer's latest report, written by the status server and by nobody else.

At most every 10 s, at least every 60 s while reports arrive. Its checkpoint, best, dataReport and resolved
are carried here until reconcile has copied them to their official places.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from posttrain_api.base import Model
from posttrain_api.records import MAX_METRICS, MAX_STACKS, MAX_WHERE
from posttrain_api.spec.fields import optional, required
from posttrain_api.status.parts import BIG, DIGEST, BestStatus, CheckpointStatus, DataReport
from posttrain_api.status.times import RFC3339


class Metric(Model):
    """A number the trainer reports, under the name its logs use; a text here, because Kubernetes types hold no
    floats."""

    name: str = required("Name", example="loss", min_length=1, max_length=64)
    value: str = required("Latest value, a number in text", example="0.82", max_length=32)


class Warned(Model):
    """What a guard says of a training that goes on."""

    reason: Literal["GuardWarned", "SamplerMismatch"] = required("Why, one word", example="GuardWarned")
    message: str = required(
        "The rule, the metric and its value", example="entropy was 0.002, below 0.01", min_length=1, max_length=512
    )
    step: int = required("First step in which the rule was broken", unit="steps", example=120, ge=0, le=BIG)


class RankStack(Model):
    """Where a rank stands still."""

    rank: int = required("Rank", example=3, ge=0, le=2**31 - 1)
    where: str = required(
        "Innermost calls of its main thread, or why it cannot tell",
        example="all_reduce (distributed_c10d.py:2825) < _reduce (runtime.py:102)",
        min_length=1,
        max_length=MAX_WHERE,
    )


class ReportedResolution(Model):
    """What the trainer settled where the plan said Auto."""

    zero_stage: int | None = optional("ZeRO stage", example=2, ge=0, le=3)
    warmup_steps: int | None = optional("Steps of warm-up", unit="steps", example=30, ge=0, le=BIG)
    total_steps: int | None = optional("Optimizer steps in all", unit="steps", example=1000, ge=1, le=BIG)
    precision: str | None = optional("Number format of the computation", example="FP32", max_length=16)
    attention: str | None = optional("Attention kernel", example="SDPA", max_length=32)
    revision: str | None = optional("Commit of the model", example="3f1c9a", max_length=DIGEST)
    parameters: int | None = optional("Parameters of the model", example=1543714304, ge=0, le=BIG)
    trainable_parameters: int | None = optional("Of these, trained", example=18464768, ge=0, le=BIG)
    gradient_checkpointing: bool | None = optional("Whether activations are computed twice", example=True)


class Progress(Model):
    """How far the training is."""

    percent: int | None = optional("Share of the steps done", unit="percent", example=46, ge=0, le=100)
    display: str | None = optional("The same for a table", example="46%", max_length=32)
    headline: str | None = optional("The number to watch", example="loss=0.82", max_length=64)
    phase: (
        Literal["Preparing", "Waiting", "Loading", "Training", "Evaluating", "Saving", "Exporting", "Done"] | None
    ) = optional("What the trainer does now", example="Training")
    step: int | None = optional("Optimizer steps done", unit="steps", example=1200, ge=0, le=BIG)
    total_steps: int | None = optional("Optimizer steps in all", unit="steps", example=2600, ge=0, le=BIG)
    epoch: float | None = optional("Passes over the data so far", example=1.38, ge=0)
    eta_seconds: int | None = optional("Time left, estimated", unit="seconds", example=6720, ge=0, le=BIG)
    slowest_rank: int | None = optional("Rank that the others wait for", example=3, ge=0, le=2**31 - 1)
    metrics: (
        Annotated[
            tuple[Metric, ...],
            Field(max_length=MAX_METRICS, json_schema_extra={"x-kubernetes-list-map-keys": ["name"]}),
        ]
        | None
    ) = optional("Latest values", example=[{"name": "loss", "value": "0.82"}])
    last_update_time: RFC3339 | None = optional("When the last report came", example="2026-01-31T13:00:00Z")
    last_advance_time: RFC3339 | None = optional(
        "When the training loop last got on; a hang is judged on it", example="2026-01-31T13:00:00Z"
    )
    warning: Warned | None = optional(
        "What is wrong with the training; TrainingHealthy is False then", example={"reason": "GuardWarned", "step": 120}
    )
    stacks: (
        Annotated[
            tuple[RankStack, ...],
            Field(max_length=MAX_STACKS, json_schema_extra={"x-kubernetes-list-map-keys": ["rank"]}),
        ]
        | None
    ) = optional(
        "Where ranks stand while the job stands still; gone once it gets on or is restarted",
        example=[{"rank": 3, "where": "all_reduce (distributed_c10d.py:2825)"}],
    )
    checkpoint: CheckpointStatus | None = optional("Newest checkpoint that was reported", example={"step": 1000})
    best: BestStatus | None = optional(
        "Best evaluation that was reported", example={"step": 800, "metric": "eval_loss", "value": 0.82}
    )
    data_report: DataReport | None = optional(
        "What became of the rows, as reported", example={"rows": 1000, "used": 998}
    )
    resolved: ReportedResolution | None = optional("What the trainer settled", example={"zeroStage": 2})
