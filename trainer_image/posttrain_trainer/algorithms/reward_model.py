"""RewardModel: one score per answer, the chosen one above the rejected one (Bradley–Terry).

−log σ(r_c − r_r − m) and, with `centering` λ, λ·(r_c + r_r)² as a second term; both per pair. The loop calls it for
each micro-batch with the scores of the model's head; where the score is read is the model's matter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain_api.trainer import RewardModelConfig
from posttrain_trainer import pairs
from posttrain_trainer.algorithms.base import Measures, Needs
from posttrain_trainer.microbatch import MicroBatch
from posttrain_trainer.reward_losses import bradley_terry, centering

RANKING, CENTERING = "ranking", "centering"
MARGIN = "margin"
"""Name of the annotated margin among a row's values; 0 where the data has none."""


class RewardModel:
    """One term or two, weighted by pair."""

    needs: Needs = "score"

    def __init__(self, settings: RewardModelConfig) -> None:
        self.terms = {RANKING: 1.0} | ({CENTERING: settings.centering} if settings.centering else {})

    def weights(self, micro: MicroBatch) -> dict[str, float]:
        """Pairs, for each term."""
        return dict.fromkeys(self.terms, float(micro.rows.sum()))

    def losses(self, out: Tensor, micro: MicroBatch) -> dict[str, Tensor]:
        """Σ w·loss of each term, with gradient. out: scores fp32 [s]."""
        chosen, rejected = pairs.split(out.float())
        margin = micro.values.get(MARGIN, torch.zeros_like(micro.rows))
        found = {RANKING: (micro.rows * bradley_terry(chosen, rejected, margin)).sum()}
        if CENTERING in self.terms:
            found[CENTERING] = (micro.rows * centering(chosen, rejected)).sum()
        return found

    def measures(self, out: Tensor, micro: MicroBatch) -> Measures:
        """TRL's accuracy, margin (without the annotated one) and mean_reward. Its min_reward and max_reward are left
        out: they are not sums."""
        chosen, rejected = pairs.split(out.detach().float())
        by_pair = {
            "accuracy": (chosen > rejected).float(),
            "margin": chosen - rejected,
            "mean_reward": (chosen + rejected) / 2,
        }
        return pairs.means(by_pair, micro)
