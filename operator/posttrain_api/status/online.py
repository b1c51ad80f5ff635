"""`status.resolved` of stage RL: effective values of its blocks under the spec's own names. Part of resolved.py."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from posttrain_api.base import Model
from posttrain_api.spec.fields import optional
from posttrain_api.spec.rewards import MAX_PATTERN, MAX_REWARDS
from posttrain_api.status.parts import URI

Word = Annotated[str, Field(max_length=32)]
Text = Annotated[str, Field(max_length=253)]
Column = Annotated[str, Field(max_length=128)]


class ResolvedPlace(Model):
    """A model beside the policy."""

    uri: Annotated[str, Field(max_length=URI)] | None = optional(
        "Where the model is", example="pvc://runs/sft/3f0c/output"
    )
    adapters: Annotated[tuple[Annotated[str, Field(max_length=URI)], ...], Field(max_length=16)] | None = optional(
        "Adapters merged into it, oldest first", example=["pvc://runs/sft/3f0c/output"]
    )


class ResolvedRollout(Model):
    """spec.rollout."""

    engine: Word | None = optional("Engine that samples", example="Auto")
    batch_size: int | None = optional("Prompts per rollout", unit="prompts", example=32)
    max_new_tokens: int | None = optional("Longest completion", unit="tokens", example=512)
    temperature: float | None = optional("Temperature", example=1)
    top_p: float | None = optional("Probability that is sampled from", example=1)
    top_k: int | None = optional("Tokens that are sampled from; 0: all", example=0)


class ResolvedColumn(Model):
    """A column."""

    column: Column | None = optional("Column with the right answer", example="answer")


class ResolvedPattern(Model):
    """A pattern."""

    pattern: Annotated[str, Field(max_length=MAX_PATTERN)] | None = optional(
        "Regular expression", example="Answer: [0-9]+"
    )


class ResolvedLength(Model):
    """Bounds of a length."""

    min_tokens: int | None = optional("Fewest tokens", unit="tokens", example=16)
    max_tokens: int | None = optional("Most tokens", unit="tokens", example=400)


class ResolvedObject(Model):
    """An object of the namespace."""

    name: Text | None = optional("Name of the object", example="judge-token")


class ResolvedHTTP(Model):
    """A server."""

    url: Annotated[str, Field(max_length=URI)] | None = optional(
        "Where completions are sent", example="https://judge.example.com/score"
    )
    secret_ref: ResolvedObject | None = optional("Secret with the token", example={"name": "judge-token"})


class ResolvedScript(Model):
    """A key of a ConfigMap."""

    name: Text | None = optional("Name of the ConfigMap", example="my-reward")
    key: Text | None = optional("Key with the Python file", example="reward.py")


class ResolvedPython(Model):
    """A function."""

    config_map_ref: ResolvedScript | None = optional("The file", example={"name": "my-reward", "key": "reward.py"})
    function: Column | None = optional("The function", example="score")


class ResolvedReward(Model):
    """One of spec.rewards."""

    name: Word | None = optional("Its name in metrics", example="math")
    weight: float | None = optional("Its factor in the sum", example=1)
    timeout_seconds: float | None = optional("What one call may take", unit="seconds", example=30)
    on_error: Word | None = optional("What a failure means", example="Fail")
    math: ResolvedColumn | None = optional("Kind math", example={"column": "answer"})
    exact_match: ResolvedColumn | None = optional("Kind exactMatch", example={"column": "label"})
    format: ResolvedPattern | None = optional("Kind format", example={"pattern": ".*"})
    regex: ResolvedPattern | None = optional("Kind regex", example={"pattern": "[0-9]+"})
    length: ResolvedLength | None = optional("Kind length", example={"maxTokens": 400})
    model: ResolvedPlace | None = optional("Kind model", example={"uri": "pvc://runs/judge/3f0c/output"})
    http: ResolvedHTTP | None = optional("Kind http", example={"url": "https://judge.example.com/score"})
    python: ResolvedPython | None = optional("Kind python", example={"function": "score"})


class ResolvedPenalty(Model):
    """spec.grpo.overlongPenalty."""

    buffer_tokens: int | None = optional("Tokens over which it grows", unit="tokens", example=128)
    factor: float | None = optional("Largest penalty", example=1)


class ResolvedRefills(Model):
    """spec.grpo.dynamicSampling."""

    max_refills: int | None = optional("How often a rollout is filled up", example=3)


class ResolvedGRPO(Model):
    """spec.grpo."""

    group_size: int | None = optional("Completions per prompt", example=8)
    beta: float | None = optional("Weight of the KL divergence", example=0)
    clip_low: float | None = optional("The ratio counts down to 1 - clipLow", example=0.2)
    clip_high: float | None = optional("The ratio counts up to 1 + clipHigh", example=0.2)
    dual_clip: float | None = optional("Bound of the ratio with a negative advantage", example=3)
    loss_aggregation: Word | None = optional("Over what the loss is a mean", example="Token")
    importance_level: Word | None = optional("Whose ratio counts", example="Token")
    scale_rewards: Word | None = optional("By whose deviation the advantage is divided", example="Group")
    std_ddof: int | None = optional("The deviation divides by n - stdDdof", example=1)
    std_epsilon: float | None = optional("Added to the deviation", example=0.0001)
    iterations: int | None = optional("Passes over the samples of a step", example=1)
    mask_truncated: bool | None = optional("Whether truncated completions are left out", example=False)
    overlong_penalty: ResolvedPenalty | None = optional("Penalty near the limit", example={"bufferTokens": 128})
    dynamic_sampling: ResolvedRefills | None = optional("Replacing groups without variance", example={"maxRefills": 3})
    sampler_correction: Word | None = optional("Correction of the sampler", example="None")


class ResolvedAdaptiveKL(Model):
    """spec.ppo.adaptiveKL."""

    target: float | None = optional("Divergence that is aimed at", unit="nats", example=6)
    horizon: int | None = optional("Time constant", unit="samples", example=10000)


class ResolvedPPO(Model):
    """spec.ppo."""

    clip_range: float | None = optional("Range of the ratio", example=0.2)
    value_clip_range: float | None = optional("Range of a value's move", example=0.2)
    value_coefficient: float | None = optional("Weight of the critic's loss", example=0.5)
    gamma: float | None = optional("Discount", example=1)
    lam: float | None = optional("Lambda of the advantage estimation", alias="lambda", example=0.95)
    kl_coefficient: float | None = optional("Weight of the KL divergence", example=0.05)
    kl_estimator: Word | None = optional("Estimator of the divergence", example="K1")
    adaptive_kl: ResolvedAdaptiveKL | None = optional(
        "Target of the divergence", alias="adaptiveKL", example={"target": 6}
    )
    epochs: int | None = optional("Passes over the samples of a step", example=4)
    whiten_advantages: bool | None = optional("Whether advantages are whitened", example=True)
    missing_eos_penalty: float | None = optional(
        "Penalty of a completion that did not end", alias="missingEOSPenalty", example=0
    )
    loss_aggregation: Word | None = optional("Over what the loss is a mean", example="Sequence")


class ResolvedRLOO(Model):
    """spec.rloo."""

    group_size: int | None = optional("Completions per prompt", example=4)
    kl_coefficient: float | None = optional("Weight of the KL divergence", example=0.05)
    clip_range: float | None = optional("Range of the ratio", example=0.2)
    normalize_advantages: bool | None = optional("Whether advantages are normalised", example=False)


class ResolvedCritic(Model):
    """spec.critic."""

    model: ResolvedPlace | None = optional("Model it begins as, where said", example={"uri": "pvc://runs/judge/output"})
    init_from: Word | None = optional("What it begins as, without a model", example="Policy")
    learning_rate: float | None = optional("Highest learning rate", example=0.0001)
    warmup_steps: int | None = optional("Steps in which only it learns", unit="steps", example=0)
    shared: bool | None = optional("Whether it is an adapter on the policy's frozen base", example=True)


ResolvedRewards = Annotated[tuple[ResolvedReward, ...], Field(max_length=MAX_REWARDS)]
