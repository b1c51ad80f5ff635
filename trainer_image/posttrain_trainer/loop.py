"""The one loop of every stage: rows → micro-batches → gradient → step → measure → evaluate → save.

Called by the worker. Each term of the loss is a sum that is divided once by its weight over all micro-batches and
ranks of the step, so the update depends neither on how rows are cut nor on how many ranks there are. Ranks agree
before each micro-batch whether to stop: then the half-done step is dropped and the state before it is saved. The
loop knows no objective and no DeepSpeed.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

from posttrain_trainer.algorithms.base import Algorithm
from posttrain_trainer.batching import Feed
from posttrain_trainer.best import Judge
from posttrain_trainer.checkpoint import Checkpoints, Saved, State, random_state
from posttrain_trainer.engine import Engine, non_finite
from posttrain_trainer.evaluate import Evaluator
from posttrain_trainer.metrics import Metrics, Phases, memory_bytes
from posttrain_trainer.microbatch import MicroBatch
from posttrain_trainer.objective import StartLoss, Tally, Weights, local_weights, scaled, weights_of
from posttrain_trainer.recorder import Recorder
from posttrain_trainer.reference import Reference
from posttrain_trainer.runtime import Runtime
from posttrain_trainer.schedule import Schedule


@dataclass(frozen=True)
class Parts:
    """What the loop drives."""

    engine: Engine
    feed: Feed
    algorithm: Algorithm
    checkpoints: Checkpoints
    recorder: Recorder
    evaluator: Evaluator | None = None
    reference: Reference | None = None
    start: StartLoss | None = None
    """Where policy and reference begin as the same model."""

    @property
    def saved(self) -> Saved:
        """What a checkpoint holds of the roles that learn."""
        return self.engine


@dataclass(frozen=True)
class Course:
    """How long, how fast, and when to evaluate and save. None: only at the end. `judge`: says which is the best."""

    schedule: Schedule
    eval_every_steps: int | None
    save_every_steps: int | None
    save_every_seconds: float
    judge: Judge | None = None

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return self.schedule.total_steps


class Loop:
    """Runs from `state` to the end of the course."""

    def __init__(self, parts: Parts, course: Course, runtime: Runtime, state: State) -> None:
        self.state = state
        self._parts = parts
        self._course = course
        self._runtime = runtime
        self._phases = Phases()
        self._saved_at = time.monotonic()

    @property
    def lines_written(self) -> int:
        """Steps whose line is in metrics.jsonl already; the last one's is not where its evaluation was interrupted."""
        return self.state.step - 1 if self._evaluation_missing() else self.state.step

    def run(self) -> bool:
        """True at the end; False where the ranks agreed to stop, with everything saved. TrainerFailure(NonFinite)."""
        if self._evaluation_missing() and not self._conclude():
            return self._leave(random_state())
        while self.state.step < self._course.total_steps:
            before = random_state()
            if not self._train():
                return self._leave(before)
            if not self._conclude():
                return self._leave(random_state())
        return True

    def _train(self) -> bool:
        """One optimizer step; False where it was dropped."""
        parts, step, start = self._parts, self.state.step, time.perf_counter()
        with self._phases.measure("data"):
            micros = parts.feed.micros(step)
        weights, tokens = self._count(micros)
        tally = Tally(parts.algorithm)
        for micro in micros:
            if self._stopping():
                return False
            compared = self._compared(micro.to(self._runtime.device))
            with self._phases.measure("forward_backward"):
                losses = tally.add(parts.engine.forward(compared), compared)
                parts.engine.backward(scaled(losses, parts.algorithm.terms, weights, self._runtime.ranks))
        with self._phases.measure("optimizer"):
            parts.engine.set_learning_rate(self._course.schedule.rate(step))
            info = parts.engine.step()
        metrics = {"grad_norm": info.grad_norm, "learning_rate": self._course.schedule.rate(step)}
        metrics = {**self._reduce(tally, weights), **metrics}
        if step == 0 and parts.start is not None:
            parts.start.check(metrics)
        self._advance(metrics, tokens, time.perf_counter() - start)
        return True

    def _count(self, micros: list[MicroBatch]) -> tuple[Weights, float]:
        """N of each term, and tokens: over all micro-batches and ranks, in one small all-reduce."""
        local = local_weights(self._parts.algorithm, micros)
        *sums, tokens = self._runtime.control.sum([*local, sum(micro.tokens for micro in micros)])
        return weights_of(self._parts.algorithm, sums), tokens

    def _compared(self, micro: MicroBatch) -> MicroBatch:
        """With what the reference says of it, where there is one."""
        if self._parts.reference is None:
            return micro
        with self._phases.measure("reference"):
            return self._parts.reference.attach(micro)

    def _reduce(self, tally: Tally, weights: Weights) -> Metrics:
        """Loss and the algorithm's metrics over all ranks; also which rank was the slowest."""
        busy = [0.0] * self._runtime.ranks
        busy[self._runtime.rank] = sum(map(self._phases.seconds, ("data", "reference", "forward_backward")))
        metrics, busy = tally.reduce(self._runtime.control, weights, busy)
        self._parts.recorder.slowest_rank = busy.index(max(busy))
        if not math.isfinite(metrics["loss"]):
            raise non_finite("the loss")
        return metrics

    def _advance(self, metrics: Metrics, tokens: float, seconds: float) -> None:
        step, total = self.state.step + 1, self.state.tokens + int(tokens)
        metrics |= {
            "epoch": self._parts.feed.sampler.epoch(step),
            "num_tokens": float(total),
            "step_time": seconds,
            "tokens_per_second": tokens / seconds,
            "memory_bytes": memory_bytes(self._runtime.device),
            "skipped_steps": 0.0,
            **self._phases.take(),
        }
        self.state = replace(self.state, step=step, tokens=total, metrics=metrics)

    def _conclude(self) -> bool:
        """Evaluates, writes the step's line, saves, each where it is due; False where the ranks agreed to stop."""
        if self._evaluation_missing() and not self._evaluate():
            return False
        self._parts.recorder.step(self.state.step, self.state.metrics or {})
        course, step = self._course, self.state.step
        late = self._runtime.first and time.monotonic() - self._saved_at >= course.save_every_seconds
        stop, due = self._runtime.control.max([float(self._runtime.stop.requested), float(late)])
        every = course.save_every_steps
        chosen = self.state.best is not None and self.state.best.step == step
        if due or chosen or step == course.total_steps or (every is not None and step % every == 0):
            self._save(random_state())
        return not stop or step == course.total_steps

    def _evaluation_missing(self) -> bool:
        step, every = self.state.step, self._course.eval_every_steps
        if self._parts.evaluator is None or self.state.metrics is None or "eval_loss" in self.state.metrics:
            return False
        return step == self._course.total_steps or (every is not None and step % every == 0)

    def _evaluate(self) -> bool:
        assert self._parts.evaluator is not None
        self._parts.recorder.phase("Evaluating")
        with self._phases.measure("evaluation"):
            result = self._parts.evaluator.run(self._parts.engine, self._stopping)
        self._parts.recorder.phase("Training")
        if result is None:
            return False
        judge, best = self._course.judge, self.state.best
        if judge is not None:
            best = judge.choose(best, self.state.step, result)
        self.state = replace(self.state, metrics=_times_last({**(self.state.metrics or {}), **result}), best=best)
        return True

    def _stopping(self) -> bool:
        return self._runtime.control.any(self._runtime.stop.requested)

    def _save(self, generators: dict[str, Any]) -> None:
        self._parts.recorder.phase("Saving")
        self._parts.recorder.sync()
        with self._phases.measure("checkpoint"):
            saved = self._parts.checkpoints.save(self._parts.saved, self.state, generators)
        self._parts.recorder.checkpoint(saved, self.state.best)
        self._parts.recorder.phase("Training")
        self._saved_at = time.monotonic()

    def _leave(self, generators: dict[str, Any]) -> bool:
        last = self._parts.checkpoints.last
        if self.state.step > 0 and (last is None or last.step != self.state.step):
            self._save(generators)
        return False


def _times_last(metrics: Metrics) -> Metrics:
    """Where a report has no room for all, the times of phases are what is left out."""
    return dict(sorted(metrics.items(), key=lambda item: item[0].startswith("time/")))
