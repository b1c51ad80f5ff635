"""RLOO: REINFORCE on whole completions; the baseline of each is the mean reward of the others of its prompt.

−min(ρA, clip(ρ)A) by sequence, ρ = π(completion)/π_old(completion), A = R' − mean of the others' R', R' = R − β·Σ k1
(Ahmadian et al. 2024, arXiv:2402.14740; the ratio and its clip are TRL's). The loop calls it; it does not sample,
score, log, save or step.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from posttrain_api.online import RLOOConfig
from posttrain_trainer.advantages import ADVANTAGE, leave_one_out, normalized, sums
from posttrain_trainer.algorithms.base import Estimated, Measures, Needs, sampler_difference
from posttrain_trainer.experience import OLD, REFERENCE, Experience
from posttrain_trainer.losses import Scores
from posttrain_trainer.microbatch import MicroBatch
from posttrain_trainer.policy_losses import Clip, above, below, clipped, ratio_of

POLICY = "policy"


class RLOO:
    """One term, weighted by sequence."""

    needs: Needs = "logp"
    terms = {POLICY: 1.0}  # noqa: RUF012  read only, as the protocol says
    passes = 1

    def __init__(self, settings: RLOOConfig) -> None:
        self._settings = settings
        self._clip = Clip(settings.clip_range, settings.clip_range)
        self.group_size = settings.group_size
        self.needs_reference = self.needs_old = bool(settings.kl_coefficient)

    def estimate(self, experience: Experience, kl_coefficient: float) -> Estimated:
        """`advantage` of every token, and the mean KL of a token, TRL's `kl`, where there is a reference."""
        rewards, metrics = experience.reward, {}
        if self.needs_reference:
            difference = experience.each[OLD].astype(np.float64) - experience.each[REFERENCE]
            rewards = rewards - self._settings.kl_coefficient * sums(difference, experience.sizes)
            metrics["kl"] = float(difference.mean())
        advantages = leave_one_out(rewards, experience.group)
        if self._settings.normalize_advantages:
            advantages = normalized(advantages)
        return Estimated({ADVANTAGE: experience.spread(np.nan_to_num(advantages))}, metrics)

    def weights(self, micro: MicroBatch) -> dict[str, float]:
        """Sequences."""
        return {POLICY: float(micro.rows.sum())}

    def losses(self, out: Scores, micro: MicroBatch) -> dict[str, Tensor]:
        """Σ over sequences, with gradient."""
        each = clipped(_ratio(out[0], micro), _advantage(micro), self._clip)
        return {POLICY: (micro.rows * each).sum()}

    def measures(self, out: Scores, micro: MicroBatch) -> Measures:
        """TRL's entropy by token and clip_ratio/*_mean by sequence. Its clip_ratio/low_min and high_max are left out:
        they are not sums."""
        ratio, advantage = _ratio(out[0].detach(), micro), _advantage(micro)
        low, high = below(ratio, advantage, self._clip), above(ratio, advantage, self._clip)
        shares = {"low_mean": low, "high_mean": high, "region_mean": low + high}
        clips = {f"clip_ratio/{name}": ((micro.rows * each).sum(), micro.rows.sum()) for name, each in shares.items()}
        measured = {**sampler_difference(out[0].detach(), micro), **clips}
        return {"entropy": ((out[1] * micro.weights).sum(), micro.weights.sum()), **measured}


def _ratio(logp: Tensor, micro: MicroBatch) -> Tensor:
    """Of each sequence, [s]; 1 in a dummy."""
    return ratio_of(micro.by_sequence((logp - micro.each.get(OLD, logp.detach())) * micro.weights))


def _advantage(micro: MicroBatch) -> Tensor:
    """Of each sequence: its tokens have all the same."""
    return torch.zeros_like(micro.rows).scatter(0, micro.sequence, micro.each[ADVANTAGE])
