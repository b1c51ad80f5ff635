"""Guards as a table of steps: what is counted, when it is due, which checkpoint is good, and what is said."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain_api.guards import GuardRule
from posttrain_api.reasons import Reason
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.guards import Guards, GuardState, Looked, broken, ending

KL = GuardRule(metric="kl", above=5, for_steps=3)
NAN, INFINITE = float("nan"), float("inf")


def walk(guards: Guards, values: list[Any], saves: dict[int, int] | None = None) -> list[Looked]:
    """Looks at each step; `values`: of kl, or all metrics. `saves`: after which step which checkpoint is there. Through
    JSON after every step, as a checkpoint would."""
    found, state, saved = [], GuardState(), None
    for step, value in enumerate(values, start=1):
        metrics = value if isinstance(value, dict) else {"kl": value}
        looked = guards.look(state, step, metrics, saved)
        state = GuardState.from_wire(json.loads(json.dumps(looked.state.to_wire())))
        assert state == looked.state
        found.append(looked)
        saved = (saves or {}).get(step, saved)
    return found


@pytest.mark.parametrize(
    ("rule", "value", "found"),
    [
        (GuardRule(metric="kl", above=5), 5, False),
        (GuardRule(metric="kl", above=5), 5.01, True),
        (GuardRule(metric="kl", below=-1), -1, False),
        (GuardRule(metric="kl", below=-1), -1.01, True),
        (GuardRule(metric="kl", below=0), -0.5, True),
        (GuardRule(metric="kl", above=0), 0.5, True),
        (GuardRule(metric="kl", above=5), NAN, True),
        (GuardRule(metric="kl", below=5), INFINITE, True),
    ],
)
def test_beyond_the_bound(rule: GuardRule, value: float, found: bool) -> None:
    assert broken(rule, value) is found


def test_steps_must_follow_each_other() -> None:
    looked = walk(Guards((KL,)), [6, 6, 1, 7, 8, 9, 10])
    assert [each.tripped is not None for each in looked] == [False] * 5 + [True, True]
    tripped = looked[5].tripped
    assert tripped is not None
    assert (tripped.action, tripped.since) == ("Fail", 4)
    assert tripped.message == ("kl was 9 at step 6, above 5 in 3 steps running since step 4 (spec.guards.rules[0])")


@given(
    st.lists(st.floats(0, 10), max_size=30),
    st.integers(1, 5),
)
def test_it_trips_where_the_last_steps_are_all_beyond(values: list[float], steps: int) -> None:
    rule = KL.model_copy(update={"for_steps": steps})
    for number, looked in enumerate(walk(Guards((rule,)), values), start=1):
        last = values[max(0, number - steps) : number]
        assert (looked.tripped is not None) == (number >= steps and all(value > 5 for value in last))


def test_a_step_is_looked_at_once() -> None:
    """A job that was stopped after it has saved the step, and before the next one, looks at it again."""
    guards = Guards((KL,))
    first = guards.look(GuardState(), 1, {"kl": 6}, None).state
    assert guards.look(first, 1, {"kl": 6}, None).state == first


def test_what_is_not_measured_says_nothing() -> None:
    rule = GuardRule(metric="eval_loss", above=2, for_steps=2)
    values = [{"loss": 1}, {"loss": 1, "eval_loss": 3}, {"loss": 1}, {"loss": 1}, {"loss": 1, "eval_loss": 4}]
    looked = walk(Guards((rule,)), values)
    assert [each.tripped is not None for each in looked] == [False, False, False, False, True]
    assert looked[-1].tripped is not None
    assert "eval_loss was 4 at step 5, above 2 in 2 steps running since step 2" in looked[-1].tripped.message


@pytest.mark.parametrize(
    ("saves", "values", "good"),
    [
        ({}, [9, 9, 9], None),
        ({1: 1, 2: 2, 3: 3}, [1, 1, 1, 9, 9, 9], 2),  # step 4 measures what step 3 has made
        ({1: 1, 2: 2, 3: 3, 4: 4, 5: 5}, [1, 1, 1, 9, 9, 9], 2),
        ({2: 2}, [1, 1, 9, 9, 9], 2),  # the only one there is
        ({1: 1, 3: 3, 4: 4}, [9, 9, 1, 9, 9, 9], 1),
        ({4: 4}, [1, 1, 9, 9, 9], None),  # from after the first broken step
        ({1: 1, 2: 2}, [9, 9, 9], None),
    ],
)
def test_the_good_checkpoint(saves: dict[int, int], values: list[float], good: int | None) -> None:
    """The newest whose next step was in bounds; where there is none, the newest from before the first broken step."""
    tripped = walk(Guards((KL,)), values, saves)[-1].tripped
    assert tripped is not None
    assert tripped.good == good


def test_a_warning_spares_no_checkpoint() -> None:
    looked = walk(Guards((KL.model_copy(update={"action": "Warn"}),)), [1, 9, 9, 9, 9], {n: n for n in range(9)})
    assert looked[-1].state.good == 4


def test_a_warning_begins_stays_and_ends() -> None:
    looked = walk(Guards((KL.model_copy(update={"action": "Warn", "for_steps": 2}),)), [6, 7, 8, 1, 6])
    warnings = [each.state.warning for each in looked]
    assert [warning is not None for warning in warnings] == [False, True, True, False, False]
    assert warnings[1] == warnings[2], "what begins a warning is said; it does not change at every step"
    assert warnings[1] is not None
    assert (warnings[1].reason, warnings[1].step) == ("GuardWarned", 1)
    assert "kl was 7 at step 2, above 5" in warnings[1].message
    assert not any(each.tripped for each in looked)


def test_a_sampler_that_says_other_log_probabilities() -> None:
    metric = "sampling/sampling_logp_difference/mean"
    rules = (GuardRule(metric=metric, above=0.1, action="Warn"), KL.model_copy(update={"action": "Warn"}))
    looked = walk(Guards(rules), [{metric: 0.3, "kl": 9}, {metric: 0.3, "kl": 9}, {metric: 0.3, "kl": 9}])
    first, *_, last = (each.state.warning for each in looked)
    assert first is not None
    assert last is not None
    assert first.reason == last.reason == "SamplerMismatch"
    assert "; kl was 9 at step 3" in last.message


def test_fail_goes_before_suspend_and_suspend_before_warn() -> None:
    one = KL.model_copy(update={"for_steps": 1})
    rules = [one.model_copy(update={"action": action}) for action in ("Warn", "Suspend", "Fail")]
    for kept, action in ((rules, "Fail"), (rules[:2], "Suspend")):
        tripped = walk(Guards(tuple(kept)), [9])[0].tripped
        assert tripped is not None
        assert tripped.action == action


def test_a_suspended_job_has_all_its_steps_again() -> None:
    looked = walk(Guards((KL.model_copy(update={"action": "Suspend"}),)), [9] * 7)
    assert [each.tripped is not None for each in looked] == [False, False, True, False, False, True, False]


@pytest.mark.parametrize(
    ("rule", "steps"),
    [
        (KL, [{"loss": 1.0, "time/data": 2.0}]),
        (GuardRule(metric="eval_accuracy", below=0.5), [{"loss": 1.0}, {"loss": 1.0, "eval_loss": 2.0}]),
    ],
)
def test_a_metric_that_is_not_there_is_never_ignored(rule: GuardRule, steps: list[dict[str, float]]) -> None:
    with pytest.raises(TrainerFailure) as caught:
        walk(Guards((rule,)), steps)
    assert caught.value.reason is Reason.GUARD_TRIPPED
    assert f"spec.guards.rules[0].metric is '{rule.metric}'" in caught.value.message
    assert "loss. Take one of these names" in caught.value.message


def test_while_only_the_critic_learns_the_policy_measures_nothing() -> None:
    guards = Guards((KL,), silent_steps=2)
    assert [each.state.streaks[0].count for each in walk(guards, [{"reward": 1.0}, {"reward": 1.0}, 9])] == [0, 0, 1]
    with pytest.raises(TrainerFailure, match="which step 3 did not measure"):
        walk(guards, [{"reward": 1.0}] * 3)


def test_how_a_job_ends() -> None:
    failed = walk(Guards((KL,)), [1, 1, 9, 9, 9], {1: 1})[-1].tripped
    assert failed is not None
    said = ending(failed, "pvc://runs/a/u/checkpoints/step-000001")
    assert said.reason is Reason.GUARD_TRIPPED
    assert "is kept: pvc://runs/a/u/checkpoints/step-000001 (step 1)" in said.message
    assert "checkpoint.from.uri" in said.message
    assert "No checkpoint is from before step 3" in ending(failed, None).message
    held = walk(Guards((KL.model_copy(update={"action": "Suspend"}),)), [9, 9, 9])[-1].tripped
    assert held is not None
    said = ending(held, "pvc://runs/a/u/checkpoints/step-000003")
    assert said.reason is Reason.GUARD_SUSPENDED
    assert "saved at pvc://runs/a/u/checkpoints/step-000003. Set spec.suspend to true" in said.message
