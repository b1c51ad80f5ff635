"""What the loop needs of an algorithm. Algorithms do not inherit from each other and do not know the loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

from torch import Tensor

from posttrain_trainer.microbatch import MicroBatch

Needs = Literal["logp", "score"]
"""What the model's forward returns: `losses.Scores` of the counted tokens, or one score per sequence."""

Measures = dict[str, tuple[Tensor, Tensor]]
"""Metric → (sum, weight), both without gradient; reported as Σ sum / Σ weight over all micro-batches and ranks."""


class Algorithm(Protocol):
    """Named terms, each a sum with its own weight; the loop divides each by its weight over the whole step and all
    ranks."""

    @property
    def needs(self) -> Needs:
        """What it works on."""
        ...

    @property
    def terms(self) -> Mapping[str, float]:
        """Loss terms and their coefficients, the main one first. loss = Σ coefficient · Σ w·loss / Σ w."""
        ...

    def weights(self, micro: MicroBatch) -> dict[str, float]:
        """Σ w of each term, known before the forward."""

    def losses(self, out: Any, micro: MicroBatch) -> dict[str, Tensor]:
        """Σ w·loss of each term, with gradient."""

    def measures(self, out: Any, micro: MicroBatch) -> Measures:
        """What is reported beside the loss."""
