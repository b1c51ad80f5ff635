"""Who learns in a job: the policy, and beside it PPO's critic. Made by assemble, driven by the loop."""

from __future__ import annotations

from dataclasses import dataclass

from posttrain_trainer.algorithms.base import Algorithm
from posttrain_trainer.engine import Trained


@dataclass(frozen=True)
class Learner:
    """A role with its engine and its objective. rate: its learning rate is the schedule's times this; idle_steps:
    steps at the beginning in which it does not learn."""

    name: str
    engine: Trained
    algorithm: Algorithm
    rate: float = 1.0
    idle_steps: int = 0
