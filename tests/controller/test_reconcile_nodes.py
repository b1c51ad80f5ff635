"""Lost nodes, and causes that show after the restart was decided."""

from __future__ import annotations

from typing import Any

import pytest
from model_cluster import Cluster, running_cluster
from reconcile_kit import everybody, said

from posttrain_api.reasons import Reason
from posttrain_operator.actions import Object
from posttrain_operator.observe import unready_since
from posttrain_operator.reconcile import lookups


def pass_slowly(cluster: Cluster, seconds: float) -> None:
    """The operator looks as often as it asked to."""
    end = seconds
    while end > 0:
        wait = cluster.step().requeue_after
        assert wait is not None, "a pod on a silent node is looked at again"
        cluster.pass_time(max(1.0, min(wait, end)))
        end -= max(1.0, wait)
    cluster.settle()


def deletions(cluster: Cluster) -> dict[str, int | None]:
    """Of pods, by uid: the last grace."""
    found = [d for actions in cluster.history for d in actions.delete if d.kind is Object.POD]
    return {str(d.uid): d.grace_seconds for d in found}


def test_a_pod_on_a_silent_node_is_given_up_after_a_minute() -> None:
    cluster = running_cluster()
    worker, master = cluster.uid("worker"), cluster.uid("master")
    cluster.lose_node(worker)
    cluster.settle()
    pass_slowly(cluster, cluster.timing.lost_node - 5)
    assert "restarts" not in cluster.status
    pass_slowly(cluster, 6)
    assert deletions(cluster) == {worker: 0, master: 1}
    everybody(cluster)
    status = cluster.status
    assert (status["state"], status["attempts"]) == ("Running", 2)
    assert status["restarts"] == {"total": 0, "byCause": {"NodeLost": 1}}
    assert status["failure"]["node"] == "node-job-worker-0"
    assert status["failure"]["replica"] == "worker-0"
    assert "has not been ready since" in status["failure"]["message"]


def test_a_node_that_comes_back_in_time_costs_nothing() -> None:
    cluster = running_cluster()
    cluster.lose_node(cluster.uid("worker"))
    cluster.settle()
    cluster.pass_time(cluster.timing.lost_node - 1)
    cluster.settle()
    cluster.restore_nodes()
    cluster.settle()
    cluster.pass_time(1000)
    cluster.settle()
    assert cluster.status["state"] == "Running"
    assert not deletions(cluster)


def test_of_a_node_that_is_gone_the_pod_s_own_silence_counts() -> None:
    cluster = running_cluster()
    cluster.lose_node(cluster.uid("worker"))
    cluster.unready = dict.fromkeys(cluster.unready)
    cluster.pass_time(cluster.timing.lost_node - 1)
    cluster.settle()
    assert "failure" not in cluster.status
    cluster.pass_time(1)
    cluster.settle()
    assert cluster.status["failure"]["reason"] == "NodeLost"
    assert "is gone" in cluster.status["failure"]["message"]


@pytest.mark.parametrize("late", [False, True])
def test_peers_that_notice_first_do_not_pay_for_the_node(late: bool) -> None:
    """The master ends with PeerLost at once, the node counts as lost a minute later: before or after the old pods'
    deletion was asked for."""
    cluster = running_cluster()
    worker = cluster.uid("worker")
    cluster.lose_node(worker)
    cluster.end(cluster.uid("master"), 160, said(Reason.PEER_LOST, 160))
    cluster.settle()
    cluster.pass_time(cluster.timing.settle)
    if late:
        cluster.settle()
        assert cluster.status["restarts"]["byCause"] == {"PeerLost": 1}
    cluster.pass_time(cluster.timing.lost_node)
    cluster.settle()
    assert cluster.status["restarts"] == {"total": 0, "byCause": {"NodeLost": 1}}
    assert cluster.status["failure"]["reason"] == "NodeLost"
    assert deletions(cluster)[worker] == 0
    everybody(cluster)
    assert (cluster.status["state"], cluster.status["attempts"]) == ("Running", 2)


def test_a_drained_pod_whose_node_is_lost_goes_once_and_after_the_decision() -> None:
    """It is Terminating already and its grace is over: condemned and stuck at the same time."""
    cluster = running_cluster()
    worker = cluster.uid("worker")
    cluster.terminate(worker, 30)
    cluster.lose_node(worker)
    cluster.pass_time(cluster.timing.lost_node)
    decision = cluster.step()
    assert not decision.delete
    assert decision.status is not None
    assert decision.status["failure"]["reason"] == "NodeLost"
    deleted = [(delete.uid, delete.grace_seconds) for delete in cluster.step().delete]
    assert sorted(deleted) == sorted({(worker, 0), (cluster.uid("master"), 1)})


