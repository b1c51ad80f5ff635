"""Bounds of the job's own metrics: which are broken after a step, for how long, and what follows. Pure.

Called by the loop on rank 0, whose word all ranks follow: metrics of the clock differ from rank to rank. The counts
are part of the checkpoint's state, so that a resumed job goes on counting where the killed one stopped. It saves,
ends and reports nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from posttrain_api.guards import SAMPLER, GuardRule
from posttrain_api.measured import EVALUATION
from posttrain_api.reasons import Reason
from posttrain_api.records import Warned
from posttrain_trainer.errors import TrainerFailure

MOST = 512
"""Characters of a warning."""
_SHOWN = 30
"""Names of metrics that a message lists."""


@dataclass(frozen=True)
class Streak:
    """How often running a rule was broken, and since which step; 0 and 0 while it is kept."""

    count: int = 0
    since: int = 0


@dataclass(frozen=True)
class GuardState:
    """Streaks by rule; none: nothing was looked at yet. `good`: step of the newest checkpoint from before the first
    broken step of a rule that ends or suspends the job, None where there is none."""

    streaks: tuple[Streak, ...] = ()
    good: int | None = None

    def to_wire(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"streaks": [[each.count, each.since] for each in self.streaks], "good": self.good}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any] | None) -> GuardState:
        """What `to_wire` gave; nothing of a release without guards."""
        if wire is None:
            return cls()
        return cls(tuple(Streak(*each) for each in wire["streaks"]), wire["good"])


@dataclass(frozen=True)
class Tripped:
    """A rule was broken for long enough. `good`: the step of the checkpoint that is from before it."""

    action: Literal["Fail", "Suspend"]
    message: str
    since: int
    good: int | None


@dataclass(frozen=True)
class Looked:
    """After a step: how things stand, what is wrong while training goes on, and what ends or suspends it."""

    state: GuardState
    warning: Warned | None = None
    tripped: Tripped | None = None


@dataclass(frozen=True)
class Guards:
    """The job's rules. `silent_steps`: at the beginning, in which the policy does not learn and measures nothing."""

    rules: tuple[GuardRule, ...] = ()
    silent_steps: int = 0

    def look(self, state: GuardState, step: int, metrics: Mapping[str, float], saved: int | None) -> Looked:
        """saved: the step of the newest checkpoint. TrainerFailure(GuardTripped) where a rule names what this step
        should have and has not."""
        self._check_names(step, metrics)
        before = state.streaks or (Streak(),) * len(self.rules)
        now = [self._counted(*pair, step, metrics) for pair in zip(self.rules, before, strict=True)]
        good = self._good(state, before, now, saved)
        due = [number for number, rule in enumerate(self.rules) if now[number].count >= rule.for_steps]
        tripped = self._tripped([self._told(number, now[number], step, metrics) for number in due], due, now, good)
        if tripped is not None and tripped.action == "Suspend":  # resumed, each rule has all its steps again
            now = [Streak()] * len(self.rules)
        return Looked(GuardState(tuple(now), good), self._warning(due, now, step, metrics), tripped)

    def _check_names(self, step: int, metrics: Mapping[str, float]) -> None:
        evaluated = any(name.startswith(EVALUATION) for name in metrics)
        for number, rule in enumerate(self.rules):
            due = evaluated if rule.metric.startswith(EVALUATION) else step > self.silent_steps
            if due and rule.metric not in metrics:
                known = sorted(name for name in metrics if not name.startswith("time/"))
                more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
                raise TrainerFailure(
                    Reason.GUARD_TRIPPED,
                    f"spec.guards.rules[{number}].metric is {rule.metric!r}, which step {step} did not measure; it has "
                    f"{', '.join(known[:_SHOWN])}{more}. Take one of these names, or remove the rule.",
                )

    def _counted(self, rule: GuardRule, streak: Streak, step: int, metrics: Mapping[str, float]) -> Streak:
        """A step that does not measure the metric says nothing."""
        if rule.metric not in metrics:
            return streak
        if not broken(rule, metrics[rule.metric]):
            return Streak()
        return Streak(streak.count + 1, streak.since or step)

    def _good(
        self, state: GuardState, before: Sequence[Streak], now: Sequence[Streak], saved: int | None
    ) -> int | None:
        """A checkpoint is known to be good once the step after it has kept the rules; the first broken step takes what
        there is, where none is known to be good."""
        was_broken, is_broken = (
            any(each.count for rule, each in zip(self.rules, streaks, strict=True) if rule.action != "Warn")
            for streaks in (before, now)
        )
        return saved if not is_broken or (state.good is None and not was_broken) else state.good

    def _tripped(
        self, told: Sequence[str], due: Sequence[int], now: Sequence[Streak], good: int | None
    ) -> Tripped | None:
        """Fail before Suspend, else the first in the order of the rules."""
        for action in ("Fail", "Suspend"):
            for number, message in zip(due, told, strict=True):
                if self.rules[number].action == action:
                    return Tripped(action, message, now[number].since, good)
        return None

    def _warning(
        self, due: Sequence[int], now: Sequence[Streak], step: int, metrics: Mapping[str, float]
    ) -> Warned | None:
        warned = [number for number in due if self.rules[number].action == "Warn" and now[number].count]
        if not warned:
            return None
        first = self.rules[warned[0]]
        told = "; ".join(self._told(number, now[number], step, metrics) for number in warned)
        reason: Literal["GuardWarned", "SamplerMismatch"] = "GuardWarned"
        if first.metric.removeprefix(EVALUATION).startswith(SAMPLER):
            reason = "SamplerMismatch"
        return Warned(reason=reason, message=told[:MOST], step=now[warned[0]].since)

    def _told(self, number: int, streak: Streak, step: int, metrics: Mapping[str, float]) -> str:
        """`kl was 12.5 at step 8, above 5 in 3 steps running since step 6 (spec.guards.rules[0])`."""
        rule = self.rules[number]
        bound = f"above {rule.above:g}" if rule.above is not None else f"below {rule.below:g}"
        value = metrics.get(rule.metric)
        shown = f"{rule.metric} was {value:.6g} at step {step}" if value is not None else f"{rule.metric} was left"
        since = "" if streak.count < 2 else f" in {streak.count} steps running since step {streak.since}"
        return f"{shown}, {bound}{since} (spec.guards.rules[{number}])"


def broken(rule: GuardRule, value: float) -> bool:
    """What is no finite number is beyond every bound."""
    if not math.isfinite(value):
        return True
    return value > rule.above if rule.above is not None else rule.below is not None and value < rule.below


def ending(tripped: Tripped, saved_at: str | None) -> TrainerFailure:
    """How the job ends. saved_at: URI of the checkpoint to go on from: the good one, or a suspended job's last."""
    if tripped.action == "Suspend":
        return TrainerFailure(
            Reason.GUARD_SUSPENDED,
            f"{tripped.message}; the state is saved at {saved_at}. Set spec.suspend to true, and to false once the job "
            "shows UserSuspended, to go on from there.",
        )
    kept = f"No checkpoint is from before step {tripped.since}"
    if saved_at is not None:
        kept = f"The checkpoint from before it is kept: {saved_at} (step {tripped.good})"
    return TrainerFailure(
        Reason.GUARD_TRIPPED,
        f"{tripped.message}. {kept}. Lower training.learningRate, or change the rule, and run the job under another "
        "name" + ("." if saved_at is None else " with checkpoint.from.uri."),
    )
