"""PPO's policy: each token is better or worse than the critic expected.

−min(ρA, clip(ρ)A), A by GAE from r_t = −β·KL_t, to which the last token's has the completion's score added (Schulman et
al. 2017, arXiv:1707.06347; Ouyang et al. 2022, arXiv:2203.02155). The critic learns beside it, in an objective of its
own. The loop calls it; it does not sample, score, log, save or step.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from posttrain_api.online import PPOConfig
from posttrain_trainer.advantages import ADVANTAGE, RETURN, Numbers, explained_variance, gae, sums, whitened
from posttrain_trainer.aggregation import Aggregation
from posttrain_trainer.algorithms.base import Estimated, Measures, Needs
from posttrain_trainer.experience import OLD, REFERENCE, VALUE, Experience
from posttrain_trainer.kl import ESTIMATORS
from posttrain_trainer.losses import Scores
from posttrain_trainer.microbatch import MicroBatch
from posttrain_trainer.policy_losses import Clip, above, below, clipped, ratio_of

POLICY = "policy"


class PPO:
    """One term, weighted by token or sequence."""

    needs: Needs = "logp"
    terms = {POLICY: 1.0}  # noqa: RUF012  read only, as the protocol says
    group_size = 1
    needs_old = True

    def __init__(self, settings: PPOConfig) -> None:
        self._settings = settings
        self._clip = Clip(settings.clip_range, settings.clip_range)
        self._aggregation = Aggregation(settings.loss_aggregation)
        self.passes = settings.epochs
        self.needs_reference = bool(settings.kl_coefficient) or settings.adaptive_kl is not None

    def estimate(self, experience: Experience, kl_coefficient: float) -> Estimated:
        """`advantage` and `return` of every token. A completion whose rewards were all skipped has advantage 0 and
        returns that are the values: nobody learns of it."""
        kl, score = self._divergence(experience), self._scores(experience)
        reward = -kl_coefficient * kl
        reward[np.cumsum(experience.sizes) - 1] += np.nan_to_num(score)
        value = experience.each[VALUE].astype(np.float64)
        advantage, returns = gae(reward, value, experience.sizes, self._settings.gamma, self._settings.lam)
        counted = np.repeat(~np.isnan(score), experience.sizes)
        metrics = _objective(experience, score, kl, kl_coefficient)
        metrics["val/explained_variance"] = explained_variance(returns[counted], value[counted])
        if self._settings.whiten_advantages:
            advantage = whitened(advantage, counted)
        each = {ADVANTAGE: np.where(counted, advantage, 0.0), RETURN: np.where(counted, returns, value)}
        return Estimated({name: numbers.astype(np.float32) for name, numbers in each.items()}, metrics)

    def weights(self, micro: MicroBatch) -> dict[str, float]:
        """Tokens or sequences."""
        return {POLICY: self._aggregation.weight(micro, micro.weights)}

    def losses(self, out: Scores, micro: MicroBatch) -> dict[str, Tensor]:
        """Σ, with gradient."""
        each = clipped(ratio_of(_difference(out[0], micro)), micro.each[ADVANTAGE], self._clip)
        return {POLICY: self._aggregation.total(each, micro, micro.weights)}

    def measures(self, out: Scores, micro: MicroBatch) -> Measures:
        """TRL's policy/* and val/ratio, over tokens. val/ratio_var is the mean square of ρ − 1: 1 is what ρ is expected
        to be."""
        difference, advantage = _difference(out[0].detach(), micro), micro.each[ADVANTAGE]
        ratio = ratio_of(difference)
        by_token = {
            "policy/approxkl_avg": difference**2 / 2,
            "policy/clipfrac_avg": below(ratio, advantage, self._clip) + above(ratio, advantage, self._clip),
            "policy/entropy_avg": out[1],
            "val/ratio": ratio,
            "val/ratio_var": (ratio - 1) ** 2,
        }
        return {name: ((each * micro.weights).sum(), micro.weights.sum()) for name, each in by_token.items()}

    def _divergence(self, experience: Experience) -> Numbers:
        """KL of each token by the estimator, float64; 0 without a reference."""
        if not self.needs_reference:
            return np.zeros(int(experience.sizes.sum()))
        difference = experience.each[OLD].astype(np.float64) - experience.each[REFERENCE]
        found: Numbers = ESTIMATORS[self._settings.kl_estimator](torch.from_numpy(difference)).numpy()
        return found

    def _scores(self, experience: Experience) -> Numbers:
        return experience.reward - self._settings.missing_eos_penalty * ~experience.ended


def _difference(logp: Tensor, micro: MicroBatch) -> Tensor:
    """log ρ; 0 in a dummy, where exp of anything else, times 0, might be NaN."""
    return (logp - micro.each.get(OLD, logp.detach())) * micro.weights


def _objective(experience: Experience, score: Numbers, kl: Numbers, coefficient: float) -> dict[str, float]:
    """TRL's, of the rollout as a whole: means over completions of their sums over tokens."""
    by_sample = float(sums(kl, experience.sizes).mean())
    scored = score[~np.isnan(score)]
    scores = float(scored.mean()) if len(scored) else 0.0
    return {
        "objective/kl": by_sample,
        "objective/entropy": float(-sums(experience.each[OLD].astype(np.float64), experience.sizes).mean()),
        "objective/non_score_reward": -coefficient * by_sample,
        "objective/rlhf_reward": scores - coefficient * by_sample,
        "objective/scores": scores,
    }
