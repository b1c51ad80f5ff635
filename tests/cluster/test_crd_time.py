"""Rules over time on a real API server: what a started job may still change, and what a status never takes back."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.api.online_cases import PPO, RL, RLOO
from tests.api.rule_cases import EVAL, PREFERENCE, REMOVE, REWARD, job
from tests.cluster.crd_rig import JOBS, Rig

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("crd")]
NOW = "2026-01-31T12:00:00Z"
STARTED = {
    "backend": {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "name": "x", "uid": "u"},
    "state": "Running",
}
counter = itertools.count()


def make(crd_server: Rig, status: dict[str, Any] | None = None, changes: dict[str, Any] | None = None) -> str:
    """A stored job with a status; its name."""
    name = f"job-{next(counter)}"
    answer = crd_server.create(job({"metadata.name": name, **(changes or {})}))
    assert answer.ok, answer.text
    if status:
        answer = crd_server.merge(name, {"status": status}, status=True)
        assert answer.ok, answer.text
    return name


def condition(kind: str, status: str = "True", reason: str = "Done") -> dict[str, str]:
    return {"type": kind, "status": status, "reason": reason, "message": "m", "lastTransitionTime": NOW}


EDITS: dict[str, dict[str, Any]] = {
    "stage": {"stage": "Pretrain"},
    "algorithm": {"algorithm": "IPO"},
    "reference": {"reference": {"uri": "hf://a/b"}},
    "preference": {"preference": {"beta": 0.5}},
    "rewardModel": {"rewardModel": {"centering": 0.5}},
    "rollout": {"rollout": {"topK": 5}},
    "rewards": {"rewards": [{"math": {"column": "other"}}]},
    "grpo": {"grpo": {"groupSize": 4}},
    "ppo": {"ppo": {"epochs": 1}},
    "rloo": {"rloo": {"groupSize": 8}},
    "critic": {"critic": {"warmupSteps": 1}},
    "tuning": {"tuning": "LoRA"},
    "lora": {"lora": {"rank": 8}},
    "model": {"model": {"uri": "hf://a/b"}},
    "data": {"data": {"maxLength": 100}},
    "training": {"training": {"maxSteps": 3}},
    "deepspeed": {"deepspeed": {"zeroStage": 1}},
    "evaluation": {"evaluation": {"everySteps": 3}},
    "checkpoint": {"checkpoint": {"keepLast": 3}},
    "output": {"output": {"mergeAdapter": True}},
    "storage": {"storage": {"claimName": "other"}},
    "resources": {"resources": {"nodes": 2}},
    "guards": {"guards": {"rules": [{"metric": "loss", "above": 9}]}},
    "backend": {"backend": "TrainJob"},
    "image": {"image": "x"},
    "imagePullSecrets": {"imagePullSecrets": [{"name": "x"}]},
    "serviceAccountName": {"serviceAccountName": "x"},
    "env": {"env": [{"name": "A", "value": "b"}]},
    "runPolicy.terminationGracePeriodSeconds": {"runPolicy": {"terminationGracePeriodSeconds": 5}},
}


BASES = {
    **dict.fromkeys(("algorithm", "reference", "preference"), PREFERENCE),
    "rewardModel": REWARD,
    **dict.fromkeys(("rollout", "rewards", "grpo"), RL),
    **dict.fromkeys(("ppo", "critic"), PPO),
    "rloo": RLOO,
}


@pytest.mark.parametrize("field", EDITS)
def test_frozen_once_started(crd_server: Rig, field: str) -> None:
    base = BASES.get(field, EVAL)
    before = make(crd_server, changes=base)
    assert crd_server.merge(before, {"spec": EDITS[field]}).ok, "editable until it starts"
    name = make(crd_server, STARTED, base)
    answer = crd_server.merge(name, {"spec": EDITS[field]})
    assert answer.code == 422
    assert (
        f"the job has started, immutable now: spec.{field}; only suspend and runPolicy can be edited"
        in answer.body["message"]
    )


OVERRIDES = {"comms_logger": {"enabled": True, "prof_ops": ["a"]}, "zero_optimization": {"reduce_bucket_size": 5}}


@pytest.mark.parametrize(
    "edit",
    [
        {"comms_logger": {"enabled": False}},
        {"comms_logger": {"prof_ops": ["b"]}},
        {"comms_logger": None},
        {"other": 1},
        {"zero_optimization": {"reduce_bucket_size": 6}},
        {"zero_optimization": {"other": {"deep": [1]}}},
    ],
    ids=str,
)
def test_free_overrides_are_frozen_too(crd_server: Rig, edit: dict[str, Any]) -> None:
    """What the schema does not know is compared all the same, and disturbs no other write."""
    name = make(crd_server, STARTED, {"spec.deepspeed": {"overrides": OVERRIDES}})
    answer = crd_server.merge(name, {"spec": {"deepspeed": {"overrides": edit}}})
    assert answer.code == 422, answer.text
    assert "immutable now: spec.deepspeed;" in answer.body["message"]
    assert crd_server.merge(name, {"spec": {"deepspeed": {"overrides": OVERRIDES}}}).ok
    assert crd_server.merge(name, {"spec": {"suspend": True}}).ok
    answer = crd_server.merge(name, {"status": {"resolved": {"deepspeed": {"overrides": OVERRIDES}}}}, status=True)
    assert answer.ok, answer.text
    assert answer.body["status"]["resolved"]["deepspeed"]["overrides"] == OVERRIDES


def test_every_field_is_either_frozen_or_editable() -> None:
    from posttrain_api.rules.transitions import EDITABLE
    from posttrain_api.spec import JobSpec

    fields = {field.alias or name for name, field in JobSpec.model_fields.items()}
    assert fields == {name.partition(".")[0] for name in EDITS} | set(EDITABLE)


def test_removing_a_block_is_a_change_too(crd_server: Rig) -> None:
    name = make(crd_server, STARTED, {**EVAL, "spec.tuning": "LoRA"})
    answer = crd_server.merge(name, {"spec": {"lora": None, "data": {"maxLength": 9}}})
    assert "immutable now: spec.lora spec.data;" in answer.body["message"]


def test_stays_editable_once_started(crd_server: Rig) -> None:
    name = make(crd_server, STARTED)
    assert crd_server.merge(name, {"spec": {"suspend": True}}).ok
    assert crd_server.merge(
        name, {"spec": {"runPolicy": {"activeDeadlineSeconds": 5, "ttlSecondsAfterFinished": 7}}}
    ).ok
    assert crd_server.merge(name, {"metadata": {"labels": {"a": "b"}}}).ok
    assert crd_server.merge(name, {"status": {"state": "Suspended"}}, status=True).ok


@pytest.mark.parametrize("kind", ["Complete", "Failed", "Finished"])
@pytest.mark.parametrize("after", ["flipped", "other reason", "omitted", "none", "gone"])
def test_terminal_conditions_are_frozen(crd_server: Rig, kind: str, after: str) -> None:
    name = make(crd_server, {"conditions": [condition("Running", "False"), condition(kind)]})
    later = {
        "flipped": [condition(kind, "False")],
        "other reason": [condition(kind, "True", "Other")],
        "omitted": [condition("Running", "False")],
        "none": [],
        "gone": None,
    }[after]
    answer = crd_server.merge(name, {"status": {"conditions": later}}, status=True)
    assert answer.code == 422
    assert "a terminal condition never goes back" in answer.body["message"]
    assert crd_server.merge(name, {"status": {"conditions": [condition("Running"), condition(kind)]}}, status=True).ok


def test_other_conditions_change_freely(crd_server: Rig) -> None:
    name = make(crd_server, {"conditions": [condition("Running"), condition("Failed", "False")]})
    assert crd_server.merge(
        name, {"status": {"conditions": [condition("Running", "False"), condition("Failed")]}}, status=True
    ).ok


def test_complete_and_failed_exclude_each_other(crd_server: Rig) -> None:
    answer = crd_server.merge(
        make(crd_server), {"status": {"conditions": [condition("Complete"), condition("Failed")]}}, status=True
    )
    assert answer.code == 422
    assert "Complete and Failed exclude each other" in answer.body["message"]
    fine = {"status": {"conditions": [condition("Complete"), condition("Failed", "False")]}}
    assert crd_server.merge(make(crd_server), fine, status=True).ok


def test_observed_generation_never_decreases(crd_server: Rig) -> None:
    name = make(crd_server, {"observedGeneration": 3})
    for lower in (2, None):
        answer = crd_server.merge(name, {"status": {"observedGeneration": lower}}, status=True)
        assert answer.code == 422
        assert "observedGeneration never decreases" in answer.body["message"]
    assert crd_server.merge(name, {"status": {"observedGeneration": 4}}, status=True).ok


def test_status_is_not_removed(crd_server: Rig) -> None:
    name = make(crd_server, {"state": "Running"})
    answer = crd_server.merge(name, {"status": None}, status=True)
    assert answer.code == 422
    assert "status must not be removed" in answer.body["message"]


def test_a_users_status_is_dropped(crd_server: Rig) -> None:
    answer = crd_server.create(
        {**job({"metadata.name": "forged", "spec.tuning": REMOVE}), "status": {"state": "Succeeded"}}
    )
    assert answer.ok
    assert "status" not in answer.body


def test_two_managers_share_the_status(crd_server: Rig) -> None:
    """Progress and the rest are applied by two field managers, and neither disturbs the other."""
    name, kind = make(crd_server), {"apiVersion": "posttrain.dev/v1alpha1", "kind": "PostTrainingJob"}
    path, content = f"{JOBS}/{name}/status", "application/apply-patch+yaml"
    progress = {"percent": 46, "display": "46%", "metrics": [{"name": "loss", "value": "0.82"}]}
    for manager, status in (
        ("posttrain-progress", {"progress": progress}),
        ("posttrain-status", {"state": "Running", "conditions": [condition("Running")]}),
        ("posttrain-progress", {"progress": {**progress, "percent": 47}}),
    ):
        body = {**kind, "metadata": {"name": name}, "status": status}
        answer = crd_server.ask("PATCH", path, body, content, fieldManager=manager)
        assert answer.ok, answer.text
    assert answer.body["status"]["state"] == "Running"
    assert answer.body["status"]["progress"]["percent"] == 47
