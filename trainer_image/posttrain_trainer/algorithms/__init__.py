"""The objectives by stage. A new one is a file here and a line in `algorithm_of`."""

from __future__ import annotations

from posttrain_api.trainer import TrainerConfig
from posttrain_trainer.algorithms.base import Algorithm
from posttrain_trainer.algorithms.language_modeling import LanguageModeling
from posttrain_trainer.algorithms.preference import Preference
from posttrain_trainer.algorithms.reward_model import RewardModel


def algorithm_of(config: TrainerConfig) -> Algorithm:
    """The objective of a job. Pretrain and SFT differ in their data only."""
    if config.stage == "Preference":
        return Preference(config.algorithm or "DPO", config.preference)
    if config.stage == "RewardModel":
        return RewardModel(config.reward_model)
    return LanguageModeling()
