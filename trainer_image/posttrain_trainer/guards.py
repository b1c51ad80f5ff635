"""Bounds of the job's own metrics: which are broken after a step, for how long, and what follows. Pure.

Called by the loop on rank 0, whose word all ranks follow: metrics of the clock differ from rank to rank. The counts
are part of the checkpoint's state, so that a resumed job goes on counting where the killed one stopped. It saves,
ends and reports nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
    """Streaks by rule; none: nothing was looked at yet. `good`: step of the newest checkpoint whose next
    step kept the rules that end or suspend the job (else the newest from before their first broken step), None where
    there is none. `warning`: of the rules `warned`; it says how it began, and stays as it is while they are broken.
    `step`: the last one that was looked at."""

    step: int = 0
    streaks: tuple[Streak, ...] = ()
    good: int | None = None
    warned: tuple[int, ...] = ()
    warning: Warned | None = None

    def to_wire(self) -> dict[str, Any]:
        """Plain JSON."""
        streaks = [[each.count, each.since] for each in self.streaks]
        warning = None if self.warning is None else self.warning.to_wire()
        warned = {"warned": list(self.warned), "warning": warning}
        return {"step": self.step, "streaks": streaks, "good": self.good, **warned}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any] | None) -> GuardState:
        """What `to_wire` gave; nothing of a release without guards."""
        if wire is None:
            return cls()
        warning = None if wire["warning"] is None else Warned.model_validate(wire["warning"])
        streaks = tuple(Streak(*each) for each in wire["streaks"])
        return cls(wire["step"], streaks, wire["good"], tuple(wire["warned"]), warning)


@dataclass(frozen=True)
class Tripped:
    """A rule was broken for long enough. `good`: the step of the checkpoint that is from before it."""

    action: Literal["Fail", "Suspend"]
    message: str
    since: int
    good: int | None


@dataclass(frozen=True)
class Looked:
    """After a step: how things stand, and what ends or suspends the job."""

    state: GuardState
    tripped: Tripped | None = None


@dataclass(frozen=True)
class Guards:
    """The job's rules. `silent_steps`: at the beginning, in which the policy does not learn and measures nothing."""

    rules: tuple[GuardRule, ...] = ()
    silent_steps: int = 0

    def look(self, state: GuardState, step: int, metrics: Mapping[str, float], saved: int | None) -> Looked:
        """saved: the step of the newest checkpoint. TrainerFailure(GuardTripped) where a rule names what this step
        should have and has not. A step that was looked at before it was saved is not counted twice."""
        if step == state.step:
            return Looked(state)
        self._check_names(step, metrics)
        before = state.streaks or (Streak(),) * len(self.rules)
        now = [self._counted(*pair, step, metrics) for pair in zip(self.rules, before, strict=True)]
        good = self._good(state, before, now, saved)
        told = {
            number: self._told(number, now[number], step, metrics)
            for number, rule in enumerate(self.rules)
            if now[number].count >= rule.for_steps
        }
        tripped = self._tripped(told, now, good)
        if tripped is not None and tripped.action == "Suspend":
            return Looked(GuardState(step, good=good), tripped)  # resumed, each rule has all its steps again
        return Looked(self._warn(replace(state, step=step, streaks=tuple(now), good=good), told), tripped)

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

    def _tripped(self, told: Mapping[int, str], now: Sequence[Streak], good: int | None) -> Tripped | None:
        """Fail before Suspend, else the first in the order of the rules."""
        actions: tuple[Literal["Fail", "Suspend"], ...] = ("Fail", "Suspend")
        for action in actions:
            for number, message in told.items():
                if self.rules[number].action == action:
                    return Tripped(action, message, now[number].since, good)
        return None

    def _warn(self, state: GuardState, told: Mapping[int, str]) -> GuardState:
        """With the warning that holds: a new one only where other rules are broken than before."""
        warned = tuple(number for number in told if self.rules[number].action == "Warn")
        if warned == state.warned:
            return state
        if not warned:
            return replace(state, warned=(), warning=None)
        reason: Literal["GuardWarned", "SamplerMismatch"] = "GuardWarned"
        if self.rules[warned[0]].metric.startswith(SAMPLER):
            reason = "SamplerMismatch"
        message = "; ".join(told[number] for number in warned)[:MOST]
        warning = Warned(reason=reason, message=message, step=state.streaks[warned[0]].since)
        return replace(state, warned=warned, warning=warning)

    def _told(self, number: int, streak: Streak, step: int, metrics: Mapping[str, float]) -> str:
        """`kl was 12.5 at step 8, above 5 in 3 steps running since step 6 (spec.guards.rules[0])`."""
        rule = self.rules[number]
        bound = f"above {rule.above:g}" if rule.above is not None else f"below {rule.below:g}"
        value = metrics.get(rule.metric)
        shown = f"{rule.metric} was {value:.6g} at step {step}" if value is not None else f"{rule.metric} is"
        since = "" if streak.count < 2 else f" in {streak.count} steps running since step {streak.since}"
        return f"{shown}, {bound}{since} (spec.guards.rules[{number}])"


@dataclass(frozen=True)
class Ending:
    """A guard's word. `lost`: how it is told where the checkpoint on its way does not arrive. `good`: others start from
    none after this step; None: from the newest."""

    failure: TrainerFailure
    lost: TrainerFailure
    good: int | None = None

    @classmethod
    def of(cls, tripped: Tripped, step: int, before: int | None, uri_of: Callable[[int], str]) -> Ending:
        """`step`: of the state as it is; `before`: what is good of the checkpoints that have arrived."""
        if tripped.action == "Suspend":
            said = ending(tripped, uri_of(step))
            return cls(said, said)
        said, lost = (
            ending(replace(tripped, good=good), None if good is None else uri_of(good))
            for good in (tripped.good, before)
        )
        return cls(said, lost, tripped.good)


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
