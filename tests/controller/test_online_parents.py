"""A job of stage RL with earlier jobs as reward model, critic and reference: what it waits for, what it comes from."""

from __future__ import annotations

from typing import Any

from posttrain_api.reasons import Reason
from posttrain_operator.reconcile.intent import understand
from posttrain_operator.reconcile.relatives import Relative
from posttrain_operator.slim import job_record
from tests.api.online_cases import JUDGE, PPO
from tests.api.rule_cases import job
from tests.controller.plan_kit import SETTINGS, UID

CHANGES: dict[str, Any] = {
    **PPO,
    "metadata.uid": UID,
    "metadata.resourceVersion": "1",
    "spec.reference": {"fromJob": {"name": "sft"}},
    "spec.rewards": [JUDGE],
    "spec.critic": {"model": {"fromJob": {"name": "values", "checkpoint": "Best"}}},
}
NAMES = {"sft": "SFT", "judge": "RewardModel", "values": "RewardModel"}


def finished(name: str, stage: str, **fields: Any) -> Relative:
    folder = f"pvc://runs/{name}/u"
    output = {"uri": f"{folder}/output", "digest": f"sha256:{name}", "format": "safetensors", "sizeBytes": 1}
    best = {"step": 1, "metric": "eval_accuracy", "value": 1.0, "uri": f"{folder}/best"}
    values: dict[str, Any] = {"outcome": "Succeeded", "output": output, "best": best, **fields}
    return Relative(name=name, uid=f"uid-{name}", stage=stage, reason="", parents=(), **values)


def family(**changes: Relative) -> dict[str, Relative]:
    return {name: finished(name, stage) for name, stage in NAMES.items()} | changes


def test_the_watch_knows_every_parent() -> None:
    assert job_record(job(CHANGES)).parents == ("judge", "sft", "values")


def test_lineage_names_what_taught_the_policy() -> None:
    data = {"job": "base", "uid": "uid-base", "stage": "SFT", "outputDigest": "sha256:base"}
    intent = understand(job(CHANGES), family(judge=finished("judge", "RewardModel", lineage=(data,))), SETTINGS)
    assert intent.plan is not None, intent.message
    assert intent.plan.claims == ("datasets", "runs")
    assert list(intent.lineage) == [
        data,
        {"job": "judge", "uid": "uid-judge", "stage": "RewardModel", "outputDigest": "sha256:judge"},
        {"job": "values", "uid": "uid-values", "stage": "RewardModel"},
    ]


def test_it_waits_for_the_reward_model() -> None:
    waiting = finished("judge", "RewardModel", outcome="", output=None)
    assert understand(job(CHANGES), family(judge=waiting), SETTINGS).waiting == "waits for judge to succeed"
    gone = {name: found for name, found in family().items() if name != "values"}
    assert understand(job(CHANGES), gone, SETTINGS).waiting == "waits for values, which does not exist (yet)"


def test_a_reward_model_that_failed() -> None:
    lost = finished("judge", "RewardModel", outcome="Failed", output=None)
    intent = understand(job(CHANGES), family(judge=lost), SETTINGS)
    assert intent.failure is Reason.DEPENDENCY_FAILED
    assert "judge has failed" in intent.message


def test_a_policy_cannot_score() -> None:
    intent = understand(job(CHANGES), family(judge=finished("judge", "SFT")), SETTINGS)
    assert intent.failure is Reason.UNSUPPORTED
    assert "spec.rewards[0].model.fromJob.name: names a job of stage SFT" in intent.message


def test_a_circle_through_a_reward() -> None:
    circle = Relative("judge", "uid-judge", "RewardModel", "", "", parents=("my-job",))
    intent = understand(job(CHANGES), family(judge=circle), SETTINGS)
    assert intent.failure is Reason.DEPENDENCY_CYCLE
    assert "my-job -> judge -> my-job" in intent.message
