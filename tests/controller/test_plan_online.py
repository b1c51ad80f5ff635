"""What stage RL becomes in the plan: the trainer's records, lengths, mounts, and the models beside the policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from posttrain_api.online import GRPOConfig, PPOConfig, RLOOConfig, RolloutConfig
from posttrain_api.reasons import Reason
from posttrain_api.spec import online as spec_online
from posttrain_api.spec.rewards import Reward
from posttrain_operator.backends.pytorchjob import build
from posttrain_operator.plan.build import build_plan
from posttrain_operator.plan.errors import PlanError
from posttrain_operator.plan.parents import ancestors, dependencies, taken_at_best
from posttrain_operator.plan.types import Parent, Plan
from tests.api.online_cases import EVALUATED, EVERY_GRPO, EVERY_PPO, EVERY_REWARD, JUDGE, MATH, PPO, PYTHON, RL, RLOO
from tests.api.rule_cases import REMOVE
from tests.controller.plan_kit import SETTINGS, job, parent

FULL = {"spec.lora": REMOVE, "spec.tuning": "Full"}


def judge(name: str = "judge", stage: str = "RewardModel") -> Parent:
    """A finished reward model: an adapter on a hub model."""
    resolved = {"model": {"uri": "hf://org/base", "secretRef": {"name": "hf-token"}}}
    return replace(parent(name, "peft"), stage=stage, resolved=resolved)


def plan(changes: Mapping[str, Any], *parents: Parent) -> Plan:
    known = {found.name: found for found in (judge(), parent(), *parents)}
    return build_plan(job(changes), SETTINGS, known)


def refused(changes: Mapping[str, Any], *parents: Parent) -> PlanError:
    with pytest.raises(PlanError) as caught:
        plan(changes, *parents)
    return caught.value


def test_the_smallest_job() -> None:
    config = plan(RL).config
    assert (config.stage, config.algorithm, config.critic) == ("RL", "GRPO", None)
    assert config.grpo == GRPOConfig()
    assert config.rollout == RolloutConfig(), "the records' defaults are the API's"
    assert (config.training.learning_rate, config.training.schedule, config.training.batch_size) == (
        1e-5, "Constant", 32,
    )  # fmt: skip
    assert plan({**RL, **FULL}).config.training.learning_rate == 1e-6
    (reward,) = config.rewards
    assert (reward.name, reward.weight, reward.timeout_seconds, reward.on_error) == ("math", 1.0, 30.0, "Fail")
    assert reward.math is not None
    assert reward.math.column == "answer"


def test_a_rollout_is_one_step_unless_said() -> None:
    assert plan({**RL, "spec.training": {"batchSize": 7}}).config.rollout.batch_size == 7
    said = {"spec.training": {"batchSize": 7}, "spec.rollout": {"batchSize": 14, "topP": 0.5, "engine": "Generate"}}
    rollout = plan({**RL, **said}).config.rollout
    assert (rollout.batch_size, rollout.top_p, rollout.engine, rollout.top_k) == (14, 0.5, "Generate", 0)


@pytest.mark.parametrize(
    ("data", "new", "longest"),
    [
        ({}, None, 2048),
        ({}, 4096, 5632),
        ({"maxPromptLength": 100}, None, 612),
        ({"maxPromptLength": 100}, 28, 128),
        ({"maxLength": 1000}, 900, 1000),
        ({"maxLength": 1000, "maxPromptLength": 100}, 900, 1000),
    ],
)
def test_the_longest_sequence_is_a_prompt_and_its_answer(data: dict[str, Any], new: int | None, longest: int) -> None:
    changes = {**RL, **{f"spec.data.{name}": value for name, value in data.items()}}
    made = plan({**changes, **({"spec.rollout": {"maxNewTokens": new}} if new else {})})
    assert made.config.data.max_length == made.resolved["data"]["maxLength"] == longest
    assert made.config.training.tokens_per_micro_batch == max(8192, longest)


def test_every_field_of_grpo() -> None:
    made = plan({**RL, "spec.grpo": EVERY_GRPO})
    wire = made.config.grpo.to_wire()
    assert wire.pop("maxRefills") == 3
    assert {**wire, "dynamicSampling": {"maxRefills": 3}} == EVERY_GRPO
    assert made.resolved["grpo"] == EVERY_GRPO
    assert "ppo" not in made.resolved
    assert "preference" not in made.resolved


def test_every_field_of_ppo() -> None:
    made = plan({**PPO, "spec.ppo": EVERY_PPO})
    assert made.resolved["ppo"] == EVERY_PPO
    block = made.config.ppo
    assert (block.lam, block.missing_eos_penalty, block.epochs) == (1.0, 1.0, 2)
    assert block.adaptive_kl is not None
    assert (block.adaptive_kl.target, block.adaptive_kl.horizon) == (6.0, 5000)
    bare = plan({**PPO, "spec.ppo": {"adaptiveKL": {"target": 2}}}).config.ppo
    assert bare.adaptive_kl is not None
    assert bare.adaptive_kl.horizon == 10_000
    assert bare.model_copy(update={"adaptive_kl": None}) == PPOConfig()


def test_every_field_of_rloo() -> None:
    said = {"groupSize": 2, "klCoefficient": 0.0, "clipRange": 0.1, "normalizeAdvantages": True}
    made = plan({**RLOO, "spec.rloo": said})
    assert made.config.rloo.to_wire() == made.resolved["rloo"] == said
    assert plan(RLOO).config.rloo == RLOOConfig()


def test_every_reward() -> None:
    made = plan({**RL, "spec.rewards": EVERY_REWARD})
    rewards = made.config.rewards
    names = ["right", "exactMatch", "format", "regex", "length", "model", "hub", "http", "python"]
    assert [reward.name for reward in rewards] == names
    assert (rewards[0].weight, rewards[0].timeout_seconds, rewards[0].on_error) == (-0.5, 0.5, "Skip")
    assert all(len(reward.to_wire()) == 5 for reward in rewards), "four words and one kind"
    model, hub, http, python = rewards[5].model, rewards[6].model, rewards[7].http, rewards[8].python
    assert model is not None
    assert hub is not None
    assert http is not None
    assert python is not None
    assert (model.source.uri, model.adapters[0].path) == ("hf://org/base", "/claims/parent-claim/judge/u0/output")
    assert hub.source.secret_path == "/etc/posttrain/secrets/hf-token"
    assert http.secret_path == "/etc/posttrain/secrets/judge-token"
    assert (python.path, python.function) == ("/etc/posttrain/configmaps/my-reward/reward.py", "score")
    assert made.config_maps == ("my-reward",)
    assert (made.secrets, made.shared_secrets) == (("hf-token", "judge-token"), ("judge-token",))
    assert "parent-claim" in made.claims


def test_resolved_rewards_can_be_said_again() -> None:
    made = plan({**RL, "spec.rewards": EVERY_REWARD})
    shown = made.resolved["rewards"]
    timed = [reward["name"] for reward in shown if "timeoutSeconds" in reward]
    assert timed == ["right", "exactMatch", "format", "regex", "http", "python"]
    assert shown[5]["model"] == {"uri": "hf://org/base", "adapters": ["pvc://parent-claim/judge/u0/output"]}
    assert shown[7]["http"] == EVERY_REWARD[7]["http"]
    assert shown[8]["python"] == {"configMapRef": {"name": "my-reward", "key": "reward.py"}, "function": "score"}
    again = [*shown[:5], shown[7], shown[8]]
    assert plan({**RL, "spec.rewards": again}).resolved["rewards"] == again


def test_names_are_unique() -> None:
    said = [{"regex": {"pattern": "a"}}, {"name": "regex_2", **MATH}, {"regex": {"pattern": "b"}}, MATH]
    rewards = plan({**RL, "spec.rewards": said}).config.rewards
    assert [reward.name for reward in rewards] == ["regex", "regex_2", "regex_3", "math"]


@pytest.mark.parametrize("kind", ["format", "regex"])
def test_a_pattern_is_compiled(kind: str) -> None:
    error = refused({**RL, "spec.rewards": [{kind: {"pattern": "(a"}}]})
    assert error.reason == Reason.INVALID_SPEC
    assert f"spec.rewards[0].{kind}.pattern: is no regular expression of Python's: missing )" in str(error)


def test_only_the_tokens_of_servers_are_in_every_pod() -> None:
    """The other secrets fetch, which the first pod alone does."""
    made = plan({**RL, "spec.rewards": EVERY_REWARD, "spec.resources": {"nodes": 2, "gpusPerNode": 1}})
    replicas = build(made, None)["spec"]["pytorchReplicaSpecs"]

    def mounts(role: str) -> list[tuple[str, str]]:
        pod = replicas[role]["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        found = [mount for mount in pod["containers"][0]["volumeMounts"] if mount["name"] in volumes]
        assert all(mount["readOnly"] for mount in found if mount["name"].startswith(("secret", "configmap")))
        return [
            (mount["mountPath"], volumes[mount["name"]]["secret"]["secretName"])
            for mount in found
            if "secret" in volumes[mount["name"]]
        ]

    token = ("/etc/posttrain/secrets/judge-token", "judge-token")
    assert mounts("Master") == [("/etc/posttrain/secrets/hf-token", "hf-token"), token]
    assert mounts("Worker") == [token]
    for role in replicas:
        volumes = replicas[role]["template"]["spec"]["volumes"]
        assert {"name": "configmap-0", "configMap": {"name": "my-reward"}} in volumes


def test_a_reward_needs_a_model_that_scores() -> None:
    error = refused({**RL, "spec.rewards": [MATH, JUDGE]}, judge(stage="SFT"))
    assert error.reason == Reason.UNSUPPORTED
    assert "spec.rewards[1].model.fromJob.name: names a job of stage SFT, whose model answers and cannot score" in str(
        error
    )


def test_the_policy_and_its_reference_answer() -> None:
    for changes in ({"spec.model": {"fromJob": {"name": "judge"}}}, {"spec.reference": {"fromJob": {"name": "judge"}}}):
        assert "names a reward model" in str(refused({**RLOO, **changes}))
    made = plan({**RL, "spec.reference": {"fromJob": {"name": "base"}}, "spec.grpo": {"beta": 0.1}})
    assert made.config.reference is not None
    assert made.resolved["reference"] == {"uri": "pvc://parent-claim/base/u0/output"}


def test_a_critic_beside_an_adapter_is_one_too() -> None:
    made = plan(PPO)
    critic = made.config.critic
    assert critic is not None
    assert (critic.source, critic.init_from, critic.shared, critic.warmup_steps) == (None, "Policy", True, 0)
    assert critic.learning_rate == pytest.approx(1e-4, rel=1e-12)
    assert made.resolved["critic"]["shared"] is True
    full = plan({**PPO, **FULL, "spec.critic": {"learningRate": 3e-6, "warmupSteps": 9}}).config.critic
    assert full is not None
    assert (full.shared, full.learning_rate, full.warmup_steps) == (False, 3e-6, 9)


def test_a_critic_that_begins_as_the_reward_model() -> None:
    critic = plan({**PPO, "spec.rewards": [JUDGE], "spec.critic": {"initFrom": "RewardModel"}}).config.critic
    assert critic is not None
    assert (critic.source, critic.init_from, critic.shared) == (None, "RewardModel", False)


@pytest.mark.parametrize("stage", ["RewardModel", "SFT"])
def test_a_critic_of_a_job(stage: str) -> None:
    changes = {**PPO, "spec.critic": {"model": {"fromJob": {"name": "values"}}}}
    made = plan(changes, judge("values", stage))
    critic = made.config.critic
    assert critic is not None
    assert critic.source is not None
    assert (critic.source.uri, critic.adapters[0].uri) == ("hf://org/base", "pvc://parent-claim/values/u0/output")
    assert critic.shared is False
    assert made.secrets == ("hf-token",)
    shown = {"uri": "hf://org/base", "adapters": ["pvc://parent-claim/values/u0/output"]}
    assert made.resolved["critic"]["model"] == shown
    assert "initFrom" not in made.resolved["critic"]


def test_all_parents_are_waited_for() -> None:
    best = {"name": "judge", "checkpoint": "Best"}
    changes = {
        **PPO,
        "spec.model": {"fromJob": {"name": "sft"}},
        "spec.reference": {"fromJob": {"name": "base"}},
        "spec.rewards": [JUDGE, {"model": {"fromJob": {"name": "other", "checkpoint": "Best"}}}],
        "spec.critic": {"model": {"fromJob": best}},
    }
    subject = job(changes)
    assert dependencies(subject) == ("sft", "base", "judge", "other")
    assert ancestors(subject) == ("sft", "judge", "other"), "a reference teaches nothing"
    assert taken_at_best(subject) == {"other"}, "judge's output is taken too"
    with pytest.raises(PlanError) as caught:
        build_plan(subject, SETTINGS, {"sft": parent("sft"), "base": parent()})
    assert caught.value.reason == Reason.WAITING_FOR_DEPENDENCY
    assert "spec.critic.model.fromJob.name: names a job that has not succeeded yet" in str(caught.value)


def test_evaluation_is_the_reward() -> None:
    assert plan({**RL, **EVALUATED}).resolved["evaluation"] == {
        "metric": "eval_reward", "goal": "Maximize", "keepBest": False,
    }  # fmt: skip
    said = {"everySteps": 5, "keepBest": True, "metric": "eval_completions/mean_length", "goal": "Minimize"}
    assert plan({**RL, **EVALUATED, "spec.evaluation": said}).config.evaluation.to_wire() == said


def test_other_stages_have_nothing_of_it() -> None:
    made = plan({})
    assert made.config.rewards == ()
    assert {"rollout", "rewards", "grpo", "ppo", "rloo", "critic"}.isdisjoint(made.resolved)


def test_defaults_are_described_as_they_are() -> None:
    """The words of kubectl explain, against the records that the trainer gets."""
    pairs = (
        (spec_online.Rollout, plan(RL).resolved["rollout"]),
        (spec_online.GRPO, plan(RL).resolved["grpo"]),
        (spec_online.PPO, plan(PPO).resolved["ppo"]),
        (spec_online.RLOO, plan(RLOO).resolved["rloo"]),
        (Reward, plan({**RL, "spec.rewards": [PYTHON]}).resolved["rewards"][0]),
    )
    apart = {"name", "batchSize"}
    compared = 0
    for model, shown in pairs:
        for name, info in model.model_fields.items():
            wire = info.alias or name
            words = (info.description or "").partition("Default: ")[2].partition(". ")[0].rstrip(".")
            if wire in apart or wire not in shown or not words:
                continue
            value = shown[wire]
            assert words == str(value).lower() or words == str(value) or float(words) == value, (model, wire)
            compared += 1
    assert compared > 30
