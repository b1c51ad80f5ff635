"""The one loop of every stage: collect → updates → measure → evaluate → save.

Called by the worker. Ranks agree before each micro-batch, and in a rollout, whether to stop: then the half-done step
is dropped and the state before it is saved. Once a step has changed the weights it is finished first: there is no way
back to the state before it. The loop knows no objective and no DeepSpeed.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from posttrain_api.reasons import Reason
from posttrain_trainer.algorithms.base import Algorithm
from posttrain_trainer.best import Judge
from posttrain_trainer.checkpoint import Checkpoints
from posttrain_trainer.checkpoint_write import Content, Saved
from posttrain_trainer.engine import Engine
from posttrain_trainer.errors import AgreedFailure, TrainerFailure
from posttrain_trainer.evaluate import Evaluation
from posttrain_trainer.guards import Ending, Guards
from posttrain_trainer.learner import Learner
from posttrain_trainer.metrics import Metrics, Phases, memory_bytes, times_last
from posttrain_trainer.objective import StartLoss
from posttrain_trainer.randomness import random_state
from posttrain_trainer.recorder import Recorder
from posttrain_trainer.reference import Reference
from posttrain_trainer.roles import saved_of
from posttrain_trainer.runtime import Runtime
from posttrain_trainer.schedule import Schedule
from posttrain_trainer.signs import begin
from posttrain_trainer.state import State
from posttrain_trainer.steps import Collected, Source, Visit
from posttrain_trainer.update import Updated, Updater, mean_metrics

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """What the loop drives."""

    engine: Engine
    feed: Source
    algorithm: Algorithm
    checkpoints: Checkpoints
    recorder: Recorder
    evaluator: Evaluation | None = None
    reference: Reference | None = None
    start: StartLoss | None = None
    """Where policy and reference begin as the same model."""
    critic: Learner | None = None
    """Learns beside the policy."""
    policy_idle_steps: int = 0
    """Steps in which only the critic learns."""
    guards: Guards = field(default_factory=Guards)

    @property
    def learners(self) -> tuple[Learner, ...]:
        """The policy first."""
        policy = Learner("policy", self.engine, self.algorithm, idle_steps=self.policy_idle_steps)
        return (policy,) if self.critic is None else (policy, self.critic)

    @property
    def saved(self) -> Saved:
        """What a checkpoint holds of the roles that learn."""
        return saved_of(self.engine, None if self.critic is None else self.critic.engine)


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
        self._updater = Updater(parts.learners, parts.reference, runtime, self._phases)
        self._saved_at = time.monotonic()
        parts.recorder.warning = state.guards.warning

    @property
    def lines_written(self) -> int:
        """Steps whose line is in metrics.jsonl already; the last one's is not where its evaluation was interrupted."""
        return self.state.step - 1 if self._evaluation_missing() else self.state.step

    def run(self) -> bool:
        """True at the end; False where the ranks agreed to stop, with everything saved. TrainerFailure(NonFinite,
        GuardTripped, GuardSuspended) on every rank."""
        begin()
        try:
            return self._run()
        except AgreedFailure:
            self._rescue()
            raise

    def _run(self) -> bool:
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
        """The updates of one step; False where it was dropped."""
        parts, step, start = self._parts, self.state.step, time.perf_counter()
        collected = parts.feed.collect(Visit(step, self.state.online, self._phases, self._stopping))
        updates = None if collected is None else self._updates(collected, step)
        if collected is None or updates is None:
            return False
        metrics = {**mean_metrics(updates), "learning_rate": self._course.schedule.rate(step), **collected.metrics}
        if step == 0 and parts.start is not None:
            parts.start.check(metrics)
        parts.recorder.slowest_rank = updates[-1].slowest
        tokens = sum(update.tokens for update in updates) if collected.tokens is None else float(collected.tokens)
        self.state = replace(self.state, online=collected.online)
        self._advance(metrics, tokens, time.perf_counter() - start)
        return True

    def _updates(self, collected: Collected, step: int) -> list[Updated] | None:
        """None where the ranks agreed to stop before the first one was applied."""
        done: list[Updated] = []
        for micros in collected.updates:
            stopping = None if done else self._stopping
            update = self._updater.run(micros, step, self._course.schedule.rate(step), stopping)
            if update is None:
                return None
            done.append(update)
        return done

    def _advance(self, metrics: Metrics, tokens: float, seconds: float) -> None:
        step, total = self.state.step + 1, self.state.tokens + int(tokens)
        metrics |= {
            "epoch": self._parts.feed.epoch(step, self.state.online),
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
        ends = self._guard()
        self._parts.recorder.step(self.state.step, self.state.metrics or {})
        course, step = self._course, self.state.step
        late = self._runtime.first and time.monotonic() - self._saved_at >= course.save_every_seconds
        flags = (self._runtime.stop.requested, late, ends is not None, self._parts.checkpoints.copying)
        stop, due, ended, copying = self._runtime.control.max(list(map(float, flags)))
        if ended:
            self._end(ends)
        if not copying:
            self._land()
        every = course.save_every_steps
        chosen = self.state.best is not None and self.state.best.step == step
        if due or chosen or step == course.total_steps or (every is not None and step % every == 0):
            self._save(random_state(), beside=not stop and step < course.total_steps)
        return not stop or step == course.total_steps

    def _guard(self) -> Ending | None:
        """What the guards say ends the job, on rank 0: metrics of the clock differ from rank to rank."""
        guards, state, parts = self._parts.guards, self.state, self._parts
        if not guards.rules or not self._runtime.first:
            return None
        try:
            looked = guards.look(state.guards, state.step, state.metrics or {}, parts.checkpoints.newest_step)
        except TrainerFailure as failure:
            return Ending(failure, failure)
        self.state = replace(state, guards=looked.state)
        parts.recorder.warning = looked.state.warning
        if looked.tripped is None:
            return None
        checkpoints, good = parts.checkpoints, looked.tripped.good
        return Ending.of(looked.tripped, state.step, checkpoints.without_landing(good), checkpoints.uri_of)

    def _end(self, ends: Ending | None) -> NoReturn:
        """On every rank as rank 0 says. A suspended job goes on from the state as it is."""
        told = None if ends is None else (ends.failure.reason, ends.failure.message, ends.lost.message)
        reason, message, lost = self._runtime.control.gather(told)[0]
        good = None if ends is None else ends.good
        told_others = self._end_at(good)  # at once: nobody knows how long the landing takes
        if reason is Reason.GUARD_SUSPENDED:
            self._save(random_state())
        elif not self._rescue():  # it may be the good one
            message = lost
        if not told_others:  # a copy that has failed gives its room back
            self._end_at(good)
        raise TrainerFailure(reason, message)

    def _end_at(self, good: int | None) -> bool:
        """False where the storage takes not even that: the guard's word stands all the same, and names the step."""
        try:
            if good is not None:
                self._parts.checkpoints.end_at(good)
        except OSError as error:
            log.error("from where other jobs should start could not be written: %s", error)
            return False
        return True

    def _evaluation_missing(self) -> bool:
        step, every = self.state.step, self._course.eval_every_steps
        if self._parts.evaluator is None or self.state.metrics is None or _evaluated(self.state.metrics):
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
        self.state = replace(self.state, metrics=times_last({**(self.state.metrics or {}), **result}), best=best)
        return True

    def _stopping(self) -> bool:
        return self._runtime.control.any(self._runtime.stop.requested)

    def _save(self, generators: dict[str, Any], beside: bool = False) -> None:
        """`beside`: the copy to the storage may go on beside the training."""
        parts = self._parts
        parts.recorder.phase("Saving")
        self._land()
        parts.recorder.sync()
        content = Content(parts.saved, self.state, generators)
        with self._phases.measure("checkpoint"):
            if beside and parts.checkpoints.can_stage():
                parts.checkpoints.stage(content)
            else:
                parts.recorder.checkpoint(parts.checkpoints.save(content), self.state.best)
        parts.recorder.phase("Training")
        self._saved_at = time.monotonic()

    def _land(self) -> None:
        """Commits what was staged; where it is not on the storage yet, training waits for it."""
        parts = self._parts
        if parts.checkpoints.staged:
            if parts.checkpoints.copying:
                parts.recorder.phase("Saving")
            with self._phases.measure("checkpoint"):
                landed = parts.checkpoints.land()
            parts.recorder.checkpoint(landed.checkpoint, landed.state.best)

    def _rescue(self) -> bool:
        """Lands what is on its way where all ranks end for a reason of their own: that is told, whatever error of the
        storage comes up meanwhile. False where it is lost."""
        try:
            self._land()
        except (TrainerFailure, OSError, RuntimeError) as error:
            log.error("the checkpoint that was on its way is lost: %s", error)
            return False
        return True

    def _leave(self, generators: dict[str, Any]) -> bool:
        self._land()
        if self.state.step not in (0, self._parts.checkpoints.newest_step):
            self._save(generators)
        return False


def _evaluated(metrics: Metrics) -> bool:
    return any(name.startswith("eval_") for name in metrics)
