"""How the model is changed: adapter, optimizer, schedule, evaluation, checkpoints, output."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from posttrain_api.spec.fields import SpecModel, optional
from posttrain_api.spec.references import MAX_URI, FinishedJobRef

MAX_STEPS = 1_000_000_000
Beta = Annotated[float, Field(ge=0, lt=1)]
ModuleName = Annotated[str, Field(min_length=1, max_length=128)]


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
    rslora: bool | None = optional(
        "Scale the update by alpha / sqrt(rank) instead of alpha / rank (rank-stabilised LoRA)",
        default="false",
        example=True,
    )
    dora: bool | None = optional(
        "Learn the magnitude of each weight column apart from its direction (DoRA)", default="false", example=True
    )
    continue_adapter: bool | None = optional(
        "Go on with the adapter that model.fromJob has trained, instead of merging it in memory and starting a new "
        "one; rank, alpha, targetModules, rslora and dora are then that adapter's",
        default="false",
        example=True,
    )
    quantization: Literal["NF4"] | None = optional(
        "Keep the frozen linear layers below the adapters in 4 bits (QLoRA): a quarter of BF16's memory, slower steps, "
        "and a base that is rounded; computation stays in training.precision. Not with zeroStage 3",
        default="none: the weights are kept in training.precision",
        example="NF4",
    )


class Training(SpecModel):
    """One optimizer step takes batchSize sequences (RL: prompts with all their completions) of the whole job, whatever
    nodes, ranks and micro-batches."""

    epochs: float | None = optional(
        "Passes over the training data; epochs or maxSteps", default="1", example=3, gt=0, le=100000
    )
    max_steps: int | None = optional(
        "Optimizer steps, in RL rollouts; epochs or maxSteps",
        unit="steps",
        default="from epochs",
        example=500,
        ge=1,
        le=MAX_STEPS,
    )
    batch_size: int | None = optional(
        "Sequences, or pairs of them, or in RL prompts, per optimizer step of the whole job",
        unit="sequences",
        default="64; RL 32",
        example=128,
        ge=1,
        le=1048576,
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
        default="SFT 2e-4 with LoRA, 1e-5 full; RewardModel 1e-4 with LoRA, 1e-5 full; Preference 5e-6 with LoRA, "
        "5e-7 full; RL 1e-5 with LoRA, 1e-6 full; Pretrain 3e-4",
        example=1e-4,
        gt=0,
        le=10,
    )
    schedule: Literal["Cosine", "Linear", "Constant"] | None = optional(
        "Course of the learning rate after warm-up", default="Cosine; RL Constant", example="Linear"
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
        default="full: Pretrain 0.1, SFT and RewardModel 0.01; otherwise 0",
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
    precision: Literal["BF16", "FP32"] | None = optional(
        "Number format of the computation. BF16 keeps weights for the optimizer, its state and the sums of gradients "
        "in FP32",
        default="BF16 on GPUs, FP32 on the CPU",
        example="FP32",
    )
    gradient_checkpointing: bool | None = optional(
        "Compute activations a second time on the way back instead of keeping them: less memory, a third more time",
        default="true from 1 B parameters on, otherwise false",
        example=True,
    )


class Evaluation(SpecModel):
    """When data.eval is evaluated, and which of the evaluated models is kept as the best."""

    every_steps: int | None = optional(
        "Evaluate every so many steps", unit="steps", default="once, at the end", example=100, ge=1, le=MAX_STEPS
    )
    keep_best: bool | None = optional(
        "Export the model of the best evaluation beside the last one; it stands in status.checkpoints.best and "
        "another job starts from it with fromJob: {checkpoint: Best}",
        default="false",
        example=True,
    )
    metric: str | None = optional(
        "Which metric decides what is best, by its name in metrics.jsonl (with keepBest)",
        default="eval_loss; RL eval_reward",
        example="eval_accuracy",
        min_length=1,
        max_length=64,
        pattern=r"^[A-Za-z][A-Za-z0-9_./-]*$",
    )
    goal: Literal["Minimize", "Maximize"] | None = optional(
        "Whether less or more of the metric is better; must be said for another metric than eval_loss and eval_reward",
        default="Minimize; eval_reward Maximize",
        example="Maximize",
    )


class CheckpointFrom(SpecModel):
    """A checkpoint of another job: exactly one of fromJob and uri."""

    from_job: FinishedJobRef | None = optional(
        "Newest whole checkpoint of another job of this namespace that has succeeded or failed; its claim is mounted "
        "read-only",
        example={"name": "base-pretrain"},
    )
    uri: str | None = optional(
        "A checkpoint's folder, or a folder of checkpoints, of which the newest whole one is taken: pvc://claim/path",
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
    staging: Literal["Disk", "Memory"] | None = optional(
        "For slow storage: save to the node first and copy from there while training goes on. Disk needs that room on "
        "the node's disk, Memory in the pod's memory: each process its part of a checkpoint. Nothing counts as saved "
        "before it is on the storage; the last save of a job and of a pod that is told to end is made straight there",
        default="none: training waits until the storage has it",
        example="Disk",
    )
    from_: CheckpointFrom | None = optional(
        "Go on from a checkpoint of another job: weights, optimizer, step and position in the data. Nodes, processes "
        "and deepspeed may be others than that job's; model, tuning, data, seed, batchSize and precision may not",
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
