"""The reference policy of preference learning: what the loop, the evaluation and an algorithm must know of it.

Made by assemble, asked before each forward. Three ways to have one: the policy's own base under an adapter, a second
model (reference_models.py), or what either said before training (reference_cache.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from torch import Tensor

from posttrain_trainer.microbatch import MicroBatch

REFERENCE = "reference"
"""Name of the reference's log-probabilities among a micro-batch's values: Σ log p of each sequence, fp32 [s]."""


class Reference(Protocol):
    """Gives a micro-batch what the reference says of it."""

    def attach(self, micro: MicroBatch) -> MicroBatch:
        """The micro-batch (on this rank's device) with `reference` among its values. All ranks call it together."""


def with_reference(micro: MicroBatch, sums: Tensor) -> MicroBatch:
    """sums: Σ log p of each sequence, fp32 [s]."""
    return replace(micro, values={**micro.values, REFERENCE: sums.detach()})
