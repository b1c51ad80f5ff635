"""PPO's critic: what reward is still to come, before each token.

½·max((V − R)², (clip(V, V_old ± range) − R)²), R by GAE. It learns from the same samples as the policy, beside it. The
loop calls it; it does not estimate returns, log, save or step.
"""

from __future__ import annotations

from torch import Tensor

from posttrain_api.online import PPOConfig
from posttrain_trainer.advantages import RETURN
from posttrain_trainer.algorithms.base import Measures, Needs
from posttrain_trainer.experience import VALUE
from posttrain_trainer.microbatch import MicroBatch
from posttrain_trainer.policy_losses import value_clipped, value_loss


class Critic:
    """One term, weighted by token however the policy's is: a long completion has more states to know the value of."""

    needs: Needs = "value"

    def __init__(self, settings: PPOConfig) -> None:
        self._range = settings.value_clip_range
        self.terms = {VALUE: settings.value_coefficient}

    def weights(self, micro: MicroBatch) -> dict[str, float]:
        """Tokens."""
        return {VALUE: float(micro.weights.sum())}

    def losses(self, out: Tensor, micro: MicroBatch) -> dict[str, Tensor]:
        """Σ, with gradient. out: V of the state before each counted token, fp32 [n]."""
        each = value_loss(out.float(), micro.each[VALUE], micro.each[RETURN], self._range)
        return {VALUE: (each * micro.weights).sum()}

    def measures(self, out: Tensor, micro: MicroBatch) -> Measures:
        """TRL's val/clipfrac_avg, over tokens."""
        stopped = value_clipped(out.detach().float(), micro.each[VALUE], micro.each[RETURN], self._range)
        return {"val/clipfrac_avg": ((stopped * micro.weights).sum(), micro.weights.sum())}
