"""Loss on the held-out set: Σ over all counted tokens of all rows, divided once. Independent of ranks and
micro-batches.

Called by the loop every N steps and at the end. It draws no random numbers, so training goes on as if it had not been.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from posttrain_trainer.algorithms.base import Algorithm
from posttrain_trainer.batching import Share, whole_set
from posttrain_trainer.engine import Engine
from posttrain_trainer.metrics import Metrics, Totals
from posttrain_trainer.prepared import TokenSet
from posttrain_trainer.runtime import Runtime


class Evaluator:
    """The evaluation set with what is needed to score it."""

    def __init__(self, tokens: TokenSet, part: Share, algorithm: Algorithm, runtime: Runtime) -> None:
        self._tokens = tokens
        self._part = part
        self._algorithm = algorithm
        self._runtime = runtime

    def run(self, engine: Engine, stopping: Callable[[], bool]) -> Metrics | None:
        """eval_loss (nats per counted token) and the algorithm's metrics as eval_*; None where `stopping` became
        true."""
        engine.train(False)
        try:
            totals = self._score(engine, stopping)
        finally:
            engine.train()
        return None if totals is None else self._reduce(totals)

    @torch.no_grad()
    def _score(self, engine: Engine, stopping: Callable[[], bool]) -> Totals | None:
        totals = Totals()
        for cpu_micro in whole_set(self._tokens, self._part):
            if stopping():
                return None
            micro = cpu_micro.to(self._runtime.device)
            scores = engine.forward(micro)
            totals.add(self._algorithm.losses(scores, micro))
            totals.add(self._algorithm.sums(scores, micro))
            totals.add({"weight": micro.weights.sum()})
        return totals

    def _reduce(self, totals: Totals) -> Metrics:
        names, values = totals.read()
        reduced = dict(zip(names, self._runtime.control.sum(values), strict=True))
        weight = max(reduced.pop("weight"), 1.0)
        first = self._algorithm.terms[0]
        return {f"eval_{'loss' if name == first else name}": value / weight for name, value in reduced.items()}
