"""reconcile's restarts, case by case: what is the cause, what it costs, what was missed while no operator ran."""

from __future__ import annotations

import pytest
from model_cluster import Cluster, running_cluster
from reconcile_kit import SUCCESS, everybody, said

from posttrain_api.reasons import Reason
from posttrain_api.spec.run import RESTARTS
from posttrain_operator.actions import Object

HELD = said(Reason.GUARD_SUSPENDED, 163, rank=0, step=6)
ERROR = said(Reason.TRAINER_ERROR, 190, step=3)


def test_a_decision_is_written_before_a_pod_is_deleted() -> None:
    cluster = running_cluster()
    cluster.end(cluster.uid("worker"), 137, reason="OOMKilled")
    decision = cluster.step()
    assert not decision.delete
    assert decision.status is not None
    assert decision.status["restarts"] == {
        "total": 1,
        "byCause": {"OutOfMemory": 1},
        "sinceCheckpoint": {"outOfMemory": 1},
    }
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


def test_survivors_do_not_wait_out_their_grace_for_a_user_who_suspends_meanwhile() -> None:
    cluster = running_cluster()
    cluster.end(cluster.uid("worker"), 137, reason="OOMKilled")
    cluster.step()
    cluster.edit(suspend=True)
    cluster.step()
    cluster.training_operator()
    survivor = cluster.uid("master")
    assert {(pod.uid, pod.grace_seconds) for pod in cluster.step().delete} == {(survivor, 1)}
    everybody(cluster)
    assert cluster.status["reason"] == "UserSuspended"


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


@pytest.mark.parametrize(("code", "spent"), [(143, 1), (137, 1), (161, 1)])
def test_what_a_restart_costs(code: int, spent: int) -> None:
    cluster = running_cluster()
    cluster.end(cluster.uid("worker"), code)
    everybody(cluster)
    assert cluster.status["restarts"]["total"] == spent
    assert sum(cluster.status["restarts"]["byCause"].values()) == 1


@pytest.mark.parametrize("first", ["master", "worker"])
def test_preemption_never_ends_a_job(first: str) -> None:
    """One pod is told to end; the other saves with it and may end first."""
    cluster = running_cluster()
    for _ in range(RESTARTS["total"] + 2):
        cluster.terminate(cluster.uid("worker"), 600)
        cluster.end(cluster.uid(first), 143, said(Reason.PREEMPTED, 143))
        cluster.step()
        everybody(cluster)
    assert cluster.status["state"] == "Running"
    assert cluster.status["restarts"] == {"total": 0, "byCause": {"Preempted": RESTARTS["total"] + 2}}


def test_an_end_by_sigterm_that_nobody_asked_for_counts() -> None:
    """An image that always exits with 143 would be restarted for ever."""
    cluster = running_cluster()
    for _ in range(RESTARTS["total"]):
        cluster.end(cluster.uid("master"), 143)
        everybody(cluster)
        cluster.pass_time(cluster.timing.silence)
    assert cluster.status["restarts"]["total"] == RESTARTS["total"]
    cluster.end(cluster.uid("master"), 143)
    everybody(cluster)
    assert (cluster.status["state"], cluster.status["reason"]) == ("Failed", "RestartBudgetExhausted")
    assert cluster.status["failure"]["reason"] == "Preempted"
    assert "nobody had asked a pod to end" in cluster.status["failure"]["message"]


def test_a_node_that_shuts_down_asks() -> None:
    cluster = running_cluster()
    uid = cluster.uid("master")
    disrupted = {"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet"}
    cluster.pods[uid]["status"]["conditions"].append(disrupted)
    cluster.end(cluster.uid("worker"), 143)
    everybody(cluster)
    assert cluster.status["restarts"]["total"] == 0


def test_an_end_that_was_missed_may_have_been_asked_for() -> None:
    """While no operator ran, a drained pod went and its peer ended with it."""
    cluster = running_cluster()
    cluster.vanish(cluster.uid("worker"))
    cluster.forget()
    cluster.end(cluster.uid("master"), 143)
    everybody(cluster)
    assert cluster.status["restarts"]["total"] == 0


@pytest.mark.parametrize(("second_step", "state"), [(3, "Failed"), (4, "Running")])
def test_the_same_error_at_the_same_step_twice(second_step: int, state: str) -> None:
    cluster = running_cluster()
    for step in (3, second_step):
        cluster.commit(step - 1)
        cluster.end(cluster.uid("worker"), 190, said(Reason.TRAINER_ERROR, 190, step=step))
        everybody(cluster)
        cluster.pass_time(cluster.timing.silence)
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


@pytest.mark.parametrize("code", [137, 143])
@pytest.mark.parametrize("refused", [0, 1])
def test_resuming_costs_nothing_where_a_write_is_refused(code: int, refused: int) -> None:
    """The operator lives on and remembers how the old pods ended; all writes after the first `refused` come later."""
    cluster = running_cluster()
    cluster.edit(suspend=True)
    cluster.settle()
    for uid in list(cluster.pods):
        cluster.terminate(uid, 30)
        cluster.end(uid, code)
    everybody(cluster)
    assert cluster.status["reason"] == "UserSuspended"
    cluster.edit(suspend=False)
    for _ in range(2):
        cluster.step(prefix=refused)
    everybody(cluster)
    assert (cluster.status["state"], cluster.status["attempts"]) == ("Running", 2)
    assert "restarts" not in cluster.status


