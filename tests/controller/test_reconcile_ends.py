"""reconcile's ends, case by case: suspension, deadlines, success, clean-up, and what follows an end."""

from __future__ import annotations

import pytest
from model_cluster import Cluster, running_cluster
from reconcile_kit import SUCCESS, everybody


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
    assert cluster.timing.silence == 60, "what it has run so far"
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
    cluster.pass_time(100 - cluster.timing.silence)
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


def test_a_child_deleted_while_suspended_costs_nothing() -> None:
    cluster = running_cluster()
    cluster.edit(suspend=True)
    everybody(cluster)
    assert cluster.status["state"] == "Suspended"
    cluster.lose_child()
    cluster.settle()
    assert (cluster.status["state"], cluster.status.get("restarts")) == ("Suspended", None)
    cluster.edit(suspend=False)
    everybody(cluster)
    assert (cluster.status["state"], cluster.status["attempts"]) == ("Running", 2)
    assert "failure" not in cluster.status
