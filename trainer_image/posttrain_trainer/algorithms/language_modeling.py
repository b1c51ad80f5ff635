"""Pretrain and SFT: next-token cross-entropy over the counted tokens. The stages differ in the mask only, which the
data has.

−Σ_t w_t · log p(y_t | y_<t) / Σ w. The loop calls it for each micro-batch; it does not log, save or step.
"""

from __future__ import annotations

from torch import Tensor

from posttrain_trainer.algorithms.base import Sums
from posttrain_trainer.batching import MicroBatch
from posttrain_trainer.losses import Scores, nll_sum


class LanguageModeling:
    """One term, `nll`, weighted by token."""

    terms = ("nll",)

    def weights(self, micro: MicroBatch) -> dict[str, float]:
        """Σ w of each term, known before the forward."""
        return {"nll": float(micro.weights.sum())}

    def losses(self, scores: Scores, micro: MicroBatch) -> dict[str, Tensor]:
        """Σ w·loss of each term, with gradient."""
        return {"nll": nll_sum(scores[0], micro.weights)}

    def sums(self, scores: Scores, micro: MicroBatch) -> Sums:
        """TRL's mean_token_accuracy and entropy, as sums over counted tokens."""
        _, entropy, correct = scores
        return {"mean_token_accuracy": (correct * micro.weights).sum(), "entropy": (entropy * micro.weights).sum()}