def paused_while_the_worker_ends(cluster: Cluster, code: int, message: str, reason: str) -> None:
    """Suspended by its user, and set going again."""
    cluster.edit(suspend=True)
    cluster.step()
    cluster.end(cluster.uid("worker"), code, message, reason)
    everybody(cluster)
    assert cluster.status["reason"] == "UserSuspended"
    cluster.edit(suspend=False)
    everybody(cluster)


@pytest.mark.parametrize(
    ("code", "message", "reason"), [(163, HELD, "Error"), (137, "", "OOMKilled"), (190, ERROR, "Error")]
)
def test_a_resumption_is_no_restart_that_wants_a_cause(code: int, message: str, reason: str) -> None:
    """A restart long ago had none, and a pod says one while its user suspends: it is of the past."""
    cluster = running_cluster(runPolicy={"restarts": {"outOfMemory": 0}})
    cluster.vanish(cluster.uid("worker"))
    cluster.training_operator()
    cluster.pass_time(60)
    everybody(cluster)
    before = cluster.status["restarts"]
    assert before["byCause"] == {"PeerLost": 1}
    paused_while_the_worker_ends(cluster, code, message, reason)
    assert (cluster.status["state"], cluster.status["attempts"]) == ("Running", 3)
    assert cluster.status["restarts"] == before


@pytest.mark.parametrize("refused", [0, 1, 2, 3])
def test_what_ended_before_it_was_recorded_is_not_the_next_childs_failure(refused: int) -> None:
    """A restart was decided, its replacements were never recorded, and the child is deleted with them."""
    cluster = running_cluster()
    cluster.end(cluster.uid("worker"), 137, reason="OOMKilled")
    cluster.step()
    cluster.step()
    cluster.kubelet()
    cluster.training_operator()
    cluster.run_all()
    cluster.lose_child()
    cluster.kubelet()
    assert len(cluster.gone) == 4
    for _ in range(2):
        cluster.step(prefix=refused)
    everybody(cluster)
    assert (cluster.status["state"], cluster.status["attempts"]) == ("Running", 2)
    assert cluster.status["restarts"]["byCause"] == {"OutOfMemory": 1}


@pytest.mark.parametrize("end", [None, 1, 143])
def test_pods_of_a_child_that_nobody_recorded_are_no_attempt(end: int | None) -> None:
    """The leader made the child and died; the spec was edited before the next one looked, so it is made anew."""
    cluster = Cluster(runPolicy={"restarts": {"total": 0}})
    cluster.step(prefix=2)
    assert cluster.child is not None
    cluster.training_operator()
    cluster.run_all()
    cluster.edit(training={"maxSteps": 7})
    cluster.step()
    assert cluster.child is None
    old = set(cluster.pods)
    cluster.settle()
    assert (cluster.child, cluster.status["reason"]) == (None, "CleaningUp")
    for uid in old:
        if end is not None:
            cluster.end(uid, end)
        else:
            cluster.vanish(uid)
    everybody(cluster)
    assert (cluster.status["state"], cluster.status["attempts"]) == ("Running", 1)
    assert not old & set(cluster.status["attempt"]["podUIDs"])
    assert "restarts" not in cluster.status


@pytest.mark.parametrize(("code", "message", "reason"), [(137, "", "OOMKilled"), (163, HELD, "Error")])
def test_what_a_replacement_said_is_not_the_cause_of_the_restart_before_it(
    code: int, message: str, reason: str
) -> None:
    """It was never an attempt: made after the decision, it died while its user suspended the job."""
    cluster = running_cluster(runPolicy={"restarts": {"outOfMemory": 0}})
    cluster.vanish(cluster.uid("worker"))
    cluster.training_operator()
    cluster.pass_time(cluster.timing.settle + 1)
    cluster.step()
    before = cluster.status["restarts"]
    assert before["byCause"] == {"PeerLost": 1}
    cluster.step()
    cluster.kubelet()
    cluster.pass_time(1)
    cluster.training_operator()
    paused_while_the_worker_ends(cluster, code, message, reason)
    assert (cluster.status["state"], cluster.status["restarts"]) == ("Running", before)


def test_a_suspended_job_has_lost_nothing_by_the_deletion_of_its_child() -> None:
    """Deleted and resumed while no operator ran."""
    cluster = running_cluster(runPolicy={"restarts": {"total": 0}})
    cluster.edit(suspend=True)
    everybody(cluster)
    assert cluster.status["reason"] == "UserSuspended"
    cluster.lose_child()
    cluster.edit(suspend=False)
    everybody(cluster)
    assert (cluster.status["state"], cluster.status["attempts"]) == ("Running", 2)
    assert "restarts" not in cluster.status
