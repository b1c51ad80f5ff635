"""What a trainer of stage RL is told beside the rest of its configuration: rollouts, rewards, and the algorithm's own.

Part of TrainerConfig (trainer.py). As there, all defaults of the API are applied; the ones here serve tests.
"""

from __future__ import annotations

from typing import Literal

from posttrain_api.base import Model
from posttrain_api.places import Source

OnlineAlgorithm = Literal["GRPO", "PPO", "RLOO"]


class RolloutConfig(Model):
    """How completions are sampled. `batch_size`: prompts per rollout, a multiple of `training.batch_size`."""

    engine: Literal["Auto", "Generate", "ContinuousBatching"] = "Auto"
    batch_size: int = 32
    max_new_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit."""


class ColumnReward(Model):
    """A column of the data holds the answer."""

    column: str


class PatternReward(Model):
    """A regular expression in Python's syntax; `.` is any character, a line break too."""

    pattern: str


class LengthReward(Model):
    """1 inside [min_tokens, max_tokens], 0 outside; None: no bound."""

    min_tokens: int | None = None
    max_tokens: int | None = None


class ModelReward(Model):
    """A reward model; its tokenizer must have the policy's vocabulary."""

    source: Source
    adapters: tuple[Source, ...] = ()


class HTTPReward(Model):
    """A server that scores. `secret_path`: folder with the key `token`, sent as bearer token."""

    url: str
    secret_path: str | None = None


class PythonReward(Model):
    """A function of a file: f(prompts, completions, **columns) -> list[float | None]."""

    path: str
    function: str


class RewardConfig(Model):
    """One reward: exactly one of the kinds is set. `name` is unique and the label of its metrics.

    on_error: what an exception, a deadline or a wrong answer means. Fail: the job ends with RewardError; Zero: the
    completion gets 0; Skip: it is not in its group's baseline and has advantage 0."""

    name: str
    weight: float = 1.0
    timeout_seconds: float = 30.0
    on_error: Literal["Fail", "Zero", "Skip"] = "Fail"
    math: ColumnReward | None = None
    exact_match: ColumnReward | None = None
    format: PatternReward | None = None
    """The whole completion matches."""
    regex: PatternReward | None = None
    """The pattern is found in it."""
    length: LengthReward | None = None
    model: ModelReward | None = None
    http: HTTPReward | None = None
    python: PythonReward | None = None


class OverlongPenalty(Model):
    """DAPO (Yu et al. 2025, eq. 13): the reward falls linearly to −factor over the last `buffer_tokens` tokens before
    max_new_tokens."""

    buffer_tokens: int
    factor: float = 1.0


class GRPOConfig(Model):
    """Group-relative policy optimisation and its family (Shao et al. 2024; DAPO, Dr.GRPO, GSPO)."""

    group_size: int = 8
    beta: float = 0.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    loss_aggregation: Literal["Token", "Sequence", "Constant"] = "Token"
    importance_level: Literal["Token", "Sequence"] = "Token"
    scale_rewards: Literal["Group", "Batch", "None"] = "Group"
    std_ddof: Literal[0, 1] = 1
    std_epsilon: float = 1e-4
    iterations: int = 1
    mask_truncated: bool = False
    overlong_penalty: OverlongPenalty | None = None
    max_refills: int = 0
    """Dynamic sampling: how often groups without variance are replaced by those of further prompts; 0: never."""
    sampler_correction: Literal["None", "TIS", "IcePop"] = "None"


class AdaptiveKL(Model):
    """Ziegler et al. 2019, §2.2: the coefficient follows `target` with time constant `horizon`, in samples."""

    target: float
    horizon: int = 10_000


class PPOConfig(Model):
    """Proximal policy optimisation with a critic (Schulman et al. 2017; Ouyang et al. 2022)."""

    clip_range: float = 0.2
    value_clip_range: float = 0.2
    value_coefficient: float = 0.5
    gamma: float = 1.0
    lam: float = 0.95
    kl_coefficient: float = 0.05
    kl_estimator: Literal["K1", "K2", "K3"] = "K1"
    adaptive_kl: AdaptiveKL | None = None
    epochs: int = 4
    whiten_advantages: bool = True
    missing_eos_penalty: float = 0.0
    """Subtracted from the reward of a completion that did not end."""
    loss_aggregation: Literal["Sequence", "Token"] = "Sequence"


class RLOOConfig(Model):
    """REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024)."""

    group_size: int = 4
    kl_coefficient: float = 0.05
    clip_range: float = 0.2
    normalize_advantages: bool = False


class CriticConfig(Model):
    """PPO's value model. `source` None: it begins as `init_from` says, the reward model of the only model reward or the
    policy. `shared`: an adapter of its own on the policy's frozen base."""

    source: Source | None = None
    adapters: tuple[Source, ...] = ()
    init_from: Literal["RewardModel", "Policy"] = "Policy"
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    """Steps in which only the critic learns."""
    shared: bool = False
