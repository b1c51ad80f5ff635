"""Stage RL: how completions are sampled, and what GRPO, PPO and RLOO make of their rewards.

One step is one rollout and its updates. Each algorithm has its own block; a block of another one is refused.
"""

from __future__ import annotations

from typing import Literal

from posttrain_api.spec.fields import SpecModel, optional, required
from posttrain_api.spec.objectives import MAX_COEFFICIENT
from posttrain_api.spec.references import ReferenceRef
from posttrain_api.spec.rewards import MAX_TOKENS
from posttrain_api.spec.training import MAX_STEPS

OnlineAlgorithm = Literal["GRPO", "PPO", "RLOO"]
MAX_GROUP = 1024
MAX_PASSES = 1024


class Rollout(SpecModel):
    """How completions are sampled from the policy."""

    engine: Literal["Auto", "Generate", "ContinuousBatching"] | None = optional(
        "Generate is a plain loop over padded batches, ContinuousBatching fills the place of finished samples at once; "
        "Auto takes Generate",
        default="Auto",
        example="Generate",
    )
    batch_size: int | None = optional(
        "Prompts per rollout of the whole job, a multiple of training.batchSize: so many updates learn from one "
        "rollout",
        unit="prompts",
        default="training.batchSize",
        example=128,
        ge=1,
        le=1048576,
    )
    max_new_tokens: int | None = optional(
        "Longest completion; a longer one is cut and counted as truncated",
        unit="tokens",
        default="512",
        example=1024,
        ge=1,
        le=MAX_TOKENS,
    )
    temperature: float | None = optional(
        "The logits are divided by it before sampling, and in every log-probability",
        default="1",
        example=0.7,
        gt=0,
        le=100,
    )
    top_p: float | None = optional(
        "Only the most likely tokens that together have this probability are sampled; 1: all",
        unit="probability",
        default="1",
        example=0.95,
        gt=0,
        le=1,
    )
    top_k: int | None = optional(
        "Only so many of the most likely tokens are sampled; 0: all", default="0", example=50, ge=0, le=1048576
    )


class OverlongPenalty(SpecModel):
    """A penalty that grows over the last tokens before rollout.maxNewTokens (DAPO)."""

    buffer_tokens: int = required(
        "Over so many tokens before rollout.maxNewTokens the penalty grows from 0 to factor",
        unit="tokens",
        example=128,
        ge=1,
        le=MAX_TOKENS,
    )
    factor: float | None = optional(
        "Largest penalty, subtracted from the reward", default="1", example=0.5, gt=0, le=MAX_COEFFICIENT
    )


class DynamicSampling(SpecModel):
    """Groups whose rewards are all alike teach nothing and are replaced by those of further prompts (DAPO)."""

    max_refills: int = required(
        "How often at most a rollout is filled up; after that it goes on with the groups it has", example=3, ge=1, le=64
    )


class GRPO(SpecModel):
    """Advantages relative to a group of completions of one prompt, no critic."""

    group_size: int | None = optional(
        "Completions per prompt", unit="completions", default="8", example=16, ge=2, le=MAX_GROUP
    )
    beta: float | None = optional(
        "Weight of the KL divergence to the reference (estimator k3) in the loss; 0: no reference is needed",
        default="0",
        example=0.04,
        ge=0,
        le=MAX_COEFFICIENT,
    )
    clip_low: float | None = optional(
        "The probability ratio counts down to 1 - clipLow", default="0.2", example=0.2, ge=0, le=1
    )
    clip_high: float | None = optional(
        "The probability ratio counts up to 1 + clipHigh; more than clipLow keeps rare tokens alive (DAPO)",
        default="0.2",
        example=0.28,
        ge=0,
        le=MAX_COEFFICIENT,
    )
    dual_clip: float | None = optional(
        "With a negative advantage the ratio counts up to this (dual-clip PPO)",
        default="none",
        example=3,
        gt=1,
        le=MAX_COEFFICIENT,
    )
    loss_aggregation: Literal["Token", "Sequence", "Constant"] | None = optional(
        "Over what the loss is a mean. Token: all tokens alike (DAPO); Sequence: each completion alike (GRPO as "
        "published); Constant: a sum divided by rollout.maxNewTokens (Dr. GRPO)",
        default="Token",
        example="Sequence",
    )
    importance_level: Literal["Token", "Sequence"] | None = optional(
        "Whether each token has its own probability ratio or a completion one (GSPO, with lossAggregation: Sequence)",
        default="Token",
        example="Sequence",
    )
    scale_rewards: Literal["Group", "Batch", "None"] | None = optional(
        "By whose standard deviation the advantage is divided: the group's, the rollout's, or none's",
        default="Group",
        example="None",
    )
    std_ddof: int | None = optional("The standard deviation divides by n - stdDdof", default="1", example=0, ge=0, le=1)
    std_epsilon: float | None = optional(
        "Added to the standard deviation before it divides", default="1e-4", example=1e-6, gt=0, le=1
    )
    iterations: int | None = optional(
        "How often the updates of a step go over its samples",
        unit="passes",
        default="1",
        example=2,
        ge=1,
        le=MAX_PASSES,
    )
    mask_truncated: bool | None = optional(
        "Leave completions that did not end out of the loss", default="false", example=True
    )
    overlong_penalty: OverlongPenalty | None = optional(
        "Penalty for completions near the limit", example={"bufferTokens": 128}
    )
    dynamic_sampling: DynamicSampling | None = optional(
        "Replace groups whose rewards are all alike", example={"maxRefills": 3}
    )
    sampler_correction: Literal["None", "TIS", "IcePop"] | None = optional(
        "What is done where the sampler's probabilities differ from the trainer's. TIS: weigh by the ratio, cut off "
        "above; IcePop: leave tokens with a far ratio out",
        default="None",
        example="TIS",
    )


