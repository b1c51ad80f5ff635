"""The scores of tokens and the losses made of them. torch only; called by the head and by algorithms.

Every loss is a *sum* over tokens with weights; the loop divides it once by the weight of the whole step over all
ranks. A mean in here would make the result depend on how rows are cut into micro-batches.
"""

from __future__ import annotations

from torch import Tensor

Scores = tuple[Tensor, Tensor, Tensor]
"""Of each counted token [n], fp32: log p, and without gradient the entropy (nats) and whether its target is the
argmax."""


def nll_sum(logp: Tensor, weights: Tensor) -> Tensor:
    """−Σ w·log p, fp32: cross-entropy before the division by N = Σ w over all micro-batches and ranks of the step."""
    return -(weights * logp.float()).sum()
