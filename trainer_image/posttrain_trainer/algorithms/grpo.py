"""GRPO: a completion is better or worse than the others of its prompt, and there is no critic.

−min(ρA, clip(ρ)A) with A = (R − mean of the group)/(std + ε), and with `beta` k3 to the reference as a second term of
the same weight (Shao et al. 2024, arXiv:2402.03300, equation 3). Its family is in the settings: DAPO (`clipHigh`,
tokens, overlong penalty), Dr. GRPO (no scaling, a constant), GSPO (a ratio per sequence). The loop calls it; it does
not sample, score, log, save or step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from posttrain_api.online import GRPOConfig
from posttrain_trainer.advantages import ADVANTAGE, Scaling, group_advantages, overlong
from posttrain_trainer.aggregation import Aggregation, means
from posttrain_trainer.algorithms.base import Estimated, Measures, Needs, sampler_difference
from posttrain_trainer.experience import OLD, REFERENCE, ROLLOUT, Experience, Floats
from posttrain_trainer.kl import k3
from posttrain_trainer.losses import Scores
from posttrain_trainer.microbatch import MicroBatch
from posttrain_trainer.policy_losses import Clip, above, below, clipped, ratio_of, truncated, within

POLICY, KL = "policy", "kl_penalty"  # `kl` is what is measured: names of terms and measures are not the same
KEPT, CORRECTION = "kept", "correction"
"""Of each token: 0 where the completion is masked; by how much its sampling differed."""
CORRECTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"TIS": truncated, "IcePop": within}


class GRPO:
    """One term, and a second one where `beta` is not 0."""

    needs: Needs = "logp"

    def __init__(self, settings: GRPOConfig, max_new_tokens: int) -> None:
        self._settings = settings
        self._most = max_new_tokens
        self._clip = Clip(settings.clip_low, settings.clip_high, settings.dual_clip)
        self._aggregation = Aggregation(settings.loss_aggregation, max_new_tokens)
        self.terms = {POLICY: 1.0} | ({KL: settings.beta} if settings.beta else {})
        self.group_size = settings.group_size
        self.passes = settings.iterations
        self.needs_reference = bool(settings.beta)
        self.needs_old = settings.sampler_correction in CORRECTIONS

    def estimate(self, experience: Experience, kl_coefficient: float) -> Estimated:
        """`advantage`, and where they are asked for `kept` and `correction`, of every token."""
        rewards, settings = experience.reward, self._settings
        if settings.overlong_penalty is not None:
            rewards = rewards + overlong(experience.sizes, self._most, settings.overlong_penalty)
        scaling = Scaling(settings.scale_rewards, settings.std_ddof, settings.std_epsilon)
        each = {ADVANTAGE: experience.spread(group_advantages(rewards, experience.group, scaling))}
        if settings.mask_truncated:
            each[KEPT] = experience.spread(experience.ended.astype(np.float32))
        if not self.needs_old:
            return Estimated(each, {})
        each[CORRECTION] = self._correction(experience)
        return Estimated(each, _of_correction(each[CORRECTION]))

    def weights(self, micro: MicroBatch) -> dict[str, float]:
        """Tokens, sequences or sequences · maxNewTokens, the same for each term."""
        return dict.fromkeys(self.terms, self._aggregation.weight(micro, _counted(micro)))

    def losses(self, out: Scores, micro: MicroBatch) -> dict[str, Tensor]:
        """Σ of each term, with gradient."""
        each = clipped(self._ratio(out[0], micro), micro.each[ADVANTAGE], self._clip)
        if CORRECTION in micro.each:
            each = each * micro.each[CORRECTION]
        found = {POLICY: self._aggregation.total(each, micro, _counted(micro))}
        if KL in self.terms:
            found[KL] = self._aggregation.total(_divergence(out[0], micro), micro, _counted(micro))
        return found

    def measures(self, out: Scores, micro: MicroBatch) -> Measures:
        """TRL's entropy, kl and clip_ratio/*_mean: over tokens, and the last over sequences where there is one ratio
        for each. Its clip_ratio/low_min and high_max are left out: they are not sums."""
        logp, entropy = out[0].detach(), out[1]
        by_token = {"entropy": entropy}
        if KL in self.terms:
            by_token["kl"] = _divergence(logp, micro)
        counted = _counted(micro)
        found = {name: ((each * counted).sum(), counted.sum()) for name, each in by_token.items()}
        found |= sampler_difference(logp, micro)
        return {**found, **self._clip_ratios(self._ratio(logp, micro), micro, counted)}

    def _clip_ratios(self, ratio: Tensor, micro: MicroBatch, counted: Tensor) -> Measures:
        low = below(ratio, micro.each[ADVANTAGE], self._clip)
        high = above(ratio, micro.each[ADVANTAGE], self._clip)
        shares = {"low_mean": low, "high_mean": high, "region_mean": low + high}
        by_sequence = self._settings.importance_level == "Sequence"
        totals = {
            name: (means(each, micro, counted).sum(), micro.rows.sum())
            if by_sequence
            else ((each * counted).sum(), counted.sum())
            for name, each in shares.items()
        }
        return {f"clip_ratio/{name}": total for name, total in totals.items()}

    def _ratio(self, logp: Tensor, micro: MicroBatch) -> Tensor:
        """π/π_old of each token; GSPO (Zheng et al. 2025, arXiv:2507.18071, equation 7): of each sequence, the
        geometric mean over its tokens. Tokens that do not count have log ratio 0: exp of any other, times 0, might be
        NaN."""
        counted = _counted(micro)
        difference = (logp - micro.each.get(OLD, logp.detach())) * counted
        if self._settings.importance_level == "Sequence":
            difference = means(difference, micro, counted)[micro.sequence]
        return ratio_of(difference)

    def _correction(self, experience: Experience) -> Floats:
        difference = torch.from_numpy(experience.each[OLD] - experience.each[ROLLOUT])
        found: Floats = CORRECTIONS[self._settings.sampler_correction](difference).numpy()
        return found


def _of_correction(weights: Floats) -> dict[str, float]:
    """TRL's, over all tokens of the rollout."""
    shown = {"min": weights.min(), "mean": weights.mean(), "max": weights.max()}
    return {f"sampling/importance_sampling_ratio/{name}": float(value) for name, value in shown.items()}


def _counted(micro: MicroBatch) -> Tensor:
    return micro.weights * micro.each[KEPT] if KEPT in micro.each else micro.weights


def _divergence(logp: Tensor, micro: MicroBatch) -> Tensor:
    return k3((logp - micro.each[REFERENCE]) * _counted(micro))
