"""What the loop needs of an algorithm. Algorithms do not inherit from each other and do not know the loop."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from posttrain_trainer.batching import MicroBatch
from posttrain_trainer.losses import Scores

Sums = dict[str, Tensor]
"""Metric → sum over counted tokens, without gradient."""


class Algorithm(Protocol):
    """Named terms, each a sum with its own weight; the loop divides each by its weight over the whole step and all
    ranks."""

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the loss terms, the main one first."""
        ...

    def weights(self, micro: MicroBatch) -> dict[str, float]:
        """Σ w of each term, known before the forward."""

    def losses(self, scores: Scores, micro: MicroBatch) -> dict[str, Tensor]:
        """Σ w·loss of each term, with gradient."""

    def sums(self, scores: Scores, micro: MicroBatch) -> Sums:
        """What is reported beside the losses, divided by the weight of the first term."""
