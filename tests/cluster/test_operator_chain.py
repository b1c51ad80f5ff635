"""Stages that build on each other, and restarts that must not run away, on a real API server."""

from __future__ import annotations

import json
from typing import Any

import pytest
from operator_kit import World, wait_for

from posttrain_api.reasons import Reason
from posttrain_api.records import Best, Output, Success, render_termination
from tests.cluster.test_operator_flow import conditions, failure, started

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("operator"), pytest.mark.usefixtures("running")]
BASE = {"uri": "pvc://runs/base"}
FOLDER = "pvc://runs/x/u"


def finish(world: World, pods: list[str], best: bool) -> None:
    """The job succeeds with an adapter as its output."""
    output = Output(uri=f"{FOLDER}/output", digest="sha256:aa", format="peft", size_bytes=5)
    kept = Best(step=8, metric="eval_loss", value=0.5, uri=f"{FOLDER}/best") if best else None
    for pod in pods[1:]:
        world.end_pod(pod, 0)
    world.end_pod(pods[0], 0, render_termination(Success(output=output, step=12, best=kept)))


def config_of(world: World, name: str) -> dict[str, Any]:
    world.child(name)
    config = world.get("configmap", f"{name}-config")
    assert config is not None
    return dict(json.loads(config["data"]["config.json"]))


def sft(world: World, best: bool) -> None:
    evaluation = {"everySteps": 4, "keepBest": True} if best else None
    data = {"train": [{"uri": "pvc://runs/train.jsonl"}], "eval": [{"uri": "pvc://runs/eval.jsonl"}]}
    pods = started(world, "sft", stage="SFT", lora={"rank": 4}, model=BASE, data=data, evaluation=evaluation)
    finish(world, pods, best)


def test_preference_goes_on_from_the_best_adapter(world: World) -> None:
    chain = {"fromJob": {"name": "sft", "checkpoint": "Best"}}
    world.job("dpo", stage="Preference", lora={"continueAdapter": True}, model=chain)
    world.until("dpo", reason="WaitingForDependency")
    sft(world, best=True)
    status = world.until("sft", state="Succeeded")
    assert status["checkpoints"]["best"] == {"step": 8, "metric": "eval_loss", "value": 0.5, "uri": f"{FOLDER}/best"}
    config = config_of(world, "dpo")
    assert (config["stage"], config["algorithm"]) == ("Preference", "DPO")
    assert config["model"]["source"]["uri"] == BASE["uri"]
    assert [adapter["path"] for adapter in config["model"]["adapters"]] == ["/claims/runs/x/u/best"]
    assert (config["lora"]["rank"], config["lora"]["continueAdapter"]) == (4, True)
    resolved = world.status("dpo")["resolved"]
    assert resolved["model"]["adapters"] == [f"{FOLDER}/best"]
    assert resolved["preference"]["beta"] == 0.1
    (parent,) = world.status("dpo")["lineage"]
    assert "outputDigest" not in parent, "its best model is another one than its output"


def test_best_of_a_job_that_kept_none(world: World) -> None:
    world.job("rm", stage="RewardModel", tuning="Full", model={"fromJob": {"name": "sft", "checkpoint": "Best"}})
    sft(world, best=False)
    status = world.until("rm", state="Failed", reason="DependencyFailed")
    assert "asks for the best model of sft, which kept none" in status["message"]
    assert conditions(status)["Failed"]["reason"] == "DependencyFailed"


def test_a_drained_pod_costs_nothing_though_its_peer_ends_first(world: World) -> None:
    master, worker = started(world)
    world.kubectl("delete", "pod", worker, "--grace-period=600", "--wait=false")
    world.end_pod(master, 143, failure(Reason.PREEMPTED, 143))
    world.vanish(master)
    status = world.until("job", state="Restarting", reason="Preempted")
    assert status["restarts"] == {"total": 0, "byCause": {"Preempted": 1}}


def test_that_a_pod_was_drained_outlives_its_last_deletion(world: World) -> None:
    """The kubelet removes it without a grace; its end alone would look like an image that exits with 143."""
    _, worker = started(world)
    world.kubectl("delete", "pod", worker, "--grace-period=600", "--wait=false")
    world.end_pod(worker, 143)
    world.vanish(worker)
    status = world.until("job", reason="Preempted")
    assert status["restarts"] == {"total": 0, "byCause": {"Preempted": 1}}


def test_an_end_by_sigterm_that_nobody_asked_for_counts(world: World) -> None:
    """As the training-operator does: it deletes the failed pod after its end."""
    master, _ = started(world)
    world.end_pod(master, 143)
    world.vanish(master)
    status = world.struck("job", "Preempted")
    assert (status["restarts"]["total"], status["restarts"]["byCause"]) == (1, {"Preempted": 1})
    assert "nobody had asked a pod to end" in status["failure"]["message"]


def test_a_container_that_cannot_start_is_given_time(world: World) -> None:
    world.job("job")
    master, worker = world.pods("job")
    world.until("job", reason="PodsStarting")
    world.end_pod(master, 128, 'exec: "python": not found', "StartError")
    world.vanish(master)
    wait_for(lambda: world.child("job")["spec"]["runPolicy"]["suspend"], "the child to be suspended")
    status = world.until("job", state="Restarting")
    assert status["restarts"]["pauseSeconds"] == 1, "a tenth, as all times of this operator"
    assert 'exec: "python": not found' in status["message"]
    world.vanish(worker)
    wait_for(lambda: not world.child("job")["spec"]["runPolicy"]["suspend"], "the pause to end")
    for pod in world.pods("job"):
        world.run_pod(pod)
    status = world.until("job", state="Running")
    assert (status["attempts"], status["restarts"]["total"]) == (2, 1)
