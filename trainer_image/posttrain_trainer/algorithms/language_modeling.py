"""Pretrain and SFT: next-token cross-entropy over the counted tokens. The stages differ in the mask only, which the
data has.

−Σ_t w_t · log p(y_t | y_<t) / Σ w. The loop calls it for each micro-batch; it does not log, save or step.
"""

from __future__ import annotations

from torch import Tensor

from posttrain_trainer.algorithms.base import Measures, Needs
from posttrain_trainer.losses import Scores, nll_sum
from posttrain_trainer.microbatch import MicroBatch


class LanguageModeling:
    """One term, `nll`, weighted by token."""

    needs: Needs = "logp"
    terms = {"nll": 1.0}  # noqa: RUF012  read only, as the protocol says

    def weights(self, micro: MicroBatch) -> dict[str, float]:
        """Σ w of each term, known before the forward."""
        return {"nll": float(micro.weights.sum())}

    def losses(self, out: Scores, micro: MicroBatch) -> dict[str, Tensor]:
        """Σ w·loss of each term, with gradient."""
        return {"nll": nll_sum(out[0], micro.weights)}

    def measures(self, out: Scores, micro: MicroBatch) -> Measures:
        """TRL's mean_token_accuracy and entropy, over counted tokens."""
        _, entropy, correct = out
        weight = micro.weights.sum()
        return {
            "mean_token_accuracy": ((correct * micro.weights).sum(), weight),
            "entropy": ((entropy * micro.weights).sum(), weight),
        }
