"""`status.resolved`: effective values under the spec's own names. Where the spec may say less, this says everything.

Bounded, typed for `kubectl explain`, never checked against rules: it is written by the operator alone. "Auto" stands
where the
trainer's `prepare` has not decided yet.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema

from posttrain_api.base import Model
from posttrain_api.spec.fields import optional
from posttrain_api.status.online import (
    ResolvedCritic,
    ResolvedGRPO,
    ResolvedPlace,
    ResolvedPPO,
    ResolvedRewards,
    ResolvedRLOO,
    ResolvedRollout,
)
from posttrain_api.status.parts import BIG, DIGEST, URI

AutoOrNumber = Annotated[int | str, WithJsonSchema({"x-kubernetes-int-or-string": True, "maxLength": 16})]
FreeForm = Annotated[
    dict[str, Any],
    WithJsonSchema({"type": "object", "x-kubernetes-preserve-unknown-fields": True, "maxProperties": 64}),
]
Uris = Annotated[tuple[Annotated[str, Field(max_length=URI)], ...], Field(max_length=16)]
Names = Annotated[tuple[Annotated[str, Field(max_length=128)], ...], Field(max_length=64)]
Word = Annotated[str, Field(max_length=32)]
Text = Annotated[str, Field(max_length=253)]


class ResolvedLora(Model):
    """spec.lora."""

    rank: int | None = optional("Rank of the adapters", example=16)
    alpha: float | None = optional("Scale; the update is multiplied by alpha / rank", example=32)
    dropout: float | None = optional("Dropout before A", example=0)
    target_modules: Names | None = optional("Layers with an adapter", example=["all-linear"])
    rslora: bool | None = optional("Whether the update is multiplied by alpha / sqrt(rank) instead", example=False)
    dora: bool | None = optional("Whether magnitudes are learned apart", example=False)
    continue_adapter: bool | None = optional("Whether the parent's adapter is trained further", example=False)
    quantization: Word | None = optional("How the frozen layers are kept, where not in full", example="NF4")


class ResolvedTokenizer(Model):
    """spec.model.scratch.tokenizer."""

    uri: Annotated[str, Field(max_length=URI)] | None = optional(
        "Where the tokenizer is", example="hf://Qwen/Qwen3-0.6B"
    )


class ResolvedScratch(Model):
    """spec.model.scratch."""

    family: Word | None = optional("Architecture", example="Llama")
    vocab_size: int | None = optional("Size of the vocabulary", unit="tokens", example=4096)
    hidden_size: int | None = optional("Width of the residual stream", example=256)
    intermediate_size: int | None = optional("Width of the feed-forward layers", example=1024)
    layers: int | None = optional("Transformer layers", example=4)
    heads: int | None = optional("Attention heads", example=8)
    kv_heads: int | None = optional("Key and value heads", example=8)
    head_dim: int | None = optional("Width of one head", example=32)
    max_length: int | None = optional("Longest sequence the model is made for", unit="tokens", example=2048)
    tokenizer: ResolvedTokenizer | None = optional("A ready tokenizer", example={"uri": "hf://Qwen/Qwen3-0.6B"})


class ResolvedSecretRef(Model):
    """spec.model.secretRef, of a chain that of its first job."""

    name: Text | None = optional("Name of the Secret", example="hf-token")


class ResolvedModel(Model):
    """spec.model."""

    uri: Annotated[str, Field(max_length=URI)] | None = optional(
        "Where the model is; for fromJob the parent's output, or what the parent's adapter was trained on",
        example="pvc://runs/base/3f0c/output",
    )
    adapters: Uris | None = optional(
        "Adapters of earlier jobs that are merged into it, oldest first", example=["pvc://runs/sft/3f0c/output"]
    )
    secret_ref: ResolvedSecretRef | None = optional("Secret that fetches the model", example={"name": "hf-token"})
    scratch: ResolvedScratch | None = optional("Shape of a new model", example={"family": "Llama"})
    attention: Word | None = optional("Attention kernel", example="SDPA")
    trust_remote_code: bool | None = optional("Whether the model's own code runs", example=False)
    revision: Annotated[str, Field(max_length=DIGEST)] | None = optional(
        "Commit that all attempts use", example="3f1c9a"
    )
    parameters: int | None = optional("Parameters of the model", example=1543714304, ge=0, le=BIG)
    trainable_parameters: int | None = optional("Of these, trained", example=18464768, ge=0, le=BIG)


class ResolvedBadRows(Model):
    """spec.data.badRows."""

    policy: Word | None = optional("What happens to bad rows", example="Fail")
    max_fraction: float | None = optional("Largest share of bad rows under Skip", example=0.001)


class ResolvedData(Model):
    """spec.data."""

    train: Uris | None = optional("Training sets", example=["pvc://datasets/train.jsonl"])
    eval: Uris | None = optional("Evaluation sets", example=["pvc://datasets/test.jsonl"])
    max_length: int | None = optional("Longest sequence", unit="tokens", example=2048)
    max_prompt_length: int | None = optional("Longest prompt, where said", unit="tokens", example=512)
    loss_on: Word | None = optional("Which tokens are learned", example="Auto")
    too_long: Word | None = optional("What happens to longer sequences", example="Skip")
    too_long_max_fraction: float | None = optional("Largest share of rows that are too long", example=0.1)
    bad_rows: ResolvedBadRows | None = optional("What happens to bad rows", example={"policy": "Fail"})


class ResolvedTraining(Model):
    """spec.training."""

    epochs: float | None = optional("Passes over the data, where maxSteps is not said", example=1)
    max_steps: int | None = optional("Optimizer steps, where said", unit="steps", example=500)
    total_steps: int | None = optional("Optimizer steps in all, known once prepared", unit="steps", example=350)
    batch_size: int | None = optional("Sequences per optimizer step", unit="sequences", example=64)
    tokens_per_micro_batch: int | None = optional("Tokens one rank works on at once", unit="tokens", example=8192)
    learning_rate: float | None = optional("Highest learning rate", example=0.0002)
    schedule: Word | None = optional("Course of the learning rate", example="Cosine")
    warmup_steps: AutoOrNumber | None = optional("Steps of warm-up", unit="steps", example=11)
    min_learning_rate_ratio: float | None = optional("Share of learningRate at the end", example=0)
    weight_decay: float | None = optional("Decoupled weight decay", example=0)
    betas: Annotated[tuple[float, ...], Field(max_length=2)] | None = optional(
        "AdamW's decay rates", example=[0.9, 0.999]
    )
    epsilon: float | None = optional("AdamW's epsilon", example=1e-8)
    max_grad_norm: float | None = optional("Clipping norm", example=1)
    seed: int | None = optional("Seed", example=0)
    precision: Word | None = optional("Number format of the computation", example="FP32")
    gradient_checkpointing: bool | None = optional(
        "Whether activations are computed twice instead of kept; not there until it is decided", example=True
    )


class ResolvedDeepSpeed(Model):
    """spec.deepspeed."""

    zero_stage: AutoOrNumber | None = optional("ZeRO stage", example=2)
    offload_optimizer: bool | None = optional("Whether the optimizer's state is in main memory", example=False)
    offload_parameters: bool | None = optional("Whether the weights are in main memory", example=False)
    overrides: FreeForm | None = optional(
        "Keys laid over the trainer's configuration", example={"zero_optimization": {}}
    )


class ResolvedPreference(Model):
    """spec.preference: what the algorithm reads."""

    beta: float | None = optional("How strongly the policy is held to the reference", example=0.1)
    label_smoothing: float | None = optional("Share of pairs taken to be swapped", example=0)
    sft_weight: float | None = optional("Weight of the SFT loss on the chosen answer", example=0)
    gamma_beta_ratio: float | None = optional("SimPO's margin as a share of beta", example=0.5)
    cache_reference: bool | None = optional("Whether the reference's log-probabilities are kept", example=False)


class ResolvedRewardModel(Model):
    """spec.rewardModel."""

    centering: float | None = optional("Weight of the squared sum of the two scores", example=0)
    margin_column: Annotated[str, Field(max_length=128)] | None = optional(
        "Column with the margin", example="score_difference"
    )


class ResolvedEvaluation(Model):
    """spec.evaluation."""

    every_steps: int | None = optional("Evaluation every so many steps", unit="steps", example=100)
    metric: Annotated[str, Field(max_length=64)] | None = optional("Which metric decides", example="eval_loss")
    goal: Word | None = optional("Which way is better", example="Minimize")
    keep_best: bool | None = optional("Whether the best model is kept", example=False)


class ResolvedGuardRule(Model):
    """spec.guards.rules[]."""

    metric: Annotated[str, Field(max_length=64)] | None = optional("Metric", example="kl")
    above: float | None = optional("Largest value", example=0.5)
    below: float | None = optional("Smallest value", example=0.01)
    for_steps: int | None = optional("Steps running that it must be broken in", unit="steps", example=3)
    action: Word | None = optional("What follows", example="Fail")


class ResolvedGuards(Model):
    """spec.guards, with the rules that every job of the stage has."""

    non_finite: Word | None = optional("What follows of NaN and infinity", example="Fail")
    rules: Annotated[tuple[ResolvedGuardRule, ...], Field(max_length=18)] | None = optional(
        "Bounds of metrics", example=[{"metric": "kl", "above": 0.5, "forSteps": 3, "action": "Fail"}]
    )


class ResolvedCheckpoint(Model):
    """spec.checkpoint."""

    every_steps: int | None = optional("Save every so many steps", unit="steps", example=200)
    every_seconds: int | None = optional("Save after so much time", unit="seconds", example=1800)
    keep_last: int | None = optional("Checkpoints kept", example=2)
    resume: Literal["Auto", "Never"] | None = optional("Whether a new attempt goes on", example="Auto")
    staging: Literal["Disk", "Memory"] | None = optional("What a save lies on until it is copied", example="Disk")
    from_: Annotated[str, Field(max_length=URI)] | None = optional(
        "Checkpoint the job starts from", alias="from", example="pvc://runs/base/3f0c/checkpoints/step-100"
    )


class ResolvedOutput(Model):
    """spec.output."""

    merge_adapter: bool | None = optional("Whether base and adapter are merged", example=False)


class ResolvedStorage(Model):
    """spec.storage."""

    uri: Annotated[str, Field(max_length=URI)] | None = optional("Folder of this job", example="pvc://runs/my-job/3f0c")


class ResolvedResources(Model):
    """spec.resources."""

    nodes: int | None = optional("Pods", example=2)
    gpus_per_node: int | None = optional("GPUs of each pod", example=8)
    processes_per_node: int | None = optional("Processes of each pod", example=8)
    gpu_resource_name: Text | None = optional("Name of the GPU resource", example="nvidia.com/gpu")
    cpu: Word | None = optional("CPU cores of each pod", example="64")
    memory: Word | None = optional("Memory of each pod", unit="bytes", example="512Gi")
    shared_memory: Word | None = optional("Size of /dev/shm", unit="bytes", example="16Gi")
    priority_class_name: Text | None = optional("PriorityClass of the pods", example="high-priority")
    scheduler_name: Text | None = optional("Scheduler of the pods", example="default-scheduler")


class ResolvedRunPolicy(Model):
    """spec.runPolicy."""

    termination_grace_period_seconds: int | None = optional(
        "What a stopped pod has to save", unit="seconds", example=600
    )


class ResolvedSpec(Model):
    """Effective values."""

    stage: Word | None = optional("Stage", example="SFT")
    algorithm: Word | None = optional("Algorithm", example="DPO")
    tuning: Word | None = optional("Tuning", example="LoRA")
    lora: ResolvedLora | None = optional("Adapters", example={"rank": 16})
    model: ResolvedModel | None = optional("Starting model", example={"uri": "hf://Qwen/Qwen2.5-1.5B-Instruct"})
    reference: ResolvedPlace | None = optional(
        "Model that the policy is compared with, where it is not the starting model",
        example={"uri": "pvc://runs/sft/3f0c/output"},
    )
    data: ResolvedData | None = optional("Rows", example={"maxLength": 2048})
    training: ResolvedTraining | None = optional("Optimizer, schedule, length", example={"batchSize": 64})
    preference: ResolvedPreference | None = optional("Preference loss", example={"beta": 0.1})
    reward_model: ResolvedRewardModel | None = optional("Reward model", example={"centering": 0})
    rollout: ResolvedRollout | None = optional("Sampling", example={"maxNewTokens": 512})
    rewards: ResolvedRewards | None = optional("Rewards", example=[{"name": "math"}])
    grpo: ResolvedGRPO | None = optional("GRPO", example={"groupSize": 8})
    ppo: ResolvedPPO | None = optional("PPO", example={"epochs": 4})
    rloo: ResolvedRLOO | None = optional("RLOO", example={"groupSize": 4})
    critic: ResolvedCritic | None = optional("PPO's critic", example={"shared": True})
    deepspeed: ResolvedDeepSpeed | None = optional("DeepSpeed", example={"zeroStage": "Auto"})
    evaluation: ResolvedEvaluation | None = optional("Evaluation", example={"everySteps": 100})
    guards: ResolvedGuards | None = optional("Bounds of metrics", example={"nonFinite": "Fail"})
    checkpoint: ResolvedCheckpoint | None = optional("Saved states", example={"everySeconds": 1800})
    output: ResolvedOutput | None = optional("Export", example={"mergeAdapter": False})
    storage: ResolvedStorage | None = optional("Storage", example={"uri": "pvc://runs/my-job/3f0c"})
    resources: ResolvedResources | None = optional("Pods and their size", example={"nodes": 2})
    image: Annotated[str, Field(max_length=512)] | None = optional("Trainer image", example="posttrain-trainer:0.1.0")
    run_policy: ResolvedRunPolicy | None = optional("Grace", example={"terminationGracePeriodSeconds": 600})
