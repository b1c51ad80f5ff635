"""TrainerConfig: everything a trainer pod is told, nothing else.

Built by the operator's (and the command line's) plan, written to an immutable ConfigMap, read by the trainer's
launcher. All presets and built-in defaults are already applied; "Auto" is left only where the model, the device or the
data decide, which `prepare` does once. Paths are absolute inside the pod (names.py); a local run puts its own folders
there.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from posttrain_api.base import Hashed, Model
from posttrain_api.guards import GuardsConfig
from posttrain_api.online import (
    CriticConfig,
    GRPOConfig,
    OnlineAlgorithm,
    PPOConfig,
    RewardConfig,
    RLOOConfig,
    RolloutConfig,
)
from posttrain_api.places import Source

CONTRACT = 1
"""Version of this file's meaning. An image that speaks another one ends with ImageIncompatible."""

Auto = Literal["Auto"]
PreferenceAlgorithm = Literal["DPO", "IPO", "Hinge", "RobustDPO", "APOZero", "APODown", "SimPO"]
"""Preference losses; cDPO is DPO with label smoothing."""
Algorithm = PreferenceAlgorithm | OnlineAlgorithm


class JobIdentity(Model):
    """Who the job is; the uid keeps a recreated job of the same name apart."""

    namespace: str
    name: str
    uid: str


class DataSource(Source):
    """One data set: a file, a folder of files, or a hub data set."""

    format: Literal["Auto", "JSONL", "Parquet", "Arrow"] = "Auto"
    split: str | None = None
    subset: str | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    """{our name: the data's name}."""
    max_rows: int | None = None
    weight: float = 1.0
    """Passes over this source per epoch."""


class DataConfig(Model):
    """Which rows, how long, what is counted, and what happens to bad rows."""

    train: tuple[DataSource, ...]
    eval: tuple[DataSource, ...] = ()
    max_length: int
    max_prompt_length: int | None = None
    """None: only `max_length` holds."""
    loss_on: Literal["Auto", "Completion", "Assistant", "All"]
    too_long: Literal["Skip", "Split", "Truncate", "Fail"]
    too_long_max_fraction: float
    bad_rows_policy: Literal["Fail", "Skip"]
    bad_rows_max_fraction: float


