"""Loss on the held-out set: Σ over all counted tokens of all rows, divided once. Independent of ranks and
micro-batches.

Called by the loop every N steps and at the end. It draws no random numbers, so training goes on as if it had not been.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from posttrain_trainer.algorithms.base import Algorithm
from posttrain_trainer.batching import Share, whole_set
from posttrain_trainer.engine import Engine
from posttrain_trainer.metrics import Metrics
from posttrain_trainer.objective import Tally, local_weights, weights_of
from posttrain_trainer.reference import Reference
from posttrain_trainer.runtime import Runtime
from posttrain_trainer.tokenset import TokenSet


class Evaluation(Protocol):
    """Measures the policy on the held-out set."""

    def run(self, engine: Engine, stopping: Callable[[], bool]) -> Metrics | None:
        """Metrics called eval_*; None where `stopping` became true. All ranks call it together."""


@dataclass(frozen=True)
class Evaluator:
    """The evaluation set with what is needed to score it."""

    tokens: TokenSet
    part: Share
    algorithm: Algorithm
    runtime: Runtime
    reference: Reference | None = None

    def run(self, engine: Engine, stopping: Callable[[], bool]) -> Metrics | None:
        """eval_loss and the algorithm's metrics as eval_*; None where `stopping` became true."""
        engine.train(False)
        try:
            return self._score(engine, stopping)
        finally:
            engine.train()

    @torch.no_grad()
    def _score(self, engine: Engine, stopping: Callable[[], bool]) -> Metrics | None:
        tally, weights = Tally(self.algorithm), [0.0] * len(self.algorithm.terms)
        for cpu_micro in whole_set(self.tokens, self.part):
            if stopping():
                return None
            weights = [sum(each) for each in zip(weights, local_weights(self.algorithm, [cpu_micro]), strict=True)]
            micro = cpu_micro.to(self.runtime.device)
            if self.reference is not None:
                micro = self.reference.attach(micro)
            tally.add(engine.forward(micro), micro)
        summed = weights_of(self.algorithm, self.runtime.control.sum(weights))
        metrics, _ = tally.reduce(self.runtime.control, summed)
        return {f"eval_{name}": value for name, value in metrics.items()}
