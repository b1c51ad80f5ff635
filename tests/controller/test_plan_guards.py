"""Guards in the plan: said ones, those that stage RL has besides, and names that the job does not measure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest

from posttrain_api.job import check
from posttrain_api.measured import NAME, measured
from posttrain_api.reasons import Reason
from posttrain_operator.plan.errors import PlanError
from posttrain_operator.plan.guards import SAMPLER_RULE, VARIANCE_RULE
from tests.api.online_cases import EVALUATED, EVERY_REWARD, PPO, RL, RLOO
from tests.api.rule_cases import EVAL, PREFERENCE, PRETRAIN, REWARD
from tests.api.rule_cases import job as manifest
from tests.controller.plan_kit import plan

KINDS: dict[str, Mapping[str, Any]] = {
    "pretrain": PRETRAIN,
    "sft": EVAL,
    "reward model": {**REWARD, **EVAL, "spec.rewardModel": {"centering": 0.1}},
    "dpo": {**PREFERENCE, **EVAL, "spec.preference": {"sftWeight": 0.1}},
    "simpo": {**PREFERENCE, "spec.algorithm": "SimPO"},
    "grpo": {**RL, **EVALUATED, "spec.grpo": {"beta": 0.1, "samplerCorrection": "TIS"}},
    "every reward": {**RL, "spec.rewards": [each for each in EVERY_REWARD if "model" not in each]},
    "ppo": {**PPO, **EVALUATED},
    "rloo": RLOO,
}


def rules(*given: Mapping[str, Any]) -> dict[str, Any]:
    return {"spec.guards": {"rules": list(given)}}


def test_said_and_filled() -> None:
    found = plan(rules({"metric": "loss", "above": 5}, {"metric": "entropy", "below": 0.1, "action": "Suspend"}))
    first, second = found.config.guards.rules
    assert (first.above, first.below, first.for_steps, first.action) == (5.0, None, 1, "Fail")
    assert (second.below, second.action) == (0.1, "Suspend")
    assert found.resolved["guards"]["nonFinite"] == "Fail"
    assert found.resolved["guards"]["rules"][0] == {"metric": "loss", "above": 5.0, "forSteps": 1, "action": "Fail"}


def test_none_without_a_word_but_in_rl() -> None:
    assert plan().config.guards.rules == ()
    assert plan().resolved["guards"] == {"nonFinite": "Fail"}
    assert plan(RL).config.guards.rules == (SAMPLER_RULE, VARIANCE_RULE)
    assert plan(RLOO).config.guards.rules == (SAMPLER_RULE, VARIANCE_RULE)
    assert plan(PPO).config.guards.rules == (SAMPLER_RULE,), "one completion has no variance"


def test_a_rule_on_the_same_metric_takes_the_place_of_a_built_in_one() -> None:
    own = {"metric": SAMPLER_RULE.metric, "above": 0.5, "action": "Fail"}
    found = plan({**RL, **rules(own)}).config.guards.rules
    assert [(rule.metric, rule.action) for rule in found] == [
        (SAMPLER_RULE.metric, "Fail"),
        (VARIANCE_RULE.metric, "Warn"),
    ]


@pytest.mark.parametrize("name", KINDS)
def test_what_is_resolved_can_be_said(name: str) -> None:
    resolved = plan(KINDS[name]).resolved["guards"]
    assert check(manifest({**KINDS[name], "spec.guards": resolved})) == ()


@pytest.mark.parametrize("name", KINDS)
def test_every_metric_of_a_job_can_be_guarded(name: str) -> None:
    config = plan(KINDS[name]).config
    names = measured(config)
    assert len(set(names)) == len(names)
    for metric in names:
        assert re.fullmatch(NAME, metric), metric
        assert len(metric) <= 64
    assert any(metric.startswith("eval_") for metric in names) == bool(config.data.eval)


@pytest.mark.parametrize(
    ("changes", "metric", "said"),
    [
        ({}, "kl", "must be measured by this job"),
        ({}, "los", ""),
        ({}, "eval_loss", "needs data.eval"),
        (RL, "kl", "must be measured by this job"),
        (RL, "rewards/mine/mean", "did you mean rewards/math/mean?"),
        ({**RL, **EVALUATED}, "eval_loss", "must be measured by this job"),
        (PPO, "kl", "must be measured by this job"),
        ({**RL, "spec.grpo": {"beta": 0.1}}, "objective/kl", "must be measured by this job"),
        (PREFERENCE, "loss/sft", "must be measured by this job"),
    ],
)
def test_a_metric_that_is_not_measured(changes: Mapping[str, Any], metric: str, said: str) -> None:
    given = {**changes, **rules({"metric": "loss", "above": 9}, {"metric": metric, "above": 1})}
    if not re.fullmatch(NAME, metric):
        assert [problem.path for problem in check(manifest(given))] == ["spec.guards.rules[1].metric"]
        return
    with pytest.raises(PlanError) as caught:
        plan(given)
    (problem,) = caught.value.problems
    assert caught.value.reason is Reason.INVALID_SPEC
    assert problem.path == "spec.guards.rules[1].metric"
    assert said in str(problem)
