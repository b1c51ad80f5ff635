"""The objectives by stage. A new one is a file here and a line in `algorithm_of` or `ONLINE`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from posttrain_api.trainer import TrainerConfig
from posttrain_trainer.algorithms.base import Algorithm, OnlineAlgorithm
from posttrain_trainer.algorithms.critic import Critic
from posttrain_trainer.algorithms.grpo import GRPO
from posttrain_trainer.algorithms.language_modeling import LanguageModeling
from posttrain_trainer.algorithms.ppo import PPO
from posttrain_trainer.algorithms.preference import Preference
from posttrain_trainer.algorithms.reward_model import RewardModel
from posttrain_trainer.algorithms.rloo import RLOO

ONLINE: Mapping[str, Callable[[TrainerConfig], OnlineAlgorithm]] = {
    "GRPO": lambda config: GRPO(config.grpo, config.rollout.max_new_tokens),
    "PPO": lambda config: PPO(config.ppo),
    "RLOO": lambda config: RLOO(config.rloo),
}
"""Of stage RL."""


def algorithm_of(config: TrainerConfig) -> Algorithm:
    """The objective of a job; stage RL's is an OnlineAlgorithm. Pretrain and SFT differ in their data only."""
    if config.stage == "RL":
        return online_of(config)
    if config.stage == "Preference":
        return Preference(config.algorithm or "DPO", config.preference)
    if config.stage == "RewardModel":
        return RewardModel(config.reward_model)
    return LanguageModeling()


def online_of(config: TrainerConfig) -> OnlineAlgorithm:
    """The policy's objective of stage RL."""
    return ONLINE[config.algorithm or "GRPO"](config)


def critic_of(config: TrainerConfig) -> Algorithm | None:
    """The objective of the critic that learns beside the policy; None of algorithms without one."""
    return Critic(config.ppo) if config.stage == "RL" and config.algorithm == "PPO" else None
