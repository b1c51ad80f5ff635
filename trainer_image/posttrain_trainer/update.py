"""One optimizer update: forward and backward of every micro-batch for whoever learns, then the step of each engine.

Called by the loop. Each term of a loss is a sum that is divided once by its weight over all micro-batches and ranks of
the update, so it depends neither on how rows are cut nor on how many ranks there are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from posttrain_trainer.errors import NotFinite
from posttrain_trainer.learner import Learner
from posttrain_trainer.metrics import Metrics, Phases
from posttrain_trainer.microbatch import MicroBatch
from posttrain_trainer.objective import Tally, Weights, local_weights, scaled, weights_of
from posttrain_trainer.reference import Reference
from posttrain_trainer.runtime import Runtime
from posttrain_trainer.signs import mark

BUSY = ("data", "rollout", "reward", "reference", "scoring", "forward_backward")
"""Phases in which a rank works by itself; in the others it waits for the slowest."""


@dataclass(frozen=True)
class Updated:
    """metrics of the policy, and of others under their name; tokens over all ranks; slowest: the rank that was busy
    longest since the phases were last taken."""

    metrics: Metrics
    tokens: float
    slowest: int


@dataclass
class _Turn:
    """A learner's part of an update."""

    learner: Learner
    weights: Weights
    tally: Tally

    def learn(self, micro: MicroBatch, ranks: int) -> None:
        engine, terms = self.learner.engine, self.learner.algorithm.terms
        with engine.scope():
            losses = self.tally.add(engine.forward(micro), micro)
            engine.backward(scaled(losses, terms, self.weights, ranks))


@dataclass(frozen=True)
class Updater:
    """Updates `learners`, the policy first. reference: says what an algorithm compares each micro-batch with."""

    learners: Sequence[Learner]
    reference: Reference | None
    runtime: Runtime
    phases: Phases

    def run(
        self, micros: Sequence[MicroBatch], step: int, rate: float, stopping: Callable[[], bool] | None
    ) -> Updated | None:
        """None where `stopping`, asked before each micro-batch, became true: no engine was stepped then. rate: the
        schedule's at `step`. TrainerFailure(NonFinite) on every rank."""
        learners = [learner for learner in self.learners if step >= learner.idle_steps]
        turns, tokens = self._turns(learners, micros)
        for micro in micros:
            if stopping is not None and stopping():
                return None
            mark()
            compared = self._compared(micro.to(self.runtime.device))
            with self.phases.measure("forward_backward"):
                for turn in turns:
                    turn.learn(compared, self.runtime.ranks)
        metrics, slowest = self._reduce(turns, step)
        try:
            norms = self._step(learners, rate)
        except NotFinite as failure:
            losses = (f"{name} was {value:.6g}" for name, value in metrics.items() if name.endswith("loss"))
            raise failure.at(step + 1, f"of all ranks together; {', '.join(losses)}") from failure
        return Updated({**metrics, **norms}, tokens, slowest)

    def _turns(self, learners: Sequence[Learner], micros: Sequence[MicroBatch]) -> tuple[list[_Turn], float]:
        """N of each term of each learner, and tokens: over all micro-batches and ranks, in one small all-reduce."""
        local = [local_weights(learner.algorithm, micros) for learner in learners]
        counted = sum(micro.tokens for micro in micros)
        *sums, tokens = self.runtime.control.sum([*itertools.chain(*local), float(counted)])
        turns = []
        for learner, known in zip(learners, local, strict=True):
            mine, sums = sums[: len(known)], sums[len(known) :]
            turns.append(_Turn(learner, weights_of(learner.algorithm, mine), Tally(learner.algorithm)))
        return turns, tokens

    def _compared(self, micro: MicroBatch) -> MicroBatch:
        """With what the reference says of it, where there is one."""
        if self.reference is None:
            return micro
        with self.phases.measure("reference"):
            return self.reference.attach(micro)

    def _step(self, learners: Sequence[Learner], rate: float) -> Metrics:
        """The gradient norm of each; an idle learner on an engine of its own has no gradient and no step."""
        metrics: Metrics = {}
        with self.phases.measure("optimizer"):
            for learner in self.learners:
                learner.engine.set_learning_rate(rate * learner.rate if learner in learners else 0.0)
            for learner in self.learners:
                if learner not in learners and not learner.engine.shared:
                    continue
                info = learner.engine.step()
                if learner in learners:
                    metrics[_named(learner, "grad_norm", self.learners)] = info.grad_norm
        return metrics

    def _reduce(self, turns: Sequence[_Turn], step: int) -> tuple[Metrics, int]:
        """Losses and the algorithms' metrics over all ranks; also which rank was the slowest. A loss that is not finite
        ends all ranks here, before anything is applied."""
        busy = [0.0] * self.runtime.ranks
        busy[self.runtime.rank] = sum(map(self.phases.seconds, BUSY))
        metrics: Metrics = {}
        summed: list[float] = []
        for turn in turns:
            further = [] if summed else busy  # once is enough
            found, more = turn.tally.reduce(self.runtime.control, turn.weights, further)
            summed = summed or more
            if not math.isfinite(found["loss"]):
                name = _named(turn.learner, "loss", self.learners)
                raise NotFinite(name).at(step + 1, self._whose(turn.tally))
            metrics |= {_named(turn.learner, name, self.learners): value for name, value in found.items()}
        return metrics, summed.index(max(summed))

    def _whose(self, tally: Tally) -> str:
        """Which ranks have it from their own rows."""
        mine: list[bool] = self.runtime.control.gather(tally.finite())
        ranks = [str(rank) for rank, fine in enumerate(mine) if not fine]
        return f"by the rows of rank {', '.join(ranks)}" if ranks else "the ranks' sums are finite, their sum is not"


def _named(learner: Learner, metric: str, learners: Sequence[Learner]) -> str:
    """Loss and gradient norm of further learners under their name; other metrics have names of their own."""
    own = metric in ("loss", "grad_norm") or metric.startswith("loss/")
    return metric if learner is learners[0] or not own else f"{learner.name}/{metric}"


def mean_metrics(updates: Sequence[Updated]) -> Metrics:
    """Of each metric over the updates of a step that have it."""
    names = dict.fromkeys(name for update in updates for name in update.metrics)
    found = {name: [update.metrics[name] for update in updates if name in update.metrics] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items()}
