"""The pause after an attempt that never trained: how long, what carries it out, and that nothing slips through."""

from __future__ import annotations

from typing import Any

import pytest
from model_cluster import Cluster, running_cluster
from reconcile_kit import everybody, said

from posttrain_api.reasons import Reason
from posttrain_api.spec.run import RESTARTS
from posttrain_operator import clock
from posttrain_operator.reconcile.restarts import GRACE_SECONDS

NO_SUCH_FILE = 'exec: "python": executable file not found in $PATH'


def starting_cluster(**spec: Any) -> Cluster:
    """Pods that exist and do not run yet."""
    cluster = Cluster(**spec)
    cluster.settle()
    cluster.training_operator()
    cluster.settle()
    return cluster


def break_container(cluster: Cluster) -> None:
    """What a missing binary looks like: exit code 128 at once, and the pod is made again at once."""
    cluster.end(cluster.uid("master"), 128, NO_SUCH_FILE, "StartError")
    cluster.settle()
    cluster.training_operator()
    cluster.settle()
    cluster.kubelet()


def pass_pause(cluster: Cluster) -> float:
    """To the end of the pause; how long it was."""
    end = clock.parse(cluster.status["restarts"]["notBefore"])
    assert end is not None
    seconds = (end - cluster.now).total_seconds()
    cluster.pass_time(seconds - 1)
    cluster.settle()
    cluster.training_operator()
    assert not cluster.pods, "no pod before the pause is over"
    cluster.pass_time(1)
    cluster.settle()
    cluster.training_operator()
    assert cluster.pods
    cluster.settle()
    return seconds


def test_a_container_that_cannot_start_is_tried_again_ever_more_slowly() -> None:
    cluster = starting_cluster()
    pauses = []
    for number in range(RESTARTS["total"]):
        break_container(cluster)
        assert cluster.status["state"] == "Restarting"
        assert cluster.status["restarts"]["total"] == number + 1
        assert cluster.child is not None
        assert cluster.child["spec"]["runPolicy"]["suspend"]
        assert NO_SUCH_FILE in cluster.status["message"]
        pauses.append(cluster.status["restarts"]["pauseSeconds"])
        pass_pause(cluster)
        assert cluster.status["attempts"] == number + 2
    assert pauses == [10, 20, 40, 80, 160, 300, 300, 300, 300, 300]
    break_container(cluster)
    assert cluster.status["reason"] == "RestartBudgetExhausted"
    assert cluster.status["failure"]["reason"] == "ProcessKilled"


def test_it_trains_once_the_cause_is_mended() -> None:
    cluster = starting_cluster()
    break_container(cluster)
    pass_pause(cluster)
    cluster.run_all()
    cluster.settle()
    assert cluster.status["state"] == "Running"
    assert cluster.status["attempt"]["number"] == cluster.status["attempts"] == 2
    cluster.pass_time(cluster.timing.silence)
    cluster.end(cluster.uid("worker"), 137)
    everybody(cluster)
    assert cluster.status["state"] == "Running", "an attempt that trained is followed at once"
    assert "notBefore" not in cluster.status["restarts"]


def test_a_pod_made_before_the_pause_took_hold_counts_once() -> None:
    """The training-operator is faster than the suspension: its new pod fails too, and is no second restart."""
    cluster = starting_cluster()
    cluster.end(cluster.uid("master"), 128, NO_SUCH_FILE, "StartError")
    cluster.step()
    cluster.training_operator()
    cluster.end(cluster.uid("master"), 128, NO_SUCH_FILE, "StartError")
    cluster.settle()
    cluster.training_operator()
    cluster.kubelet()
    cluster.settle()
    pass_pause(cluster)
    assert cluster.status["restarts"]["total"] == 1
    assert cluster.status["attempts"] == 2


def test_pods_that_are_left_of_the_attempt_do_not_outlast_the_pause() -> None:
    """The suspension alone gives a worker that waits in a dead group its whole grace period."""
    cluster = starting_cluster()
    cluster.end(cluster.uid("master"), 128, NO_SUCH_FILE, "StartError")
    cluster.settle()
    worker = cluster.uid("worker")
    cluster.terminate(worker, 600)
    cluster.settle()
    assert cluster.pods[worker]["metadata"]["deletionGracePeriodSeconds"] == GRACE_SECONDS
    cluster.kubelet()
    cluster.settle()
    pass_pause(cluster)
    assert cluster.status["restarts"]["total"] == 1


def test_a_lone_pod_that_was_replaced_at_once_waits_too() -> None:
    cluster = starting_cluster(resources={"nodes": 1, "gpusPerNode": 1})
    cluster.end(cluster.uid("master"), 128, NO_SUCH_FILE, "StartError")
    cluster.training_operator()
    cluster.settle()
    cluster.training_operator()
    cluster.kubelet()
    cluster.settle()
    pass_pause(cluster)
    assert (cluster.status["attempts"], cluster.status["restarts"]["total"]) == (2, 1)


def test_preemption_before_training_has_no_pause() -> None:
    cluster = starting_cluster()
    cluster.terminate(cluster.uid("master"), 30)
    cluster.end(cluster.uid("master"), 143)
    cluster.settle()
    assert cluster.status["restarts"] == {"total": 0, "byCause": {"Preempted": 1}}


def test_suspension_during_a_pause() -> None:
    cluster = starting_cluster()
    break_container(cluster)
    cluster.edit(suspend=True)
    cluster.settle()
    assert cluster.status["state"] == "Suspended"
    cluster.pass_time(100)
    cluster.edit(suspend=False)
    everybody(cluster)
    assert cluster.status["state"] == "Running"


@pytest.mark.parametrize("code", [51, 10])
def test_a_permanent_end_in_a_pause_is_the_end(code: int) -> None:
    cluster = starting_cluster()
    cluster.end(cluster.uid("worker"), 128, NO_SUCH_FILE, "StartError")
    cluster.step()
    cluster.end(cluster.uid("master"), code, said(Reason.STORAGE_FULL, code))
    cluster.settle()
    assert cluster.status["state"] == "Failed"


def test_a_training_attempt_is_restarted_at_once() -> None:
    cluster = running_cluster()
    cluster.pass_time(5)
    cluster.end(cluster.uid("worker"), 128)
    cluster.settle()
    assert "notBefore" not in cluster.status["restarts"]


@pytest.mark.parametrize(("reports", "lasted", "paused"), [(False, 5, True), (False, 60, False), (True, 5, False)])
def test_without_reports_a_container_that_was_ready_for_a_moment_has_not_trained(
    reports: bool, lasted: float, paused: bool
) -> None:
    """Where no status server runs, pods that are ready count as running, and one that crashes was ready too."""
    cluster = starting_cluster()
    cluster.bundle = "PEM" if reports else None
    cluster.run_all()
    cluster.report(phase="Training")
    cluster.settle()
    assert cluster.status["state"] == "Running"
    cluster.pass_time(lasted)
    cluster.end(cluster.uid("worker"), 190, said(Reason.TRAINER_ERROR, 190))
    cluster.settle()
    assert ("notBefore" in cluster.status["restarts"]) == paused
