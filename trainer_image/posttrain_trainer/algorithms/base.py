"""What the loop needs of an algorithm. Algorithms do not inherit from each other and do not know the loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from posttrain_api.measured import SAMPLING_DIFFERENCE
from posttrain_trainer.experience import OLD, ROLLOUT, Experience, Floats
from posttrain_trainer.microbatch import MicroBatch

Needs = Literal["logp", "score", "value"]
"""What the model's forward returns: `losses.Scores` of the counted tokens, one score per sequence, or one value per
counted token."""

Measures = dict[str, tuple[Tensor, Tensor]]
"""Metric → (sum, weight), both without gradient; reported as Σ sum / Σ weight over all micro-batches and ranks."""


def sampler_difference(logp: Tensor, micro: MicroBatch) -> Measures:
    """|log p of the trainer − log p of the rollout engine| over tokens, of a step with one update: the policy that
    learns is then still the one that sampled. Nothing where the collector has it already. logp: without gradient."""
    if OLD in micro.each or ROLLOUT not in micro.each:
        return {}
    difference = ((logp - micro.each[ROLLOUT]) * micro.weights).abs()
    return {SAMPLING_DIFFERENCE: (difference.sum(), micro.weights.sum())}


class Algorithm(Protocol):
    """Named terms, each a sum with its own weight; the loop divides each by its weight over the whole step and all
    ranks."""

    @property
    def needs(self) -> Needs:
        """What it works on."""
        ...

    @property
    def terms(self) -> Mapping[str, float]:
        """Loss terms and their coefficients, the main one first. loss = Σ coefficient · Σ w·loss / Σ w."""
        ...

    def weights(self, micro: MicroBatch) -> dict[str, float]:
        """Σ w of each term, known before the forward."""

    def losses(self, out: Any, micro: MicroBatch) -> dict[str, Tensor]:
        """Σ w·loss of each term, with gradient."""

    def measures(self, out: Any, micro: MicroBatch) -> Measures:
        """What is reported beside the loss."""


@dataclass(frozen=True)
class Estimated:
    """What an online algorithm makes of a rollout: numbers by token for the update (they reach `MicroBatch.each`), and
    metrics of the rollout as a whole."""

    each: Mapping[str, Floats]
    metrics: Mapping[str, float]


class OnlineAlgorithm(Algorithm, Protocol):
    """The policy's part of PPO, GRPO or RLOO: what it wants of a rollout, and what it makes of it."""

    @property
    def group_size(self) -> int:
        """Completions per prompt."""
        ...

    @property
    def passes(self) -> int:
        """How often the updates of a step go over its samples."""
        ...

    @property
    def needs_reference(self) -> bool:
        """Whether `estimate` or `losses` read the reference's log-probabilities."""
        ...

    @property
    def needs_old(self) -> bool:
        """Whether `estimate` or `losses` read the log-probabilities before the step's updates even where the step has
        one update only: there the policy's own, detached, are the same."""
        ...

    def estimate(self, experience: Experience, kl_coefficient: float) -> Estimated:
        """Advantages and whatever else the update needs. Pure, and on all samples of the rollout. kl_coefficient: the
        one that holds now, where an algorithm has an adaptive one."""