def test_a_rank_whose_own_error_is_older_wins_over_the_node() -> None:
    cluster = running_cluster()
    cluster.lose_node(cluster.uid("worker"))
    cluster.end(cluster.uid("master"), 190, said(Reason.TRAINER_ERROR, 190, step=3))
    cluster.pass_time(cluster.timing.lost_node)
    cluster.settle()
    assert cluster.status["restarts"]["byCause"] == {"TrainerError": 1}


def test_a_suspended_job_waits_for_the_grace_of_a_pod_on_a_silent_node() -> None:
    cluster = running_cluster()
    worker = cluster.uid("worker")
    cluster.edit(suspend=True)
    cluster.settle()
    cluster.training_operator()
    cluster.lose_node(worker)
    cluster.kubelet()
    cluster.pass_time(29)
    cluster.settle()
    assert not deletions(cluster)
    cluster.pass_time(cluster.timing.lost_node)
    cluster.settle()
    assert deletions(cluster) == {worker: 0}
    assert cluster.status["state"] == "Suspended"
    assert "restarts" not in cluster.status


def test_a_cause_that_shows_late_takes_the_place_of_the_lost_peer() -> None:
    cluster = running_cluster()
    cluster.end(cluster.uid("master"), 160, said(Reason.PEER_LOST, 160))
    cluster.settle()
    cluster.pass_time(cluster.timing.settle)
    cluster.settle()
    assert cluster.status["failure"]["reason"] == "PeerLost"
    cluster.end(cluster.uid("worker"), 162, said(Reason.PROCESS_KILLED, 162, rank=1, step=7))
    cluster.settle()
    status = cluster.status
    assert status["restarts"] == {
        "total": 1,
        "byCause": {"ProcessKilled": 1},
        "sinceCheckpoint": {"processKilled": 1},
    }
    assert (status["failure"]["replica"], status["failure"]["step"]) == ("worker-0", 7)
    everybody(cluster)
    assert cluster.status["state"] == "Running"


@pytest.mark.parametrize(("code", "reason"), [(143, "Error"), (137, "Error")])
def test_what_our_own_deletion_does_to_a_pod_is_no_cause(code: int, reason: str) -> None:
    cluster = running_cluster()
    cluster.end(cluster.uid("master"), 160, said(Reason.PEER_LOST, 160))
    cluster.settle()
    cluster.pass_time(cluster.timing.settle)
    cluster.settle()
    message = said(Reason.PREEMPTED, 143) if code == 143 else ""
    cluster.end(cluster.uid("worker"), code, message, reason)
    everybody(cluster)
    assert cluster.status["restarts"]["byCause"] == {"PeerLost": 1}


def test_a_late_cause_without_a_budget_is_the_end() -> None:
    cluster = running_cluster(runPolicy={"restarts": {"outOfMemory": 0}})
    cluster.end(cluster.uid("master"), 160, said(Reason.PEER_LOST, 160))
    cluster.settle()
    cluster.pass_time(cluster.timing.settle)
    cluster.settle()
    cluster.end(cluster.uid("worker"), 137, reason="OOMKilled")
    cluster.settle()
    assert (cluster.status["reason"], cluster.status["failure"]["reason"]) == ("RestartBudgetExhausted", "OutOfMemory")


def test_no_node_is_looked_at_while_all_is_well() -> None:
    cluster = running_cluster()
    assert lookups.while_running(cluster.facts(), cluster.observation(), cluster.now).nodes == ()
    cluster.lose_node(cluster.uid("master"))
    assert lookups.while_running(cluster.facts(), cluster.observation(), cluster.now).nodes == ("node-job-master-0",)


@pytest.mark.parametrize(
    ("node", "wanted"),
    [
        (None, (True, None)),
        ({"status": {"conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": "t"}]}}, (False, "t")),
        ({"status": {"conditions": [{"type": "Ready", "status": "Unknown", "lastTransitionTime": "t"}]}}, (True, "t")),
        ({"metadata": {"creationTimestamp": "c"}}, (True, "c")),
    ],
)
def test_how_a_node_is_read(node: dict[str, Any] | None, wanted: tuple[bool, str | None]) -> None:
    assert unready_since(node) == wanted
