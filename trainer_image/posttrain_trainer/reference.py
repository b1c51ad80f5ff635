"""The reference policy of preference learning: the log-probabilities that the trained policy is compared with."""

from __future__ import annotations

from typing import Protocol

from posttrain_trainer.microbatch import MicroBatch

REFERENCE = "reference"
"""Name of the reference's log-probabilities among a micro-batch's values: Σ log p of each sequence, fp32 [s]."""


class Reference(Protocol):
    """Gives a micro-batch what the reference says of it."""

    def attach(self, micro: MicroBatch) -> MicroBatch:
        """The micro-batch (on this rank's device) with `reference` among its values. All ranks call it together."""
