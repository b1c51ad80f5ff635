"""The engines of those who learn. Called by assemble, once the process group stands."""

from __future__ import annotations

from torch import nn

from posttrain_api.trainer import TrainerConfig
from posttrain_trainer import algorithms, nf4
from posttrain_trainer.critic_model import build_critic
from posttrain_trainer.dropout import without_dropout
from posttrain_trainer.engine import Engine, Trained
from posttrain_trainer.engine_config import EngineSettings
from posttrain_trainer.job import Job
from posttrain_trainer.optimizers import AdamSettings, MakeOptimizer
from posttrain_trainer.packing import packs
from posttrain_trainer.roles import SharedEngine, critic_engine, policy_engine


def engine_of(job: Job, module: nn.Module, make_optimizer: MakeOptimizer) -> Engine:
    """The policy's, or the reward model's; with PPO's critic on it where `module` has one."""
    config, training, resolved = job.config, job.config.training, job.prepared.resolved
    settings = EngineSettings(
        zero_stage=resolved.zero_stage,
        max_grad_norm=training.max_grad_norm,
        adapter=config.tuning == "LoRA",
        bf16=resolved.precision == "BF16",
        quantized=nf4.asked(config),
        offload_optimizer=config.deepspeed.offload_optimizer,
        offload_parameters=config.deepspeed.offload_parameters,
        overrides=config.deepspeed.overrides,
    )
    if job.config.stage in ("RewardModel", "Preference", "RL"):
        without_dropout(module)
    module.train()
    return policy_engine(module, make_optimizer, settings, training.weight_decay)


def critic_of(job: Job, engine: Engine, packed: bool, make_optimizer: MakeOptimizer) -> Trained | None:
    """PPO's critic beside the policy's engine, or on it. None for every other algorithm."""
    config, attention = job.config, job.prepared.resolved.attention
    if algorithms.critic_of(config) is None:
        return None
    if isinstance(engine, SharedEngine):
        return engine.critic
    module = build_critic(config, job.prepared)
    if packed:  # where it cannot, transformers' mask does the same more slowly
        packs(module, attention, job.runtime.device)
    without_dropout(module)
    module.train()
    return critic_engine(module, make_optimizer, engine.settings, config.training.weight_decay)


def adam(config: TrainerConfig) -> AdamSettings:
    """The optimizer's, without its rate."""
    return AdamSettings(config.training.beta1, config.training.beta2, config.training.epsilon)
