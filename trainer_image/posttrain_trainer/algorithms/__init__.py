"""The objectives by stage. A new one is a file here and a line in ALGORITHMS."""

from __future__ import annotations

from posttrain_trainer.algorithms.base import Algorithm
from posttrain_trainer.algorithms.language_modeling import LanguageModeling

ALGORITHMS: dict[str, type[Algorithm]] = {"Pretrain": LanguageModeling, "SFT": LanguageModeling}
