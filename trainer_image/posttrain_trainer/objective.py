"""What the micro-batches of a step, or of an evaluation, add up to: the terms of the loss and what is reported.

Called by the loop and the evaluation, so that both divide alike: every sum once, by its weight over all micro-batches
and ranks. A mean of means would depend on how rows are cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from posttrain_api.reasons import Reason
from posttrain_trainer.algorithms.base import Algorithm
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.metrics import Metrics, Totals
from posttrain_trainer.microbatch import MicroBatch
from posttrain_trainer.runtime import Control

Weights = dict[str, float]
"""N of each term, over all micro-batches and ranks; at least 1, so that nothing is divided by zero."""


class Tally:
    """Sums of one rank; they stay on the device until they are reduced."""

    def __init__(self, algorithm: Algorithm) -> None:
        self._algorithm = algorithm
        self._totals = Totals()

    def add(self, out: Any, micro: MicroBatch) -> dict[str, Tensor]:
        """Counts a micro-batch; its loss terms, with gradient. ValueError where a term and a metric have one name: they
        would be added up."""
        losses = self._algorithm.losses(out, micro)
        self._totals.add(losses)
        for name, (value, weight) in self._algorithm.measures(out, micro).items():
            if name in losses:
                raise ValueError(f"{name!r} is a term of the loss and a metric")
            self._totals.add({name: value, _weight(name): weight})
        return losses

    def finite(self) -> bool:
        """Whether this rank's sums are numbers."""
        return all(map(math.isfinite, self._totals.read()[1]))

    def reduce(self, control: Control, weights: Weights, further: Sequence[float] = ()) -> tuple[Metrics, list[float]]:
        """`loss`, `loss/<term>` where there are several, and the algorithm's metrics over all ranks, and the sums of
        `further`; one small all-reduce."""
        names, values = self._totals.read()
        reduced = control.sum([*values, *further])
        sums = dict(zip(names, reduced, strict=False))
        terms = self._algorithm.terms
        parts = {term: sums.pop(term) / weights[term] for term in terms}
        metrics = {"loss": sum(factor * parts[term] for term, factor in terms.items())}
        if len(terms) > 1:
            metrics |= {f"loss/{term}": value for term, value in parts.items()}
        shown = [name for name in sums if not name.endswith(_WEIGHT)]
        metrics |= {name: sums[name] / (sums[_weight(name)] or 1.0) for name in shown}
        return metrics, reduced[len(names) :]


@dataclass(frozen=True)
class StartLoss:
    """What the main term must be before anything was learned: a reference that is not the starting policy shows here,
    and nowhere else."""

    term: str
    value: float
    tolerance: float

    def check(self, metrics: Metrics) -> None:
        """TrainerFailure where the first step's loss is another."""
        found = metrics.get(f"loss/{self.term}", metrics["loss"])
        if abs(found - self.value) <= self.tolerance:
            return
        raise TrainerFailure(
            Reason.MODEL_INCOMPATIBLE,
            f"Before the first step policy and reference are the same model, so the loss must be {self.value:.6g}; it "
            f"is {found:.6g}. This model gives one text different log-probabilities in two forwards (random numbers "
            "or batch statistics of its own), or the reference's cache is not of it. Use another model, or remove the "
            "prepared folder.",
        )


_WEIGHT = "\0weight"


def _weight(name: str) -> str:
    return name + _WEIGHT


def scaled(losses: Mapping[str, Tensor], terms: Mapping[str, float], weights: Weights, ranks: int) -> Tensor:
    """Σ coefficient · loss · ranks / N: what backward gets, because DeepSpeed averages the ranks' gradients."""
    parts = [losses[term] * (factor * ranks / weights[term]) for term, factor in terms.items()]
    return sum(parts[1:], parts[0])


def local_weights(algorithm: Algorithm, micros: Sequence[MicroBatch]) -> list[float]:
    """Σ w of each term on this rank, in order of the terms."""
    weighed = [algorithm.weights(micro) for micro in micros]
    return [sum(weights[term] for weights in weighed) for term in algorithm.terms]


def weights_of(algorithm: Algorithm, sums: Sequence[float]) -> Weights:
    """N of each term from the sums over all ranks."""
    return {term: max(value, 1.0) for term, value in zip(algorithm.terms, sums, strict=True)}
