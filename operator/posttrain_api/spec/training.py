"""How the model is changed: adapter, optimizer, schedule, ZeRO, evaluation, checkpoints, output."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from posttrain_api.spec.fields import SpecModel, optional
from posttrain_api.spec.references import MAX_URI, JobRef

MAX_STEPS = 1_000_000_000
Beta = Annotated[float, Field(ge=0, lt=1)]
ModuleName = Annotated[str, Field(min_length=1, max_length=128)]


def _no_truth(value: object) -> object:
    if isinstance(value, bool):  # to Python, true is 1
        raise ValueError("must be one of Auto, 0, 1, 2, 3")
    return value


ZeroStage = Annotated[
    Literal["Auto", 0, 1, 2, 3],
    BeforeValidator(_no_truth),
    WithJsonSchema({"x-kubernetes-int-or-string": True, "enum": ["Auto", 0, 1, 2, 3]}),
]


class Lora(SpecModel):
    """Low-rank adapters: h = (W + (alpha/rank) B A) x; only A and B are trained. The block alone means tuning LoRA."""

    rank: int | None = optional("Rank r of the adapters", default="16", example=16, ge=1, le=512)
    alpha: float | None = optional(
        "Scale alpha; the update is multiplied by alpha / rank", default="2 x rank", example=32, gt=0, le=65536
    )
    dropout: float | None = optional("Dropout before A", unit="probability", default="0", example=0.05, ge=0, lt=1)
    target_modules: Annotated[tuple[ModuleName, ...], Field(min_length=1, max_length=64)] | None = optional(
        "Names of the layers that get an adapter; all-linear: every linear layer but the head",
        default="[all-linear]",
        example=["q_proj", "v_proj"],
    )


class Training(SpecModel):
    """One optimizer step takes batchSize sequences of the whole job, whatever nodes, ranks and micro-batches."""

    epochs: float | None = optional(
        "Passes over the training data; epochs or maxSteps", default="1", example=3, gt=0, le=100000
    )
    max_steps: int | None = optional(
        "Optimizer steps; epochs or maxSteps", unit="steps", default="from epochs", example=500, ge=1, le=MAX_STEPS
    )
    batch_size: int | None = optional(
        "Sequences per optimizer step of the whole job", unit="sequences", default="64", example=128, ge=1, le=1048576
    )
    tokens_per_micro_batch: int | None = optional(
        "Tokens one rank works on at once; changes memory and speed, never the result",
        unit="tokens",
        default="8192",
        example=16384,
        ge=8,
        le=16777216,
    )
    learning_rate: float | None = optional(
        "Highest learning rate of AdamW",
        default="SFT 2e-4 with LoRA, 1e-5 full; Pretrain 3e-4",
        example=1e-4,
        gt=0,
        le=10,
    )
    schedule: Literal["Cosine", "Linear", "Constant"] | None = optional(
        "Course of the learning rate after warm-up", default="Cosine", example="Linear"
    )
    warmup_steps: int | None = optional(
        "Steps of linear warm-up",
        unit="steps",
        default="3 % of all steps; 0 for Constant",
        example=100,
        ge=0,
        le=MAX_STEPS,
    )
    min_learning_rate_ratio: float | None = optional(
        "The schedule ends at this share of learningRate", default="0", example=0.1, ge=0, le=1
    )
    weight_decay: float | None = optional(
        "Decoupled weight decay of AdamW (matrices only)",
        default="Pretrain 0.1; SFT 0.01 full, 0 with LoRA",
        example=0.1,
        ge=0,
        le=10,
    )
    betas: Annotated[tuple[Beta, ...], Field(min_length=2, max_length=2)] | None = optional(
        "Decay rates of AdamW's two moments, each at least 0 and less than 1",
        default="[0.9, 0.999]; Pretrain [0.9, 0.95]",
        example=[0.9, 0.95],
    )
    epsilon: float | None = optional("Epsilon of AdamW", default="1e-8", example=1e-6, gt=0, le=1)
    max_grad_norm: float | None = optional(
        "The gradient is clipped to this norm; 0 switches clipping off", default="1.0", example=0.5, ge=0, le=1e6
    )
    seed: int | None = optional(
        "Seed of shuffling, dropout and new weights", default="0", example=42, ge=0, le=2**31 - 1
    )
    precision: Literal["FP32"] | None = optional("Number format of the computation", default="FP32", example="FP32")


class DeepSpeed(SpecModel):
    """What is said to DeepSpeed; everything else follows from the job."""

    zero_stage: ZeroStage | None = optional(
        "What ZeRO shards over the ranks: 0 nothing, 1 optimizer state, 2 also gradients, 3 also "
        "weights. Auto decides by the model's "
        "size; the choice stands in status.resolved",
        default="Auto",
        example=2,
    )


class Evaluation(SpecModel):
    """When the evaluation loss over data.eval is taken."""

    every_steps: int | None = optional(
        "Evaluate every so many steps", unit="steps", default="once, at the end", example=100, ge=1, le=MAX_STEPS
    )


class CheckpointFrom(SpecModel):
    """A checkpoint of another job: exactly one of fromJob and uri."""

    from_job: JobRef | None = optional(
        "Last checkpoint of another, finished job of this namespace", example={"name": "base-pretrain"}
    )
    uri: str | None = optional(
        "A checkpoint's folder: pvc://claim/path",
        example="pvc://runs/base/3f0c/checkpoints/step-100",
        min_length=1,
        max_length=MAX_URI,
    )


class CheckpointPolicy(SpecModel):
    """When the state is saved to storage and what a new attempt does with it."""

    every_steps: int | None = optional(
        "Save every so many steps", unit="steps", default="by time only", example=200, ge=1, le=MAX_STEPS
    )
    every_seconds: int | None = optional(
        "Save when so much time has passed since the last save",
        unit="seconds",
        default="1800",
        example=600,
        ge=10,
        le=604800,
    )
    keep_last: int | None = optional(
        "How many checkpoints are kept; older ones are deleted after a newer one is safe",
        default="2",
        example=3,
        ge=1,
        le=100,
    )
    resume: Literal["Auto", "Never"] | None = optional(
        "Auto goes on from this job's own last checkpoint after a restart; Never starts anew",
        default="Auto",
        example="Never",
    )
    from_: CheckpointFrom | None = optional(
        "Start from a checkpoint of another job (optimizer state and step included)",
        alias="from",
        example={"fromJob": {"name": "base-pretrain"}},
    )


class OutputPolicy(SpecModel):
    """What is exported at the end: safetensors and tokenizer, with LoRA the adapter in peft's format."""

    merge_adapter: bool | None = optional(
        "Export base and adapter merged into one plain model instead of the adapter (LoRA only)",
        default="false",
        example=True,
    )
