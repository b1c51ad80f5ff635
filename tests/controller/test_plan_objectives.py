"""What the stages with pairs, evaluation, number formats and DeepSpeed become in the plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from posttrain_operator.plan.errors import PlanError
from tests.api.rule_cases import BEST, EVAL, ON_CPU, PREFERENCE, REWARD
from tests.controller.plan_kit import SETTINGS, plan


@pytest.mark.parametrize(
    ("said", "algorithm", "shown"),
    [
        ({}, "DPO", {"beta": 0.1, "labelSmoothing": 0.0, "sftWeight": 0.0, "cacheReference": False}),
        ({"algorithm": "IPO"}, "IPO", {"beta": 0.1, "sftWeight": 0.0, "cacheReference": False}),
        ({"algorithm": "SimPO"}, "SimPO", {"beta": 2.0, "sftWeight": 0.0, "gammaBetaRatio": 0.5}),
        (
            {"algorithm": "SimPO", "preference": {"gammaBetaRatio": 0, "sftWeight": 1}},
            "SimPO",
            {"beta": 2.0, "sftWeight": 1.0, "gammaBetaRatio": 0.0},
        ),
        (
            {"algorithm": "RobustDPO", "preference": {"labelSmoothing": 0.25, "beta": 3, "cacheReference": True}},
            "RobustDPO",
            {"beta": 3.0, "labelSmoothing": 0.25, "sftWeight": 0.0, "cacheReference": True},
        ),
    ],
)
def test_preference(said: dict[str, Any], algorithm: str, shown: dict[str, Any]) -> None:
    made = plan({**PREFERENCE, **{f"spec.{name}": value for name, value in said.items()}})
    assert made.config.algorithm == algorithm
    wire = made.config.preference.to_wire()
    assert {name: wire[name] for name in shown} == shown
    assert made.resolved["preference"] == shown, "only what the algorithm reads"
    assert made.resolved["algorithm"] == algorithm


def test_reward_model() -> None:
    bare = plan(REWARD)
    assert (bare.config.algorithm, bare.resolved["rewardModel"]) == (None, {"centering": 0.0})
    made = plan({**REWARD, "spec.rewardModel": {"centering": 0.01, "marginColumn": "m"}})
    assert (made.config.reward_model.centering, made.config.reward_model.margin_column) == (0.01, "m")
    assert "preference" not in made.resolved
    assert {"preference", "rewardModel", "algorithm", "reference"}.isdisjoint(plan().resolved)


def test_precision() -> None:
    assert plan().config.training.precision == "BF16"
    assert plan(ON_CPU).config.training.precision == "FP32"
    demo = replace(SETTINGS, allow_cpu=True)
    assert plan(settings=demo).config.training.precision == "FP32", "GPU jobs may run on the CPU there"
    said = {"spec.training": {"precision": "BF16"}}
    assert plan({**ON_CPU, **said}, demo).config.training.precision == "BF16"


def test_gradient_checkpointing() -> None:
    assert plan().config.training.gradient_checkpointing == "Auto"
    assert "gradientCheckpointing" not in plan().resolved["training"], "until it is decided"
    made = plan({"spec.training": {"gradientCheckpointing": False}})
    assert made.config.training.gradient_checkpointing is False
    assert made.resolved["training"]["gradientCheckpointing"] is False


def test_evaluation() -> None:
    assert plan(BEST).resolved["evaluation"] == {
        "everySteps": 5, "metric": "eval_loss", "goal": "Minimize", "keepBest": True,
    }  # fmt: skip
    said = {"everySteps": 5, "keepBest": True, "metric": "eval_accuracy", "goal": "Maximize"}
    evaluation = plan({**EVAL, "spec.evaluation": said}).config.evaluation
    assert evaluation.to_wire() == said
    assert "evaluation" not in plan().resolved


def test_data_words() -> None:
    train = [{"uri": "pvc://a/b", "weight": 0.5, "columns": {"chosen": "good", "input": "ctx"}}, {"uri": "pvc://a/c"}]
    config = plan({**PREFERENCE, "spec.data": {"train": train, "maxPromptLength": 9}})
    assert [source.weight for source in config.config.data.train] == [0.5, 1.0]
    assert config.config.data.train[0].columns == {"chosen": "good", "input": "ctx"}
    assert config.config.data.max_prompt_length == config.resolved["data"]["maxPromptLength"] == 9
    assert plan().config.data.max_prompt_length is None


def test_a_prompt_leaves_room() -> None:
    with pytest.raises(PlanError, match=r"spec.data.maxPromptLength: must be less than the longest sequence \(2048"):
        plan({"spec.data.maxPromptLength": 2048})


_TOLD = {"comms_logger": {"prof_ops": ["all_reduce", None]}}


def test_deepspeed() -> None:
    said = {"zeroStage": 3, "offloadOptimizer": True, "offloadParameters": True, "overrides": _TOLD}
    made = plan({"spec.deepspeed": said})
    assert made.config.zero_stage == 3
    assert made.config.deepspeed.offload_optimizer
    assert made.config.deepspeed.offload_parameters
    assert made.config.deepspeed.overrides == _TOLD
    assert made.resolved["deepspeed"] == said


def test_overrides_are_small() -> None:
    with pytest.raises(PlanError, match=r"spec.deepspeed.overrides: must have at most 16384 bytes as JSON"):
        plan({"spec.deepspeed": {"overrides": {"a": "x" * 16384}}})


@pytest.mark.parametrize(("key", "part"), [("wall_clock_brakdown", "wall_clock_breakdown?"), ("bfloat16", "bf16?")])
def test_an_override_that_nobody_reads(key: str, part: str) -> None:
    """DeepSpeed passes over what it does not know; `bfloat16` it still knows as another name of bf16."""
    with pytest.raises(
        PlanError, match=rf"spec.deepspeed.overrides.{key}: may not be set: .* did you mean {part[:-1]}"
    ):
        plan({"spec.deepspeed": {"overrides": {key: True}}})
