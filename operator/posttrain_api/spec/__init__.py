"""The spec of a PostTrainingJob: exactly the fields that work, each with its words, bounds and an example.

The CRD is generated from these models and every reader of a job parses with them, so that the API server, the
operator and
`posttrain validate` refuse the same things. What one field says about another is in `posttrain_api.rules`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from posttrain_api.spec.data import Data
from posttrain_api.spec.deepspeed import DeepSpeed
from posttrain_api.spec.fields import NAMED, ObjectName, SpecModel, optional, required
from posttrain_api.spec.guards import Guards
from posttrain_api.spec.objectives import Preference, PreferenceAlgorithm, RewardModel
from posttrain_api.spec.online import GRPO, PPO, RLOO, Critic, OnlineAlgorithm, Rollout
from posttrain_api.spec.references import ModelRef, ReferenceRef
from posttrain_api.spec.rewards import Rewards
from posttrain_api.spec.run import EnvVar, PullSecret, Resources, RunPolicy, Storage
from posttrain_api.spec.training import CheckpointPolicy, Evaluation, Lora, OutputPolicy, Training

__all__ = ["JobSpec"]


class JobSpec(SpecModel):
    """What is trained, on what, how, and where. Editable until the job starts; then only suspend and runPolicy are."""

    stage: Literal["Pretrain", "SFT", "RewardModel", "Preference", "RL"] = required(
        "What is trained: Pretrain learns every token of plain text, SFT the answers to prompts, RewardModel to score "
        "answers and Preference to prefer them, both from pairs of a chosen and a rejected one, RL to answer so that "
        "rewards are high, from completions that it samples itself",
        example="SFT",
    )
    algorithm: Literal[PreferenceAlgorithm, OnlineAlgorithm] | None = optional(
        "How stages Preference and RL learn. Preference: DPO, IPO, Hinge, RobustDPO, APOZero, APODown or SimPO (cDPO "
        "is DPO with preference.labelSmoothing); RL: GRPO, PPO or RLOO",
        default="Preference: DPO; RL: GRPO",
        example="IPO",
    )
    tuning: Literal["Full", "LoRA"] | None = optional(
        "Full changes every weight, LoRA trains small adapters. Outside Pretrain this or a lora "
        "block must be given: full fine-tuning is never "
        "an accident",
        default="Pretrain: Full; with a lora block: LoRA",
        example="LoRA",
    )
    lora: Lora | None = optional("Low-rank adapters; the block alone means tuning LoRA", example={"rank": 16})
    model: ModelRef = required(
        "The model that training starts from", example={"uri": "hf://Qwen/Qwen2.5-1.5B-Instruct"}
    )
    reference: ReferenceRef | None = optional(
        "Stage Preference (not SimPO) and stage RL with a KL term: the model that the policy is compared with; without "
        "it the starting model",
        example={"fromJob": {"name": "sft"}},
    )
    data: Data = required(
        "The rows to train and to evaluate on", example={"train": [{"uri": "pvc://datasets/gsm8k/train.jsonl"}]}
    )
    training: Training | None = optional("Optimizer, schedule and length", example={"epochs": 3, "batchSize": 64})
    preference: Preference | None = optional("What stage Preference learns by", example={"beta": 0.05})
    reward_model: RewardModel | None = optional("What stage RewardModel learns by", example={"centering": 0.01})
    rollout: Rollout | None = optional(
        "Stage RL: how completions are sampled. One step of the stage is one rollout and its updates; maxSteps and "
        "everySteps count rollouts",
        example={"maxNewTokens": 1024},
    )
    rewards: Rewards | None = optional(
        "Stage RL: what is rewarded; the weighted sum counts. At least one is needed there",
        default="none",
        example=[{"math": {"column": "answer"}}],
    )
    grpo: GRPO | None = optional("Stage RL with algorithm GRPO", example={"groupSize": 16, "beta": 0.04})
    ppo: PPO | None = optional("Stage RL with algorithm PPO", example={"klCoefficient": 0.02})
    rloo: RLOO | None = optional("Stage RL with algorithm RLOO", example={"groupSize": 8})
    critic: Critic | None = optional("The value model of algorithm PPO", example={"initFrom": "RewardModel"})
    deepspeed: DeepSpeed | None = optional("DeepSpeed", example={"zeroStage": 2})
    evaluation: Evaluation | None = optional(
        "When data.eval is evaluated and what is kept as the best", example={"everySteps": 100, "keepBest": True}
    )
    guards: Guards | None = optional(
        "Bounds of metrics, and what happens where training leaves them",
        example={"rules": [{"metric": "kl", "above": 0.5, "forSteps": 3}]},
    )
    checkpoint: CheckpointPolicy | None = optional(
        "When the state is saved and how it is resumed", example={"everySteps": 200, "keepLast": 3}
    )
    output: OutputPolicy | None = optional("What is exported at the end", example={"mergeAdapter": True})
    storage: Storage = required("Where checkpoints and the model are kept", example={"claimName": "runs"})
    resources: Resources | None = optional("Pods, GPUs, memory and placement", example={"nodes": 2, "gpusPerNode": 8})
    image: str | None = optional(
        "Trainer image",
        default="the platform's",
        example="registry.example.com/posttrain-trainer:0.1.0",
        min_length=1,
        max_length=512,
        pattern=r"^[^\s]+$",
    )
    image_pull_secrets: Annotated[tuple[PullSecret, ...], Field(max_length=8), NAMED] | None = optional(
        "Secrets that pull the image", default="none", example=[{"name": "registry"}]
    )
    service_account_name: ObjectName | None = optional(
        "ServiceAccount of the pods; its token is not mounted", default="default", example="trainer"
    )
    env: Annotated[tuple[EnvVar, ...], Field(max_length=64), NAMED] | None = optional(
        "Literal environment variables of the trainer",
        default="none",
        example=[{"name": "NCCL_DEBUG", "value": "WARN"}],
    )
    run_policy: RunPolicy | None = optional("Deadlines and cleaning up", example={"activeDeadlineSeconds": 86400})
    backend: Literal["Auto", "PyTorchJob", "TrainJob"] | None = optional(
        "What runs the pods: PyTorchJob of the Kubeflow training-operator v1, or TrainJob of Kubeflow Trainer v2 with "
        "JobSet. Auto is the platform's choice",
        default="Auto",
        example="TrainJob",
    )
    suspend: bool = Field(
        False,
        description="true at creation: validate and publish the plan, start nothing; later: save, stop, and go on "
        "where it was when false again. Default: false. Example: true.",
        json_schema_extra={"x-example": True},
    )
