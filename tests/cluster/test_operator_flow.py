"""A job's way on a real API server: created, run, finished, failed, restarted, suspended."""

from __future__ import annotations

import json
from typing import Any

import pytest
from operator_kit import World, uid_of, wait_for

from posttrain_api.reasons import Reason
from posttrain_api.records import Checkpoint, Failure, Output, Success, render_termination

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("operator"), pytest.mark.usefixtures("running")]

TYPES = ["Validated", "Suspended", "Running", "Complete", "Failed", "Finished", "Stalled", "TrainingHealthy"]


def success(step: int = 12) -> str:
    output = Output(uri="pvc://runs/x/output", digest="sha256:aa", format="safetensors", size_bytes=5)
    saved = Checkpoint(step=step, time="2026-01-01T00:00:00Z", uri="pvc://runs/x/c", size_bytes=9, digest="sha256:bb")
    return render_termination(Success(output=output, step=step, checkpoint=saved))


def failure(reason: Reason, code: int, **fields: Any) -> str:
    return render_termination(Failure(reason=reason, message=f"it was {reason}", exit_code=code, **fields))


def conditions(status: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {condition["type"]: condition for condition in status["conditions"]}


def started(world: World, name: str = "job", **spec: Any) -> list[str]:
    """A job whose pods all run."""
    world.job(name, **spec)
    pods = world.pods(name)
    for pod in pods:
        world.run_pod(pod)
    world.until(name, state="Running")
    return pods


def test_created_run_succeeded(world: World) -> None:
    world.job("job")
    child = world.child("job")
    assert child["metadata"]["ownerReferences"][0]["kind"] == "PostTrainingJob"
    config = world.get("configmap", "job-config")
    assert config is not None
    assert config["immutable"] is True
    status = world.until("job", state="Pending")
    assert [condition["type"] for condition in status["conditions"]] == TYPES
    assert status["backend"]["uid"] == uid_of(child)
    assert status["resources"] == {"gpus": 0, "pods": 2}

    master, worker = world.pods("job")
    for pod in (master, worker):
        world.run_pod(pod)
    status = world.until("job", state="Running")
    assert len(status["attempt"]["podUIDs"]) == 2

    world.end_pod(worker, 0)
    world.end_pod(master, 0, success())
    status = world.until("job", state="Succeeded")
    assert status["output"]["uri"] == "pvc://runs/x/output"
    assert status["checkpoints"]["last"]["step"] == 12
    assert "completionTime" in status
    assert "failure" not in status
    held = {kind for kind, condition in conditions(status).items() if condition["status"] == "True"}
    assert held == {"Validated", "Complete", "Finished", "TrainingHealthy"}
    world.kubectl("wait", "ptj/job", "--for=condition=Finished", "--timeout=5s")


@pytest.mark.parametrize(
    ("reason", "code"),
    [(Reason.DATA_ROWS_REJECTED, 21), (Reason.STORAGE_FULL, 51), (Reason.NON_FINITE, 40)],
)
def test_a_permanent_failure_is_told_from_the_pod(world: World, reason: Reason, code: int) -> None:
    master, worker = started(world)
    world.end_pod(worker, code, failure(reason, code, rank=1, step=7, log_tail="Traceback"))
    world.child_condition("job", "Failed", "True")
    status = world.until("job", state="Failed", reason=reason)
    told = status["failure"]
    assert (told["replica"], told["rank"], told["step"], told["exitCode"]) == ("worker-0", 1, 7, code)
    assert told["logTail"] == "Traceback"
    assert told["node"] == "node-a"
    assert conditions(status)["Failed"]["reason"] == reason
    events = world.kubectl("get", "events.events.k8s.io", "-o", "jsonpath={.items[*].reason}")
    assert reason in events.split()
    assert master


def test_a_log_may_hold_any_character(world: World) -> None:
    """Apply bodies are YAML to the API server, which refuses what JSON allows."""
    _, worker = started(world)
    tail = "\x1b[31m \x85 \ufeff \U0001f525 \u2588"
    world.end_pod(worker, 51, failure(Reason.STORAGE_FULL, 51, log_tail=tail))
    world.child_condition("job", "Failed", "True")
    assert world.until("job", state="Failed")["failure"]["logTail"] == tail


def test_an_unknown_image_that_exits_zero_is_no_success(world: World) -> None:
    master, _ = started(world)
    world.end_pod(master, 0, "done")
    world.child_condition("job", "Succeeded", "True")
    status = world.until("job", state="Failed", reason="InternalError")
    assert "success record" in status["message"]


def test_gang_restart(world: World) -> None:
    """One pod is killed by the kernel: all go, the decision is in the status, the new set is the next attempt."""
    master, worker = started(world)
    old = world.status("job")["attempt"]["podUIDs"]
    world.end_pod(worker, 137, reason="OOMKilled")
    world.vanish(worker)
    status = world.struck("job", "OutOfMemory")
    assert (status["restarts"]["total"], status["restarts"]["byCause"]) == (1, {"OutOfMemory": 1})
    assert status["restarts"]["sinceCheckpoint"] == {"outOfMemory": 1}
    assert status["failure"]["replica"] == "worker-0"
    doomed = wait_for(lambda: (world.get("pod", master) or {}).get("metadata", {}).get("deletionTimestamp"), "deletion")
    assert doomed
    world.end_pod(master, 143)
    world.vanish(master)
    wait_for(lambda: world.get("pod", master) is None, "the master to go")
    world.resumed("job")
    for pod in world.pods("job"):
        world.run_pod(pod)
    status = world.until("job", state="Running")
    assert status["attempts"] == 2
    assert status["attempt"]["number"] == 2
    assert not set(old) & set(status["attempt"]["podUIDs"])


def test_the_same_trainer_error_at_the_same_step_twice_is_the_end(world: World) -> None:
    broken = failure(Reason.TRAINER_ERROR, 190, rank=0, step=3)
    for attempt in (1, 2):
        if attempt == 1:
            pods = started(world)
        else:
            world.resumed("job")
            pods = world.pods("job")
            for pod in pods:
                world.run_pod(pod)
            world.until("job", state="Running", attempts=2)
        world.end_pod(pods[0], 190, broken)
        if attempt == 1:
            world.struck("job", "TrainerError")
            for pod in pods:
                world.vanish(pod)
            wait_for(lambda pods=pods: all(world.get("pod", pod) is None for pod in pods), "the pods to go")
    status = world.until("job", state="Failed", reason="TrainerError")
    assert status["restarts"]["total"] == 1
    wait_for(lambda: world.child("job")["spec"]["runPolicy"]["suspend"], "the pods of the failed job to be stopped")


def test_suspend_and_resume(world: World) -> None:
    pods = started(world)
    world.patch_job("job", {"suspend": True})
    wait_for(lambda: world.child("job")["spec"]["runPolicy"]["suspend"], "the child to be suspended")
    for pod in pods:
        world.end_pod(pod, 143)
    world.patch_job("job", {"suspend": True})
    assert world.status("job")["state"] != "Suspended"
    for pod in pods:
        world.vanish(pod)
    status = world.until("job", state="Suspended", reason="UserSuspended")
    assert "restarts" not in status
    world.patch_job("job", {"suspend": False})
    wait_for(lambda: not world.child("job")["spec"]["runPolicy"]["suspend"], "the child to be resumed")
    for pod in world.pods("job"):
        world.run_pod(pod)
    status = world.until("job", state="Running")
    assert (status["attempts"], status["attempt"]["number"]) == (2, 2)


def test_a_run_that_ends_while_it_is_suspended_is_not_repeated(world: World) -> None:
    master, worker = started(world)
    world.patch_job("job", {"suspend": True})
    wait_for(lambda: world.child("job")["spec"]["runPolicy"]["suspend"], "the child to be suspended")
    world.end_pod(master, 0, success())
    world.vanish(master)
    world.vanish(worker)
    world.until("job", state="Succeeded")


def test_suspended_at_creation_publishes_the_plan_and_starts_nothing(world: World) -> None:
    world.job("job", suspend=True)
    status = world.until("job", state="Suspended", reason="UserSuspended")
    assert status["resolved"]["training"]["schedule"] == "Cosine"
    assert world.get("pytorchjob", "job") is None
    assert world.get("configmap", "job-config") is None
    world.patch_job("job", {"suspend": False})
    world.child("job")


def test_a_missing_claim_is_waited_for(world: World) -> None:
    world.job("job", storage={"claimName": "later"})
    status = world.until("job", reason="StorageNotFound")
    assert conditions(status)["Stalled"]["status"] == "True"
    assert "later" in status["message"]
    world.claim("later")
    world.child("job")
    assert conditions(world.until("job", reason="PodsMissing"))["Stalled"]["status"] == "False"


def test_a_missing_secret_is_seen_on_the_pod(world: World) -> None:
    world.job("job")
    master, _ = world.pods("job")
    waiting = {"reason": "CreateContainerConfigError", "message": 'secret "hf" not found'}
    status = {
        "name": "pytorch",
        "image": "x",
        "imageID": "",
        "restartCount": 0,
        "ready": False,
        "state": {"waiting": waiting},
    }
    body = json.dumps({"status": {"phase": "Pending", "containerStatuses": [status]}})
    world.kubectl("patch", "pod", master, "--subresource=status", "--type=merge", "-p", body)
    assert "hf" in world.until("job", reason="SecretNotFound")["message"]
    world.run_pod(master)
    world.run_pod("job-worker-0")
    world.until("job", state="Running")


def test_from_job_waits_then_starts(world: World) -> None:
    world.job("second", model={"fromJob": {"name": "first"}}, stage="SFT", tuning="Full")
    status = world.until("second", reason="WaitingForDependency")
    assert conditions(status)["Suspended"]["status"] == "True"
    assert "first" in status["message"]
    master, worker = started(world, "first")
    world.end_pod(worker, 0)
    world.end_pod(master, 0, success())
    world.until("first", state="Succeeded")
    world.child("second")
    lineage = wait_for(lambda: world.status("second").get("lineage"), "lineage")
    assert lineage[0]["job"] == "first"
    assert lineage[0]["outputDigest"] == "sha256:aa"


def test_from_job_fails_with_its_parent(world: World) -> None:
    world.job("third", model={"fromJob": {"name": "second"}}, stage="SFT", tuning="Full")
    world.job("second", model={"fromJob": {"name": "first"}}, stage="SFT", tuning="Full")
    wait_for(lambda: "which waits for first" in world.status("third").get("message", ""), "the chain to be told")
    master, _ = started(world, "first")
    world.end_pod(master, 20, failure(Reason.DATASET_SCHEMA_INVALID, 20))
    world.child_condition("first", "Failed", "True")
    world.until("second", state="Failed", reason="DependencyFailed")
    world.until("third", state="Failed", reason="DependencyFailed")


def test_jobs_that_wait_for_each_other(world: World) -> None:
    world.job("one", model={"fromJob": {"name": "two"}}, stage="SFT", tuning="Full")
    world.job("two", model={"fromJob": {"name": "one"}}, stage="SFT", tuning="Full")
    assert "one -> two -> one" in world.until("one", state="Failed", reason="DependencyCycle")["message"]


def test_a_name_that_is_taken(world: World) -> None:
    template = {"spec": {"containers": [{"name": "pytorch", "image": "x"}]}}
    spec = {"pytorchReplicaSpecs": {"Master": {"replicas": 1, "template": template}}}
    world.apply({"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": {"name": "job"}, "spec": spec})
    world.job("job")
    world.until("job", reason="NameConflict")
    world.kubectl("delete", "pytorchjob", "job")
    wait_for(lambda: (world.get("pytorchjob", "job") or {}).get("metadata", {}).get("ownerReferences"), "our own child")


def test_deletion_takes_everything_with_it(world: World) -> None:
    started(world)
    world.kubectl("delete", "ptj", "job", "--wait=false")
    for kind, name in (("ptj", "job"), ("pytorchjob", "job"), ("configmap", "job-config")):
        wait_for(lambda kind=kind, name=name: world.get(kind, name) is None, f"{kind} {name} to go", 30)


def test_a_recreated_job_of_the_same_name_starts_anew(world: World) -> None:
    started(world)
    old = uid_of(world.get("pytorchjob", "job"))
    world.kubectl("delete", "ptj", "job", "--wait=false")
    wait_for(lambda: world.get("ptj", "job") is None, "the first job to go")
    world.job("job")
    for pod in ("job-master-0", "job-worker-0"):
        world.vanish(pod)
    wait_for(lambda: (child := world.get("pytorchjob", "job")) and uid_of(child) != old, "a new child", 40)
    status = wait_for(lambda: world.status("job").get("backend") and world.status("job"), "a status")
    assert status["backend"]["uid"] != old


def test_startup_deadline(world: World) -> None:
    world.job("job", storage={"claimName": "never"}, runPolicy={"startupDeadlineSeconds": 1})
    status = world.until("job", state="Failed", reason="StartupTimeout")
    assert "never" in status["message"]


def test_active_deadline_stops_the_pods(world: World) -> None:
    world.job("job", runPolicy={"activeDeadlineSeconds": 2})
    for pod in world.pods("job"):
        world.run_pod(pod)
    world.until("job", state="Failed", reason="DeadlineExceeded")
    wait_for(lambda: world.child("job")["spec"]["runPolicy"]["suspend"], "the pods to be stopped")


def test_children_go_after_the_ttl_and_the_job_stays(world: World) -> None:
    master, worker = started(world, runPolicy={"ttlSecondsAfterFinished": 1})
    world.end_pod(worker, 0)
    world.end_pod(master, 0, success())
    world.until("job", state="Succeeded")
    wait_for(lambda: world.get("pytorchjob", "job") is None, "the child to go")
    wait_for(lambda: world.get("configmap", "job-config") is None, "its configuration to go")
    assert world.status("job")["state"] == "Succeeded"
    assert world.status("job")["output"]
