"""The parts of the status that reconcile owns, each a small record. See the package for who writes what."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from posttrain_api.base import Model
from posttrain_api.records import MAX_LOG_TAIL_BYTES
from posttrain_api.spec.fields import optional, required
from posttrain_api.status.times import RFC3339

BIG = 2**62
URI = 1024
DIGEST = 80
State = Literal["Pending", "Initializing", "Running", "Suspended", "Restarting", "Succeeded", "Failed"]
Counts = Annotated[dict[Annotated[str, Field(max_length=64)], int], Field(max_length=32)]


class ResourceUse(Model):
    """What the job asks for, over all pods."""

    gpus: int | None = optional("GPUs of all pods together", example=16, ge=0, le=2**31 - 1)
    pods: int | None = optional("Pods", example=2, ge=0, le=2**31 - 1)


class Restarts(Model):
    """Gang restarts: all pods deleted and made anew."""

    total: int | None = optional("All restarts that used up the budget", example=1, ge=0, le=2**31 - 1)
    by_cause: Counts | None = optional("Restarts by their reason", example={"PeerLost": 1})
    since_checkpoint: Counts | None = optional(
        "What the budgets of runPolicy.restarts were charged with since the checkpoint of checkpointStep; they are "
        "whole again after a later one",
        example={"hang": 1},
    )
    checkpoint_step: int | None = optional(
        "Step of the last checkpoint when the last restart was counted; none where there was no checkpoint",
        example=1000,
        ge=0,
        le=BIG,
    )
    pause_seconds: int | None = optional(
        "Pause before the next attempt, because the last one ended before it trained; it doubles each time",
        unit="seconds",
        example=20,
        ge=0,
        le=2**31 - 1,
    )
    not_before: RFC3339 | None = optional("When that pause ends", example="2026-01-31T12:00:20Z")
    pause_reason: str | None = optional(
        "Why, where it is another reason than a failure: Unschedulable", example="Unschedulable", max_length=64
    )


class Attempt(Model):
    """A set of pods that train together."""

    number: int | None = optional("1 for the first", example=1, ge=1, le=2**31 - 1)
    start_time: RFC3339 | None = optional("When its pods were first seen", example="2026-01-31T12:00:00Z")
    end_time: RFC3339 | None = optional(
        "When it was given up; its pods go, and their successors are the next attempt", example="2026-01-31T13:00:00Z"
    )
    pod_uids: Annotated[tuple[Annotated[str, Field(max_length=64)], ...], Field(max_length=4096)] | None = optional(
        "Uids of its pods", example=["0a4e7f52-6a0f-4b6b-8f6e-1f4c2d9d3b11"], alias="podUIDs"
    )
    stalled_time: RFC3339 | None = optional(
        "When it was found to stand still; since then its stacks are asked for", example="2026-01-31T12:30:00Z"
    )


class ModelStatus(Model):
    """The starting model, for people and for reproducing."""

    display_name: str | None = optional("Short name", example="Qwen2.5-1.5B-Instruct", max_length=253)
    resolved_revision: str | None = optional(
        "Commit that the revision meant when it was fetched", example="3f1c9a", max_length=DIGEST
    )


class Backend(Model):
    """The child object."""

    api_version: str | None = optional("Its apiVersion", example="kubeflow.org/v1", max_length=128)
    kind: str | None = optional("Its kind", example="PyTorchJob", max_length=64)
    name: str | None = optional("Its name", example="my-job", max_length=253)
    uid: str | None = optional("Its uid", example="0a4e7f52-6a0f-4b6b-8f6e-1f4c2d9d3b11", max_length=64)


class CheckpointStatus(Model):
    """A committed checkpoint."""

    step: int | None = optional("Step after which it was taken", example=1000, ge=0, le=BIG)
    time: RFC3339 | None = optional(
        "When it was committed; with checkpoint.staging, when it was whole on the node", example="2026-01-31T13:00:00Z"
    )
    uri: str | None = optional("Its folder", example="pvc://runs/my-job/3f0c/checkpoints/step-1000", max_length=URI)
    size_bytes: int | None = optional("Its size", unit="bytes", example=123456789, ge=0, le=BIG)
    digest: str | None = optional("Digest of its manifest", example="sha256:9f2c", max_length=DIGEST)
    save_seconds: float | None = optional(
        "How long it took to save; twice that (with checkpoint.staging three times) must fit into "
        "runPolicy.terminationGracePeriodSeconds",
        unit="seconds",
        example=42.5,
        ge=0,
    )
    refused: str | None = optional(
        "Why newer ones were not resumed from, where an attempt has fallen back to this one",
        example="/storage/my-job/3f0c/checkpoints/step-2000/trainer.json: missing, the manifest says 412 bytes",
        max_length=1024,
    )


class BestStatus(Model):
    """The best evaluation so far."""

    step: int | None = optional("Step after which it was evaluated", example=800, ge=0, le=BIG)
    metric: str | None = optional("Name of the metric", example="eval_loss", max_length=64)
    value: float | None = optional("Its value there", example=0.82)
    uri: str | None = optional("Folder of that model", example="pvc://runs/my-job/3f0c/best", max_length=URI)


class Checkpoints(Model):
    """Saved states."""

    last: CheckpointStatus | None = optional("The newest", example={"step": 1000})
    best: BestStatus | None = optional(
        "The best evaluation, with evaluation.keepBest", example={"step": 800, "metric": "eval_loss", "value": 0.82}
    )
    count: int | None = optional("Checkpoints committed so far", example=2, ge=0, le=BIG)


class DataReport(Model):
    """What became of the rows."""

    rows: int | None = optional("Rows read", unit="rows", example=7473, ge=0, le=BIG)
    used: int | None = optional("Rows trained on", unit="rows", example=7470, ge=0, le=BIG)
    refused_by_reason: Counts | None = optional("Rows left out, by reason", example={"tooLong": 3})
    tokens: int | None = optional("Tokens of the training set", unit="tokens", example=1200000, ge=0, le=BIG)
    counted_tokens: int | None = optional("Tokens that are learned", unit="tokens", example=800000, ge=0, le=BIG)


class OutputStatus(Model):
    """The exported model."""

    uri: str | None = optional("Its folder", example="pvc://runs/my-job/3f0c/output", max_length=URI)
    digest: str | None = optional("Digest over its files", example="sha256:9f2c", max_length=DIGEST)
    format: Literal["safetensors", "peft"] | None = optional(
        "safetensors: a whole model; peft: an adapter", example="peft"
    )
    size_bytes: int | None = optional("Its size", unit="bytes", example=123456789, ge=0, le=BIG)


class Failure(Model):
    """What went wrong, from the pod that failed first."""

    reason: str | None = optional("One word; docs/reasons has a page for each", example="StorageFull", max_length=64)
    message: str | None = optional(
        "What happened and the next step", example="no space left on pvc://runs", max_length=2048
    )
    replica: str | None = optional("Pod's role and number", example="worker-0", max_length=253)
    rank: int | None = optional("Rank that failed first", example=3, ge=0, le=2**31 - 1)
    node: str | None = optional("Node the pod ran on", example="gpu-node-7", max_length=253)
    exit_code: int | None = optional("Exit code of the container", example=51, ge=0, le=255)
    signal: int | None = optional("Signal that ended the process", example=9, ge=0, le=128)
    step: int | None = optional("Step it happened in", example=1200, ge=0, le=BIG)
    log_tail: str | None = optional("End of the log", example="OSError: [Errno 28]", max_length=MAX_LOG_TAIL_BYTES)


class Usage(Model):
    """What the job has used, over all attempts."""

    gpu_seconds: int | None = optional(
        "GPUs times the seconds they were held", unit="GPU-seconds", example=7200, ge=0, le=BIG
    )
    gpu_seconds_lost: int | None = optional(
        "Of these, work that a restart had to repeat", unit="GPU-seconds", example=300, ge=0, le=BIG
    )
    active_seconds: int | None = optional(
        "Time with pods admitted, of the attempts that have ended; runPolicy.activeDeadlineSeconds is judged on it",
        unit="seconds",
        example=3600,
        ge=0,
        le=BIG,
    )


class LineageEntry(Model):
    """An ancestor of the model."""

    job: str | None = optional("Name of the job", example="base-pretrain", max_length=253)
    uid: str | None = optional("Its uid", example="0a4e7f52-6a0f-4b6b-8f6e-1f4c2d9d3b11", max_length=64)
    stage: str | None = optional("Its stage", example="Pretrain", max_length=32)
    output_digest: str | None = optional(
        "Digest of its output when it was taken", example="sha256:9f2c", max_length=DIGEST
    )


class Condition(Model):
    """One condition, as everywhere in Kubernetes."""

    type: str = required("Which condition", example="Finished", min_length=1, max_length=64)
    status: Literal["True", "False", "Unknown"] = required("Whether it holds", example="True")
    observed_generation: int | None = optional("metadata.generation it was judged on", example=1, ge=0, le=BIG)
    last_transition_time: RFC3339 = required("When status changed last", example="2026-01-31T12:00:00Z")
    reason: str = required(
        "Why, one word",
        example="Succeeded",
        min_length=1,
        max_length=64,
        pattern=r"^[A-Za-z]([A-Za-z0-9_]*[A-Za-z0-9_])?$",
    )
    message: str = required(
        "The same in a sentence", example="exported to pvc://runs/my-job/3f0c/output", max_length=2048
    )
