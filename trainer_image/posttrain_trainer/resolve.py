"""What the plan left Auto, settled once from the data, the model and the device. Pure; called by `prepare`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from posttrain_api.records import Resolved
from posttrain_api.trainer import TrainerConfig, TrainingConfig
from posttrain_trainer.sampler import total_rows

WARMUP_SHARE = 0.03
BASE_SHARE = 0.6
"""LoRA: the frozen base must fit in this share of the accelerator's memory to be kept whole on each (ZeRO 2)."""
STATE_SHARE = 0.5
"""Full fine-tuning: weights and training state must fit in this share at ZeRO 2."""
CHECKPOINTING_FROM = 10**9
"""Parameters from which activations are computed a second time in the backward instead of being kept."""
BYTES = {"FP32": 4, "BF16": 2}
"""Of a weight that computes."""
STATE_BYTES = 16
"""fp32: gradient, master weight and two Adam moments, 4 bytes each; sharded from ZeRO 2 on."""


@dataclass(frozen=True)
class Facts:
    """`rows` of an epoch; `parameters` of the model that is trained, 0 where unknown; `memory` of one accelerator in
    bytes, None on a CPU; `frozen`: parameters of models that are only asked, `critic`: of a second one that is trained.
    """

    rows: int
    parameters: int
    memory: int | None
    revision: str | None
    frozen: int = 0
    critic: int = 0


def resolve(config: TrainerConfig, facts: Facts) -> Resolved:
    """Every Auto settled. Total steps: maxSteps, or the epochs' positions in batches, the last one perhaps smaller."""
    total = total_steps(config, facts.rows)
    return Resolved(
        zero_stage=_zero_stage(config, facts),
        warmup_steps=_warmup(config.training, total),
        total_steps=total,
        precision=config.training.precision,
        attention="SDPA" if config.model.attention == "Auto" else config.model.attention,
        revision=facts.revision,
        parameters=facts.parameters,
        gradient_checkpointing=_checkpointing(config.training, facts),
    )


def total_steps(config: TrainerConfig, size: int) -> int:
    """maxSteps if set, else the batches that the epochs' rows fill, the last one perhaps in part (as the sampler
    counts)."""
    batch = rows_per_step(config)
    return math.ceil(total_rows(size, batch, config.training.epochs, config.training.max_steps) / batch)


def rows_per_step(config: TrainerConfig) -> int:
    """Rows of the set in a step: a step of stage RL is a rollout with all its updates."""
    return config.rollout.batch_size if config.stage == "RL" else config.training.batch_size


def asks_reference(config: TrainerConfig) -> bool:
    """Whether the reference policy is asked while the job trains: where a penalty compares with it."""
    if config.stage == "Preference":
        return config.algorithm != "SimPO" and not config.preference.cache_reference
    ppo = config.ppo.adaptive_kl is not None or config.ppo.kl_coefficient > 0
    asking = {"PPO": ppo, "RLOO": config.rloo.kl_coefficient > 0, "GRPO": config.grpo.beta > 0}
    return config.stage == "RL" and asking[config.algorithm or "GRPO"]


def second_reference(config: TrainerConfig) -> bool:
    """Whether it is a model of its own in memory: below a new adapter the policy's frozen base serves."""
    own = config.reference is None and config.lora is not None and not config.lora.continue_adapter
    return asks_reference(config) and not (config.tuning == "LoRA" and own)


def _warmup(training: TrainingConfig, total: int) -> int:
    if training.warmup_steps != "Auto":
        return training.warmup_steps
    return 0 if training.schedule == "Constant" else math.ceil(WARMUP_SHARE * total)


def _checkpointing(training: TrainingConfig, facts: Facts) -> bool:
    """Auto: where activations, not weights, would be what fills the memory."""
    if training.gradient_checkpointing != "Auto":
        return training.gradient_checkpointing
    return facts.parameters >= CHECKPOINTING_FROM


def _zero_stage(config: TrainerConfig, facts: Facts) -> int:
    """On a CPU sharding saves nothing for one rank, unless BF16 or offloading needs ZeRO's optimizer. On accelerators
    the least stage that fits."""
    if config.zero_stage != "Auto":
        return config.zero_stage
    world = config.topology.nodes * config.topology.processes_per_node
    if facts.memory is None:
        plain = config.training.precision == "FP32" and not config.deepspeed.offload_optimizer
        return 0 if plain and world == 1 else 2
    if config.lora is not None and config.lora.quantization is not None:
        return 2  # the only one left on an accelerator: 3 is refused
    weights = BYTES[config.training.precision] * (facts.parameters + facts.frozen + facts.critic)
    if config.tuning == "LoRA":
        return 2 if weights <= BASE_SHARE * facts.memory else 3
    state = 0 if config.deepspeed.offload_optimizer else STATE_BYTES * (facts.parameters + facts.critic) / world
    return 2 if weights + state <= STATE_SHARE * facts.memory else 3
