"""The objectives by stage. A new one is a file here and a line in `algorithm_of`."""

from __future__ import annotations

from posttrain_api.trainer import TrainerConfig
from posttrain_trainer.algorithms.base import Algorithm
from posttrain_trainer.algorithms.language_modeling import LanguageModeling


def algorithm_of(config: TrainerConfig) -> Algorithm:
    """The objective of a job."""
    del config  # Pretrain and SFT differ in their data only
    return LanguageModeling()