class Scratch(Model):
    """A model made from its shape, weights drawn from the seed (Pretrain only).

    `tokenizer` None: a byte-level BPE tokenizer of `vocab_size` is trained from the training data."""

    family: Literal["Llama", "Qwen3"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_length: int
    tokenizer: Source | None = None


class ModelConfig(Model):
    """The starting policy: exactly one of `source` and `scratch`."""

    source: Source | None = None
    adapters: tuple[Source, ...] = ()
    """Adapters of earlier jobs on `source`, oldest first: merged into it in memory."""
    scratch: Scratch | None = None
    attention: Literal["Auto", "SDPA", "Eager"] = "Auto"
    trust_remote_code: bool = False
    chat_template: str | None = None


class ReferenceConfig(Model):
    """The reference policy where it is not the starting policy."""

    source: Source
    adapters: tuple[Source, ...] = ()


class LoraConfig(Model):
    """h = (W + (alpha/rank)·B·A)·x; `target_modules` are peft's names, `all-linear` = all but the head.

    `rslora`: alpha/√rank instead; `dora`: magnitude and direction apart; `continue_adapter`: the last of
    `model.adapters` is trained further instead of being merged. Rank, alpha, targets, rslora and dora are its own then;
    a `rank` that the job gives all the same must be that adapter's. `quantization`: how the frozen linear layers are
    stored; None: in the training's precision."""

    rank: int | None = None
    """None only with `continue_adapter`."""
    alpha: float
    dropout: float
    target_modules: tuple[str, ...]
    rslora: bool = False
    dora: bool = False
    continue_adapter: bool = False
    quantization: Literal["NF4"] | None = None


class TrainingConfig(Model):
    """One optimizer step = `batch_size` sequences of the whole job, whatever ranks and micro-batches."""

    epochs: float | None = None
    max_steps: int | None = None
    batch_size: int
    tokens_per_micro_batch: int
    learning_rate: float
    schedule: Literal["Cosine", "Linear", "Constant"]
    warmup_steps: int | Auto
    """Auto: 3 % of the total, rounded up; 0 for Constant."""
    min_learning_rate_ratio: float
    weight_decay: float
    beta1: float
    beta2: float
    epsilon: float
    max_grad_norm: float
    """0 switches clipping off."""
    seed: int
    precision: Literal["FP32", "BF16"] = "FP32"
    gradient_checkpointing: bool | Auto = False


class DeepSpeedConfig(Model):
    """What the job may say of DeepSpeed beside the ZeRO stage. `overrides` are laid over our configuration."""

    offload_optimizer: bool = False
    offload_parameters: bool = False
    overrides: dict[str, Any] = Field(default_factory=dict)


class PreferenceConfig(Model):
    """Stage Preference (research: DPO and its family). `gamma_beta_ratio` is SimPO's γ/β.

    `cache_reference`: the reference's log-probabilities are computed once and kept on storage."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    sft_weight: float = 0.0
    gamma_beta_ratio: float = 0.5
    cache_reference: bool = False


class RewardModelConfig(Model):
    """Stage RewardModel. `centering`: λ of λ·(r_c + r_r)²; `margin_column`: the data's column with the margin m."""

    centering: float = 0.0
    margin_column: str | None = None


class EvaluationConfig(Model):
    """When data.eval is evaluated and which evaluation is the best. `metric` is a name of metrics.jsonl."""

    every_steps: int | None = None
    """None with eval data: once, at the end."""
    metric: str = "eval_loss"
    goal: Literal["Minimize", "Maximize"] = "Minimize"
    keep_best: bool = False


class CheckpointConfig(Model):
    """When to save, how many to keep, what to resume from. `start_from`: a checkpoint folder of another job; `staging`:
    what a save lies on until it is copied (None: it is written straight to the storage)."""

    every_steps: int | None = None
    every_seconds: int
    keep_last: int
    resume: Literal["Auto", "Never"]
    staging: Literal["Disk", "Memory"] | None = None
    start_from: Source | None = None


class Topology(Model):
    """World size = nodes × processes_per_node. gpus_per_node 0: a CPU job by wish."""

    nodes: int
    processes_per_node: int
    gpus_per_node: int


class TrainerConfig(Hashed):
    """The whole. Stored as `config.json`."""

    contract: int = CONTRACT
    job: JobIdentity
    stage: Literal["Pretrain", "SFT", "RewardModel", "Preference", "RL"]
    algorithm: Algorithm | None = None
    """Of stages Preference and RL."""
    tuning: Literal["Full", "LoRA"]
    lora: LoraConfig | None = None
    model: ModelConfig
    reference: ReferenceConfig | None = None
    """None: the starting policy."""
    data: DataConfig
    training: TrainingConfig
    zero_stage: Literal["Auto", 0, 1, 2, 3] = "Auto"
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    preference: PreferenceConfig = PreferenceConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: tuple[RewardConfig, ...] = ()
    grpo: GRPOConfig = GRPOConfig()
    ppo: PPOConfig = PPOConfig()
    rloo: RLOOConfig = RLOOConfig()
    critic: CriticConfig | None = None
    """Of PPO."""
    evaluation: EvaluationConfig = EvaluationConfig()
    guards: GuardsConfig = GuardsConfig()
    checkpoint: CheckpointConfig
    merge_adapter: bool = False
    topology: Topology
    run_dir: str
    """Absolute path of this job's folder on its storage: `<storage>/<name>/<uid>`."""
    run_uri: str
    """The same as a URI, `pvc://<claim>/<name>/<uid>`; output and checkpoint URIs start with it."""
    work_dir: str
    """Fast local scratch space, lost with the pod."""
    grace_seconds: int = Field(ge=1)
    """terminationGracePeriodSeconds: what SIGTERM leaves for the last save."""
