"""Preference: the policy prefers the chosen answer to the rejected one more than its reference does.

Σ over pairs of one of `preference_losses`, and with `sftWeight` the cross-entropy of the chosen answers' tokens as a
second term with its own weight. The loop calls it for each micro-batch, with the reference's log-probabilities already
in it; it does not run a reference, log, save or step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain_api.trainer import PreferenceConfig
from posttrain_trainer import pairs, preference_losses
from posttrain_trainer.algorithms.base import Measures, Needs
from posttrain_trainer.losses import Scores, nll_sum
from posttrain_trainer.microbatch import MicroBatch
from posttrain_trainer.reference import REFERENCE

PAIRS, SFT = "preference", "sft"

PairLoss = Callable[[Tensor, Tensor, PreferenceConfig], Tensor]


@dataclass(frozen=True)
class Variant:
    """A loss of the family, and what its scores are: sums or means over an answer's tokens, against a reference or
    not."""

    loss: PairLoss
    per_token: bool = False
    reference: bool = True


VARIANTS = {
    "DPO": Variant(lambda c, r, given: preference_losses.dpo(c, r, given.beta, given.label_smoothing)),
    "IPO": Variant(lambda c, r, given: preference_losses.ipo(c, r, given.beta), per_token=True),
    "Hinge": Variant(lambda c, r, given: preference_losses.hinge(c, r, given.beta)),
    "RobustDPO": Variant(lambda c, r, given: preference_losses.robust_dpo(c, r, given.beta, given.label_smoothing)),
    "APOZero": Variant(lambda c, r, given: preference_losses.apo_zero(c, r, given.beta)),
    "APODown": Variant(lambda c, r, given: preference_losses.apo_down(c, r, given.beta)),
    "SimPO": Variant(
        lambda c, r, given: preference_losses.simpo(c, r, given.beta, given.gamma_beta_ratio),
        per_token=True,
        reference=False,
    ),
}


class Preference:
    """One term per pair, and one per chosen token where `sft_weight` is not 0."""

    needs: Needs = "logp"

    def __init__(self, algorithm: str, settings: PreferenceConfig) -> None:
        self._variant = VARIANTS[algorithm]
        self._settings = settings
        self.terms = {PAIRS: 1.0} | ({SFT: settings.sft_weight} if settings.sft_weight else {})

    @property
    def needs_reference(self) -> bool:
        """Whether `losses` reads the reference's log-probabilities."""
        return self._variant.reference

    def start_loss(self) -> float | None:
        """The first term where policy and reference are the same model (Δ = 0): log 2 for DPO and RobustDPO, 1 for
        Hinge and APO, 1/(4β²) for IPO. None without a reference.

        The `sft` term is not in it: its start is the model's own cross-entropy.
        """
        if not self._variant.reference:
            return None
        return float(self._variant.loss(torch.zeros(1), torch.zeros(1), self._settings))

    def weights(self, micro: MicroBatch) -> dict[str, float]:
        """Σ w of each term, known before the forward: pairs, and the chosen answers' counted tokens."""
        known = {PAIRS: float(micro.rows.sum()), SFT: float(pairs.chosen_tokens(micro).sum())}
        return {term: known[term] for term in self.terms}

    def losses(self, out: Scores, micro: MicroBatch) -> dict[str, Tensor]:
        """Σ w·loss of each term, with gradient."""
        scores = self._log_ratios(micro.by_sequence(out[0]), micro)
        if self._variant.per_token:
            scores = scores / micro.counts().clamp(min=1.0)  # a dummy counts no token
        chosen, rejected = pairs.split(scores)
        found = {PAIRS: (micro.rows * self._variant.loss(chosen, rejected, self._settings)).sum()}
        if SFT in self.terms:
            found[SFT] = nll_sum(out[0], pairs.chosen_tokens(micro))
        return found

    def measures(self, out: Scores, micro: MicroBatch) -> Measures:
        """TRL's metrics of DPO and, of SimPO, of its CPOTrainer. By pair: rewards β·a and log-probabilities; by token:
        entropy of both answers, accuracy on the chosen one."""
        logp, entropy, correct = (each.detach() for each in out)
        counted = pairs.chosen_tokens(micro)
        return {
            **self._pair_measures(micro.by_sequence(logp), micro),
            "entropy": ((entropy * micro.weights).sum(), micro.weights.sum()),
            "mean_token_accuracy": ((correct * counted).sum(), counted.sum()),
        }

    def _pair_measures(self, logps: Tensor, micro: MicroBatch) -> Measures:
        rewards = self._settings.beta * self._log_ratios(logps, micro)
        if not self._variant.reference:
            rewards = rewards / micro.counts().clamp(min=1.0)  # SimPO's implicit reward is the mean; IPO's is the sum
        chosen, rejected = pairs.split(rewards)
        logp_chosen, logp_rejected = pairs.split(logps)
        by_pair = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "logps/chosen": logp_chosen,
            "logps/rejected": logp_rejected,
        }
        return pairs.means(by_pair, micro)

    def _log_ratios(self, logps: Tensor, micro: MicroBatch) -> Tensor:
        return logps - micro.values[REFERENCE] if self._variant.reference else logps
