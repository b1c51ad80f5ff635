"""Jobs whose child is a TrainJob: the same decisions, with JobSet in the training-operator's place."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings
from model_cluster import Cluster, made_to_run
from reconcile_kit import SUCCESS, everybody, said
from test_reconcile_properties import Life
from trainjob_model import TrainJobCluster

from posttrain_api.reasons import Reason
from posttrain_operator.actions import Object


def trainjob_cluster(**spec: Any) -> TrainJobCluster:
    """A job whose pods all run, and have for long enough to have trained."""
    return made_to_run(TrainJobCluster(**spec))


def test_the_status_says_what_runs_the_job() -> None:
    cluster = trainjob_cluster()
    assert cluster.child is not None
    assert cluster.status["backend"] == {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "name": "job",
        "uid": cluster.child["metadata"]["uid"],
    }


def test_the_runtime_is_there_before_the_child() -> None:
    cluster = TrainJobCluster()
    created = [write.kind for actions in [cluster.step()] for write in actions.create]
    assert created == [Object.CONFIG_MAP, Object.TRAINING_RUNTIME, Object.TRAINJOB]


def test_a_killed_rank_brings_all_down_and_up_again() -> None:
    cluster = trainjob_cluster()
    before = set(cluster.status["attempt"]["podUIDs"])
    cluster.end(cluster.uid("worker"), 137)
    everybody(cluster)
    status = cluster.status
    assert (status["state"], status["attempts"], status["attempt"]["number"]) == ("Running", 2, 2)
    assert not before & set(status["attempt"]["podUIDs"])
    assert status["restarts"]["byCause"] == {"ProcessKilled": 1}
    assert status["failure"]["replica"] == "worker-0"


def test_an_end_by_sigterm_that_only_jobset_answered_uses_up_the_budget() -> None:
    """JobSet deletes the peers of every failed pod: that is no sign that somebody asked for it."""
    cluster = trainjob_cluster()
    cluster.end(cluster.uid("master"), 143)
    cluster.training_operator()
    everybody(cluster)
    assert cluster.status["restarts"]["total"] == 1
    assert "nobody had asked" in cluster.status["failure"]["message"]


def test_under_jobset_nobody_waits_in_an_init_container() -> None:
    """One that fails there is somebody else's, and its end counts."""
    cluster = TrainJobCluster()
    cluster.settle()
    cluster.training_operator()
    cluster.settle()
    cluster.give_up(cluster.uid("worker"))
    cluster.settle()
    cluster.pass_time(cluster.timing.settle)
    cluster.settle()
    assert cluster.status["restarts"]["byCause"] == {"PeerLost": 1}


def test_a_drained_pod_s_end_is_free() -> None:
    cluster = trainjob_cluster()
    cluster.terminate(cluster.uid("worker"), 30)
    cluster.settle()
    cluster.pass_time(2)
    everybody(cluster)
    status = cluster.status
    assert (status["state"], status["attempts"]) == ("Running", 2)
    assert status["restarts"]["total"] == 0
    assert status["restarts"]["byCause"] == {"Preempted": 1}


def test_a_permanent_end_fails_the_job() -> None:
    cluster = trainjob_cluster()
    cluster.end(cluster.uid("worker"), 21, said(Reason.DATA_ROWS_REJECTED, 21))
    everybody(cluster)
    assert (cluster.status["state"], cluster.status["reason"]) == ("Failed", "DataRowsRejected")


def test_the_first_pod_s_record_is_the_success() -> None:
    cluster = trainjob_cluster()
    cluster.end(cluster.uid("master"), 0, SUCCESS, "Completed")
    everybody(cluster)
    assert cluster.status["state"] == "Succeeded"
    assert cluster.status["output"]["uri"] == "pvc://runs/job/output"


def test_suspend_and_resume() -> None:
    cluster = trainjob_cluster()
    cluster.edit(suspend=True)
    everybody(cluster)
    assert cluster.child is not None
    assert cluster.child["spec"]["suspend"] is True
    assert (cluster.status["state"], cluster.pods) == ("Suspended", {})
    cluster.edit(suspend=False)
    everybody(cluster)
    assert (cluster.status["state"], cluster.status["attempts"]) == ("Running", 2)
    assert cluster.status.get("restarts", {}).get("total", 0) == 0


def test_the_ttl_takes_the_runtime_with_the_child() -> None:
    cluster = trainjob_cluster(runPolicy={"ttlSecondsAfterFinished": 60})
    cluster.end(cluster.uid("master"), 0, SUCCESS, "Completed")
    everybody(cluster)
    cluster.pass_time(61)
    cluster.settle()
    assert cluster.child is None
    assert not [made for made in cluster.maps.values() if made["kind"] == "TrainingRuntime"]


def test_a_kind_that_is_not_there() -> None:
    cluster = TrainJobCluster()
    cluster.backend_available = False
    cluster.settle()
    assert cluster.condition("Stalled")["reason"] == "BackendMissing"
    assert "TrainJob kind (trainer.kubeflow.org/v1alpha1); install Kubeflow Trainer" in cluster.status["message"]


def test_another_backend_before_the_start_makes_another_child() -> None:
    """The child is there and the status does not name it yet: the operator died between the two."""
    cluster = Cluster()
    cluster.step()
    assert cluster.child is not None
    assert "backend" not in cluster.status
    cluster.edit(backend="TrainJob")
    actions = cluster.step()
    assert [delete.kind for delete in actions.delete if delete.kind.is_child] == [Object.PYTORCHJOB]
    assert cluster.child is None


class TrainJobLife(Life):
    """Everything that may happen, under JobSet."""

    MODEL = TrainJobCluster


TrainJobLife.TestCase.settings = settings(
    max_examples=30, stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow]
)
TestTrainJobLife = TrainJobLife.TestCase
