"""TrainerConfig: everything a trainer pod is told, nothing else.

Built by the operator's (and the command line's) plan, written to an immutable ConfigMap, read by the trainer's
launcher. All presets and built-in defaults are already applied; "Auto" is left only where the model, the device or the
data decide, which `prepare` does once. Paths are absolute inside the pod (names.py); a local run puts its own folders
there.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from posttrain_api.base import Hashed, Model

CONTRACT = 1
"""Version of this file's meaning. An image that speaks another one ends with ImageIncompatible."""

Auto = Literal["Auto"]


class JobIdentity(Model):
    """Who the job is; the uid keeps a recreated job of the same name apart."""

    namespace: str
    name: str
    uid: str


class Source(Model):
    """A model or data location. `path` is where it is mounted; None for `hf://`, `s3://` and `gs://`,
    which `prepare` downloads.

    `secret_path` is the folder with the keys of the source's Secret, one file each."""

    uri: str
    path: str | None = None
    secret_path: str | None = None
    revision: str | None = None
    """Of an hf:// source: branch, tag or 40-hex commit asked for."""


class DataSource(Source):
    """One data set: a file, a folder of files, or a hub data set."""

    format: Literal["Auto", "JSONL", "Parquet", "Arrow"] = "Auto"
    split: str | None = None
    subset: str | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    """{our name: the data's name}."""
    max_rows: int | None = None


class DataConfig(Model):
    """Which rows, how long, what is counted, and what happens to bad rows."""

    train: tuple[DataSource, ...]
    eval: tuple[DataSource, ...] = ()
    max_length: int
    loss_on: Literal["Auto", "Completion", "All"]
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
    scratch: Scratch | None = None
    dtype: Literal["Auto", "BF16", "FP32"] = "Auto"
    attention: Literal["Auto", "SDPA", "Eager"] = "Auto"
    trust_remote_code: bool = False
    chat_template: str | None = None


class LoraConfig(Model):
    """h = (W + (alpha/rank)·B·A)·x; `target_modules` are peft's names, `all-linear` = all but the head."""

    rank: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...]


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
    precision: Literal["FP32"] = "FP32"


class CheckpointConfig(Model):
    """When to save, how many to keep, what to resume from. `start_from`: a checkpoint folder of another job."""

    every_steps: int | None = None
    every_seconds: int
    keep_last: int
    resume: Literal["Auto", "Never"]
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
    stage: Literal["Pretrain", "SFT"]
    tuning: Literal["Full", "LoRA"]
    lora: LoraConfig | None = None
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    zero_stage: Literal["Auto", 0, 1, 2, 3] = "Auto"
    eval_every_steps: int | None = None
    """None with eval data: once, at the end."""
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
