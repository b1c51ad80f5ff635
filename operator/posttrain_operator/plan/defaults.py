"""The built-in table: what a job gets that says nothing, by stage and tuning.

The last step of the resolution order (spec > presets > this table). Numbers that depend on the model, the device or
the data
are not here: they are Auto until the trainer's `prepare` knows. Reading the table must be enough to know the
defaults; the
descriptions of the API repeat it in words, and a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from posttrain_api.rules.online_rules import BATCH_SIZE

Tuning = Literal["Full", "LoRA"]

MAX_LENGTH = 2048
PROMPT_LENGTH = 1536
"""Of stage RL where nothing is said of lengths; with MAX_NEW_TOKENS the usual MAX_LENGTH."""
TOKENS_PER_MICRO_BATCH = 8192
LORA_RANK = 16
CHECKPOINT_SECONDS = 1800
KEEP_LAST = 2
GRACE_SECONDS = 600
GPU_RESOURCE_NAME = "nvidia.com/gpu"
CPU_PER_GPU = 8
MEMORY_GIB_PER_GPU = 64
SHARED_MEMORY_GIB = 16
CPU_PER_PROCESS = 1
MEMORY_GIB_PER_PROCESS = 2
SHARED_MEMORY_GIB_CPU = 1
BETA = 0.1
BETA_SIMPO = 2.0
GAMMA_BETA_RATIO = 0.5
CRITIC_RATE_FACTOR = 10.0
"""The critic learns faster than the policy may move."""
MAX_OVERRIDES_BYTES = 16384
"""Of deepspeed.overrides as JSON: they are copied into the job's ConfigMap and its status."""


@dataclass(frozen=True)
class Defaults:
    """One row. `warmup_steps` is Auto (3 % of all steps, 0 for Constant) in every row."""

    learning_rate: float
    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    epochs: float = 1.0
    batch_size: int = 64
    schedule: Literal["Cosine", "Linear", "Constant"] = "Cosine"
    min_learning_rate_ratio: float = 0.0
    seed: int = 0
    too_long: Literal["Skip", "Split"] = "Skip"
    too_long_max_fraction: float = 0.1
    bad_rows_policy: Literal["Fail", "Skip"] = "Fail"
    bad_rows_max_fraction: float = 0.001
    loss_on: Literal["Auto", "All"] = "Auto"


# An adapter starts at zero and moves little: about ten times the rate of the whole model is the usual rule (TRL's
# reward example takes 1e-4 with LoRA and 1e-5 without; Schulman et al. 2025 find the factor 10 over many models). Rates
# of preference losses are far smaller: their gradient does not vanish when the pairs are learned, it drifts.
_SFT_LORA = Defaults(learning_rate=2e-4, weight_decay=0.0)
_SFT_FULL = Defaults(learning_rate=1e-5, weight_decay=0.01)
_PRETRAIN = Defaults(learning_rate=3e-4, weight_decay=0.1, betas=(0.9, 0.95), too_long="Split", loss_on="All")

TABLE: dict[tuple[str, Tuning], Defaults] = {
    ("SFT", "LoRA"): _SFT_LORA,
    ("SFT", "Full"): _SFT_FULL,
    ("Pretrain", "Full"): _PRETRAIN,
    ("Pretrain", "LoRA"): replace(_PRETRAIN, weight_decay=0.0),
    ("RewardModel", "LoRA"): Defaults(learning_rate=1e-4, weight_decay=0.0),
    ("RewardModel", "Full"): Defaults(learning_rate=1e-5, weight_decay=0.01),
    ("Preference", "LoRA"): Defaults(learning_rate=5e-6, weight_decay=0.0),
    ("Preference", "Full"): Defaults(learning_rate=5e-7, weight_decay=0.0),
    ("RL", "LoRA"): Defaults(learning_rate=1e-5, weight_decay=0.0, batch_size=BATCH_SIZE, schedule="Constant"),
    ("RL", "Full"): Defaults(learning_rate=1e-6, weight_decay=0.0, batch_size=BATCH_SIZE, schedule="Constant"),
}


def defaults_for(stage: str, tuning: Tuning) -> Defaults:
    """The row. KeyError for a stage that the schema does not hold."""
    return TABLE[stage, tuning]
