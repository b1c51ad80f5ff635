"""reconcile, case by case: what the API page promises."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from model_cluster import Cluster, running_cluster

from posttrain_api.reasons import Reason
from posttrain_api.records import Failure, Output, Success, render_termination
from posttrain_operator.actions import Object
from posttrain_operator.facts import Missing, Note
from posttrain_operator.reconcile.intent import Relative
from posttrain_operator.reconcile.restarts import RESTART_BUDGET

OUTPUT = Output(uri="pvc://runs/job/output", digest="sha256:a", format="safetensors", size_bytes=1)
SUCCESS = render_termination(Success(output=OUTPUT, step=5))


def said(reason: Reason, code: int, **fields: Any) -> str:
    return render_termination(Failure(reason=reason, message="m", exit_code=code, **fields))


def everybody(cluster: Cluster, rounds: int = 3) -> None:
    """All others do their part, then the operator."""
    for _ in range(rounds):
        cluster.settle()
        cluster.kubelet()
        cluster.training_operator()
        cluster.run_all()
    cluster.settle()


def test_configuration_before_child_and_status_after() -> None:
    cluster = Cluster()
    cluster.bundle = "PEM"
    first = cluster.step()
    assert [create.name for create in first.create] == ["job-config", "job-status-ca", "job"]
    assert first.status is None
    assert first.requeue_after == 0
    second = cluster.step()
    assert second.status is not None
    assert second.status["backend"]["uid"] == cluster.child["metadata"]["uid"]
    assert cluster.step().nothing


def test_a_refused_spec_names_every_problem() -> None:
    cluster = Cluster(lora={"rank": 0}, training={"epochs": -1})
    cluster.settle()
    assert (cluster.status["state"], cluster.status["reason"]) == ("Failed", "InvalidSpec")
    assert "spec.lora.rank" in cluster.status["message"]
    assert "spec.training.epochs" in cluster.status["message"]
    assert cluster.condition("Validated")["status"] == "False"
    assert cluster.child is None


def test_an_edit_before_the_start_is_taken() -> None:
    """The child was made from an older spec and the status does not know it yet."""
    cluster = Cluster()
    cluster.step()
    assert cluster.child is not None
    before = cluster.child["metadata"]["uid"]
    cluster.edit(training={"learningRate": 0.1})
    cluster.settle()
    assert cluster.child["metadata"]["uid"] != before
    assert "0.1" in cluster.maps["job-config"]["data"]["config.json"]


def test_a_configuration_of_another_spec_is_made_anew() -> None:
    cluster = Cluster()
    cluster.step(prefix=1)
    assert cluster.child is None
    cluster.edit(training={"learningRate": 0.1})
    cluster.settle()
    assert "0.1" in cluster.maps["job-config"]["data"]["config.json"]


@pytest.mark.parametrize("reason", [Reason.STORAGE_NOT_FOUND, Reason.CONFIG_MAP_NOT_FOUND])
def test_missing_objects_stall_and_are_tried_again(reason: Reason) -> None:
    cluster = Cluster()
    cluster.missing = (Missing(reason, "it is not there"),)
    actions = cluster.step()
    assert actions.requeue_after == cluster.timing.retry
    assert (cluster.condition("Stalled")["status"], cluster.condition("Stalled")["reason"]) == ("True", reason)
    cluster.missing = ()
    cluster.settle()
    assert cluster.child is not None
    assert cluster.condition("Stalled")["status"] == "False"


def test_backend_missing() -> None:
    cluster = Cluster()
    cluster.backend_available = False
    cluster.settle()
    assert cluster.status["reason"] == "BackendMissing"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ('pods "x" is forbidden: exceeded quota: gpus', Reason.QUOTA_EXCEEDED),
        ('pods "x" is forbidden: violates PodSecurity "restricted:latest"', Reason.POD_SECURITY_DENIED),
    ],
)
def test_pods_that_cannot_be_made(message: str, reason: Reason) -> None:
    cluster = Cluster()
    cluster.settle()
    assert cluster.child is not None
    cluster.notes = (Note(cluster.child["metadata"]["uid"], "FailedCreatePod", message, "2026-01-01T00:00:05Z"),)
    cluster.pass_time(5)
    cluster.settle()
    assert cluster.condition("Stalled")["reason"] == reason
    cluster.training_operator()
    cluster.settle()
    assert cluster.condition("Stalled")["status"] == "False"


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (
            {"containerStatuses": [{"name": "pytorch", "state": {"waiting": {"reason": "ImagePullBackOff"}}}]},
            "ImagePullFailed",
        ),
        (
            {
                "containerStatuses": [
                    {
                        "name": "pytorch",
                        "state": {
                            "waiting": {"reason": "CreateContainerConfigError", "message": 'secret "s" not found'}
                        },
                    }
                ]
            },
            "SecretNotFound",
        ),
        (
            {
                "conditions": [
                    {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}
                ]
            },
            "Unschedulable",
        ),
        (
            {
                "conditions": [
                    {
                        "type": "PodScheduled",
                        "status": "False",
                        "reason": "Unschedulable",
                        "message": 'persistentvolumeclaim "d" not found',
                    }
                ]
            },
            "StorageNotFound",
        ),
    ],
)
def test_pods_that_do_not_start(status: dict[str, Any], reason: str) -> None:
    cluster = Cluster()
    cluster.settle()
    cluster.training_operator()
    uid = cluster.uid("worker")
    cluster.pods[uid]["status"] = {"phase": "Pending", **status}
    cluster.pass_time(60)
    cluster.settle()
    assert cluster.condition("Stalled")["reason"] == reason
    cluster.pods[uid]["status"] = {"phase": "Pending"}
    cluster.run_all()
    cluster.settle()
    assert cluster.status["state"] == "Running"


def test_a_secret_that_cannot_be_mounted_shows_in_events() -> None:
    cluster = Cluster()
    cluster.settle()
    cluster.training_operator()
    message = 'MountVolume.SetUp failed for volume "secret-0" : secret "hf" not found'
    cluster.notes = (Note(cluster.uid("master"), "FailedMount", message),)
    cluster.settle()
    assert cluster.status["reason"] == "SecretNotFound"


def test_a_secret_that_came_is_missed_no_more_while_its_image_is_pulled() -> None:
    """Kubernetes keeps the Event for an hour; the pod itself says that its volumes are there."""
    cluster = Cluster()
    cluster.settle()
    cluster.training_operator()
    uid = cluster.uid("master")
    cluster.notes = (Note(uid, "FailedMount", 'secret "hf" not found'),)
    mounted = {"type": "PodReadyToStartContainers", "status": "True"}
    pulling = {"name": "pytorch", "state": {"waiting": {"reason": "ContainerCreating"}}}
    cluster.pods[uid]["status"] = {"phase": "Pending", "conditions": [mounted], "containerStatuses": [pulling]}
    cluster.settle()
    assert cluster.condition("Stalled")["status"] == "False"


def test_a_lost_configuration_is_made_again_with_the_child() -> None:
    cluster = running_cluster()
    del cluster.maps["job-config"]
    cluster.forget()
    for uid in list(cluster.pods):
        cluster.vanish(uid)
    cluster.training_operator()
    message = 'MountVolume.SetUp failed for volume "config" : configmap "job-config" not found'
    cluster.notes = (Note(cluster.uid("master"), "FailedMount", message),)
    cluster.settle()
    assert cluster.status["reason"] == "ConfigMapNotFound"
    assert "kubectl delete pytorchjob job" in cluster.status["message"]
    cluster.lose_child()
    everybody(cluster)
    assert "job-config" in cluster.maps
    assert cluster.status["state"] == "Running"


def relative(name: str, outcome: str = "", parents: tuple[str, ...] = ()) -> Relative:
    output = OUTPUT.to_wire() if outcome == "Succeeded" else None
    return Relative(name, f"{name}-uid", "Pretrain", outcome, "StorageFull", parents, output)


def child_of(name: str) -> Cluster:
    return Cluster(stage="SFT", tuning="Full", model={"fromJob": {"name": name}})


def test_from_job() -> None:
    cluster = child_of("base")
    cluster.settle()
    assert (cluster.status["reason"], cluster.condition("Suspended")["status"]) == ("WaitingForDependency", "True")
    cluster.family = {"base": relative("base", parents=("older",))}
    cluster.settle()
    assert "base, which waits for older, which does not exist" in cluster.status["message"]
    cluster.family = {"base": replace(relative("base", "Succeeded"), lineage=({"job": "root", "uid": "r"},))}
    cluster.settle()
    assert cluster.child is not None
    assert [entry["job"] for entry in cluster.status["lineage"]] == ["root", "base"]
    assert cluster.status["model"]["displayName"] == "base"


def test_from_job_that_failed() -> None:
    cluster = child_of("base")
    cluster.family = {"base": relative("base", "Failed")}
    cluster.settle()
    assert (cluster.status["state"], cluster.status["reason"]) == ("Failed", "DependencyFailed")


def test_from_job_in_a_circle() -> None:
    cluster = child_of("a")
    cluster.family = {"a": relative("a", parents=("b",)), "b": relative("b", parents=("job",))}
    cluster.settle()
    assert cluster.status["reason"] == "DependencyCycle"
    assert "job -> a -> b -> job" in cluster.status["message"]


def test_a_running_job_needs_its_parent_no_more() -> None:
    cluster = child_of("base")
    cluster.family = {"base": relative("base", "Succeeded")}
    everybody(cluster)
    cluster.family = {}
    cluster.settle()
    assert cluster.status["state"] == "Running"


def test_the_loop_must_have_started() -> None:
    cluster = Cluster()
    cluster.bundle = "PEM"
    cluster.settle()
    cluster.training_operator()
    cluster.run_all()
    cluster.settle()
    assert cluster.status["state"] == "Initializing"
    cluster.report(phase="Loading")
    cluster.settle()
    assert cluster.status["state"] == "Initializing"
    cluster.report(phase="Training")
    cluster.settle()
    assert cluster.status["state"] == "Running"


def test_without_reports_ready_pods_count_as_running_after_a_while() -> None:
    cluster = Cluster()
    cluster.bundle = "PEM"
    cluster.settle()
    cluster.training_operator()
    cluster.run_all()
    cluster.settle()
    cluster.pass_time(cluster.timing.silence)
    cluster.settle()
    assert cluster.status["state"] == "Running"


def test_reported_facts_are_kept() -> None:
    cluster = running_cluster()
    saved = {"step": 10, "time": "2026-01-01T00:00:00Z", "uri": "u", "sizeBytes": 1, "digest": "sha256:1"}
    cluster.report(phase="Training", checkpoint=saved, dataReport={"rows": 2, "used": 2, "tokens": 9})
    cluster.settle()
    cluster.report(phase="Training", checkpoint={**saved, "step": 20, "digest": "sha256:2"})
    cluster.settle()
    assert cluster.status["checkpoints"] == {"last": {**saved, "step": 20, "digest": "sha256:2"}, "count": 2}
    assert cluster.status["dataReport"]["rows"] == 2


def test_a_decision_is_written_before_a_pod_is_deleted() -> None:
    cluster = running_cluster()
    cluster.end(cluster.uid("worker"), 137, reason="OOMKilled")
    decision = cluster.step()
    assert not decision.delete
    assert decision.status is not None
    assert decision.status["restarts"] == {"total": 1, "byCause": {"OutOfMemory": 1}}
    deletion = cluster.step()
    assert {(d.kind, d.grace_seconds) for d in deletion.delete} == {(Object.POD, 1)}
    everybody(cluster)
    assert (cluster.status["state"], cluster.status["attempts"]) == ("Running", 2)


def test_a_replacement_that_appeared_before_the_decision_goes_too() -> None:
    cluster = running_cluster()
    cluster.end(cluster.uid("master"), 137, reason="OOMKilled")
    cluster.training_operator()
    early = cluster.uid("master")
    cluster.step()
    assert early in {delete.uid for delete in cluster.step().delete}


def test_lost_peers_wait_for_the_cause() -> None:
    cluster = running_cluster()
    cluster.end(cluster.uid("worker"), 160, said(Reason.PEER_LOST, 160))
    actions = cluster.step()
    assert actions.requeue_after == cluster.timing.settle
    assert "restarts" not in cluster.status
    cluster.end(cluster.uid("master"), 162, said(Reason.PROCESS_KILLED, 162, rank=0))
    cluster.settle()
    assert cluster.status["restarts"]["byCause"] == {"ProcessKilled": 1}
    assert cluster.status["failure"]["replica"] == "master-0"


def test_a_lost_peer_without_a_cause_is_the_cause() -> None:
    cluster = running_cluster()
    cluster.end(cluster.uid("worker"), 160, said(Reason.PEER_LOST, 160))
    cluster.settle()
    cluster.pass_time(cluster.timing.settle)
    cluster.settle()
    assert cluster.status["restarts"]["byCause"] == {"PeerLost": 1}


@pytest.mark.parametrize(("code", "spent"), [(143, 0), (137, 1), (161, 1)])
def test_what_a_restart_costs(code: int, spent: int) -> None:
    cluster = running_cluster()
    cluster.end(cluster.uid("worker"), code)
    everybody(cluster)
    assert cluster.status["restarts"]["total"] == spent
    assert sum(cluster.status["restarts"]["byCause"].values()) == 1


def test_the_budget_ends() -> None:
    cluster = running_cluster()
    for _ in range(RESTART_BUDGET):
        cluster.end(cluster.uid("worker"), 137)
        everybody(cluster)
        assert cluster.status["state"] == "Running"
    cluster.end(cluster.uid("worker"), 137)
    everybody(cluster)
    assert (cluster.status["state"], cluster.status["reason"]) == ("Failed", "RestartBudgetExhausted")
    assert cluster.status["failure"]["reason"] == "ProcessKilled"
    assert cluster.status["restarts"]["total"] == RESTART_BUDGET


def test_preemption_never_ends_a_job() -> None:
    cluster = running_cluster()
    for _ in range(RESTART_BUDGET + 2):
        cluster.end(cluster.uid("master"), 143)
        everybody(cluster)
    assert cluster.status["state"] == "Running"


@pytest.mark.parametrize(("second_step", "state"), [(3, "Failed"), (4, "Running")])
def test_the_same_error_at_the_same_step_twice(second_step: int, state: str) -> None:
    cluster = running_cluster()
    for step in (3, second_step):
        cluster.end(cluster.uid("worker"), 190, said(Reason.TRAINER_ERROR, 190, step=step))
        everybody(cluster)
    assert cluster.status["state"] == state


def test_a_pod_replaced_while_no_operator_ran() -> None:
    cluster = running_cluster()
    cluster.end(cluster.uid("worker"), 137)
    cluster.training_operator()
    cluster.forget()
    everybody(cluster)
    assert cluster.status["restarts"]["byCause"] == {"PeerLost": 1}
    assert cluster.status["state"] == "Running"


def test_a_set_replaced_whole_while_no_operator_ran_is_the_next_attempt() -> None:
    cluster = running_cluster()
    for role in ("master", "worker"):
        cluster.vanish(cluster.uid(role))
    cluster.training_operator()
    cluster.forget()
    everybody(cluster)
    assert "restarts" not in cluster.status
    assert (cluster.status["attempts"], cluster.status["attempt"]["number"]) == (2, 2)


def test_a_replacement_that_ran_to_its_end_while_no_operator_ran() -> None:
    """Killed and made again, finished, and only then looked at: the success counts, whatever is recorded."""
    cluster = running_cluster(resources={"nodes": 1, "gpusPerNode": 1})
    cluster.end(cluster.uid("master"), 137)
    cluster.forget()
    cluster.training_operator()
    cluster.run_all()
    cluster.end(cluster.uid("master"), 0, SUCCESS)
    cluster.settle()
    assert cluster.status["state"] == "Succeeded"


def test_a_lone_pod_that_was_replaced_at_once_is_not_deleted_again() -> None:
    cluster = running_cluster(resources={"nodes": 1, "gpusPerNode": 1})
    cluster.end(cluster.uid("master"), 137)
    cluster.training_operator()
    fresh = cluster.uid("master")
    cluster.settle()
    assert not any(actions.delete for actions in cluster.history)
    assert cluster.status["restarts"]["byCause"] == {"ProcessKilled": 1}
    assert cluster.status["attempt"] == {**cluster.status["attempt"], "number": 2, "podUIDs": [fresh]}


def test_a_permanent_end_during_a_restart_is_the_end() -> None:
    cluster = running_cluster()
    cluster.end(cluster.uid("worker"), 137)
    cluster.settle()
    cluster.end(cluster.uid("master"), 51, said(Reason.STORAGE_FULL, 51))
    cluster.settle()
    assert cluster.status["reason"] == "StorageFull"


def test_a_run_that_finishes_during_a_restart_is_finished() -> None:
    cluster = running_cluster()
    cluster.end(cluster.uid("worker"), 137)
    cluster.settle()
    cluster.end(cluster.uid("master"), 0, SUCCESS)
    cluster.settle()
    assert cluster.status["state"] == "Succeeded"


def test_a_deleted_child_is_made_again() -> None:
    cluster = running_cluster()
    cluster.lose_child()
    everybody(cluster)
    assert cluster.status["state"] == "Running"
    assert cluster.child is not None
    assert cluster.status["backend"]["uid"] == cluster.child["metadata"]["uid"]


def test_suspend_saves_then_resumes_with_new_pods_only() -> None:
    cluster = running_cluster()
    cluster.edit(suspend=True)
    cluster.settle()
    assert cluster.child["spec"]["runPolicy"]["suspend"] is True
    cluster.training_operator()
    cluster.edit(suspend=False)
    cluster.settle()
    assert cluster.child["spec"]["runPolicy"]["suspend"] is True, "old pods are still there"
    cluster.kubelet()
    everybody(cluster)
    assert (cluster.status["state"], cluster.status["attempts"]) == ("Running", 2)
    assert "restarts" not in cluster.status


def test_an_exit_during_suspension_decides() -> None:
    cluster = running_cluster()
    cluster.edit(suspend=True)
    cluster.settle()
    cluster.end(cluster.uid("master"), 0, SUCCESS)
    cluster.training_operator()
    cluster.kubelet()
    cluster.edit(suspend=False)
    cluster.settle()
    assert cluster.status["state"] == "Succeeded"
    assert cluster.child["spec"]["runPolicy"]["suspend"] is True


def test_a_late_success_record_is_waited_for() -> None:
    cluster = running_cluster()
    cluster.vanish(cluster.uid("master"))
    cluster.forget()
    cluster._child_condition("Succeeded")
    cluster.settle()
    assert cluster.condition("Finished")["status"] != "True"
    cluster.pass_time(cluster.timing.success + 1)
    cluster.settle()
    assert cluster.status["reason"] == "InternalError"


@pytest.mark.parametrize("policy", ["activeDeadlineSeconds", "startupDeadlineSeconds"])
def test_deadlines(policy: str) -> None:
    cluster = Cluster(runPolicy={policy: 100})
    cluster.settle()
    cluster.training_operator()
    cluster.settle()
    if policy == "activeDeadlineSeconds":
        cluster.run_all()
        cluster.settle()
    assert cluster.step().requeue_after is not None
    cluster.pass_time(101)
    cluster.settle()
    wanted = {"activeDeadlineSeconds": "DeadlineExceeded", "startupDeadlineSeconds": "StartupTimeout"}[policy]
    assert cluster.status["reason"] == wanted
    assert cluster.child["spec"]["runPolicy"]["suspend"] is True


def test_suspended_time_is_not_active_time() -> None:
    cluster = running_cluster(runPolicy={"activeDeadlineSeconds": 100})
    cluster.pass_time(60)
    cluster.edit(suspend=True)
    cluster.settle()
    cluster.training_operator()
    cluster.kubelet()
    cluster.settle()
    cluster.pass_time(1000)
    cluster.edit(suspend=False)
    everybody(cluster)
    assert cluster.status["state"] == "Running"
    cluster.pass_time(41)
    cluster.settle()
    assert cluster.status["reason"] == "DeadlineExceeded"
    assert cluster.status["usage"]["activeSeconds"] == 101


def test_ttl_deletes_the_children_after_the_status_is_written() -> None:
    cluster = running_cluster(runPolicy={"ttlSecondsAfterFinished": 60})
    cluster.end(cluster.uid("master"), 0, SUCCESS)
    cluster.settle()
    assert cluster.status["state"] == "Succeeded"
    assert cluster.step().requeue_after == 60
    cluster.pass_time(60)
    cluster.settle()
    assert cluster.child is None
    assert cluster.maps == {}
    assert cluster.status["output"]["digest"] == "sha256:a"


def test_gpu_time() -> None:
    cluster = running_cluster(resources={"nodes": 2, "gpusPerNode": 4})
    cluster.pass_time(100)
    cluster.end(cluster.uid("worker"), 137)
    everybody(cluster)
    assert cluster.status["usage"] == {"activeSeconds": 100, "gpuSeconds": 800, "gpuSecondsLost": 800}


def test_a_rotated_bundle_reaches_the_job() -> None:
    cluster = Cluster()
    cluster.bundle = "PEM 1"
    everybody(cluster)
    cluster.bundle = "PEM 1 PEM 2"
    cluster.settle()
    assert cluster.maps["job-status-ca"]["data"]["ca.crt"] == "PEM 1 PEM 2"


def test_transition_times_move_only_with_the_status() -> None:
    cluster = running_cluster()
    before = cluster.condition("Validated")["lastTransitionTime"]
    cluster.pass_time(50)
    cluster.end(cluster.uid("worker"), 137)
    everybody(cluster)
    assert cluster.condition("Validated")["lastTransitionTime"] == before
    assert cluster.condition("Running")["lastTransitionTime"] != before


def test_an_edit_after_the_end_is_only_noted() -> None:
    cluster = running_cluster()
    cluster.end(cluster.uid("master"), 0, SUCCESS)
    cluster.settle()
    before = cluster.status
    cluster.edit(suspend=True)
    cluster.settle()
    assert cluster.status["observedGeneration"] == 2
    assert {**cluster.status, "observedGeneration": 1, "conditions": None} == {**before, "conditions": None}
    assert {c["observedGeneration"] for c in cluster.status["conditions"]} == {2}