class AdaptiveKL(SpecModel):
    """The KL coefficient moves so that the divergence stays near a target."""

    target: float = required(
        "Divergence that is aimed at, summed over a completion", unit="nats", example=6, gt=0, le=MAX_COEFFICIENT
    )
    horizon: int | None = optional(
        "Samples after which a steady deviation has moved the coefficient by about its size",
        unit="samples",
        default="10000",
        example=5000,
        ge=1,
        le=MAX_STEPS,
    )


class PPO(SpecModel):
    """Clipped policy updates with a critic and generalised advantage estimation."""

    clip_range: float | None = optional(
        "The probability ratio counts from 1 - clipRange to 1 + clipRange", default="0.2", example=0.1, gt=0, le=1
    )
    value_clip_range: float | None = optional(
        "A value counts as far as it moved by this in one step", default="0.2", example=0.5, gt=0, le=MAX_COEFFICIENT
    )
    value_coefficient: float | None = optional(
        "Weight of the critic's loss", default="0.5", example=0.1, gt=0, le=MAX_COEFFICIENT
    )
    gamma: float | None = optional("Discount of later rewards per token", default="1", example=0.99, gt=0, le=1)
    lam: float | None = optional(
        "Lambda of generalised advantage estimation", default="0.95", example=1, ge=0, le=1, alias="lambda"
    )
    kl_coefficient: float | None = optional(
        "Weight of the KL divergence to the reference, subtracted from each token's reward; 0: no reference is needed",
        default="0.05",
        example=0.02,
        ge=0,
        le=MAX_COEFFICIENT,
    )
    kl_estimator: Literal["K1", "K2", "K3"] | None = optional(
        "Estimate of the divergence: K1 the log-ratio, K2 half of its square, K3 exp(-r) - 1 + r",
        default="K1",
        example="K3",
    )
    adaptive_kl: AdaptiveKL | None = optional(
        "Move klCoefficient towards a target", alias="adaptiveKL", example={"target": 6}
    )
    epochs: int | None = optional(
        "How often the updates of a step go over its samples",
        unit="passes",
        default="4",
        example=2,
        ge=1,
        le=MAX_PASSES,
    )
    whiten_advantages: bool | None = optional(
        "Shift and scale the advantages of a rollout to mean 0 and deviation 1", default="true", example=False
    )
    missing_eos_penalty: float | None = optional(
        "Subtracted from the reward of a completion that did not end",
        alias="missingEOSPenalty",
        default="0",
        example=1,
        ge=0,
        le=MAX_COEFFICIENT,
    )
    loss_aggregation: Literal["Sequence", "Token"] | None = optional(
        "Over what the loss is a mean. Sequence: each completion alike; Token: all tokens alike",
        default="Sequence",
        example="Token",
    )


class RLOO(SpecModel):
    """The baseline of a completion is the mean reward of the others of its prompt."""

    group_size: int | None = optional(
        "Completions per prompt", unit="completions", default="4", example=8, ge=2, le=MAX_GROUP
    )
    kl_coefficient: float | None = optional(
        "Weight of the KL divergence to the reference, subtracted from the reward; 0: no reference is needed",
        default="0.05",
        example=0.02,
        ge=0,
        le=MAX_COEFFICIENT,
    )
    clip_range: float | None = optional(
        "The probability ratio counts from 1 - clipRange to 1 + clipRange", default="0.2", example=0.1, gt=0, le=1
    )
    normalize_advantages: bool | None = optional(
        "Shift and scale the advantages of a rollout to mean 0 and deviation 1", default="false", example=True
    )


class Critic(SpecModel):
    """PPO's value model. Without model and initFrom it begins as the starting policy, with a new head."""

    model: ReferenceRef | None = optional(
        "The model that the critic begins as; a reward model's head is kept", example={"fromJob": {"name": "judge"}}
    )
    init_from: Literal["RewardModel", "Policy"] | None = optional(
        "RewardModel: the critic begins as the reward model of the only model reward. Policy: as the starting model",
        default="Policy",
        example="RewardModel",
    )
    learning_rate: float | None = optional(
        "Highest learning rate of the critic; its schedule is the policy's",
        default="10 x training.learningRate",
        example=1e-5,
        gt=0,
        le=10,
    )
    warmup_steps: int | None = optional(
        "Steps at the beginning in which only the critic learns",
        unit="steps",
        default="0",
        example=10,
        ge=0,
        le=MAX_STEPS,
    )
