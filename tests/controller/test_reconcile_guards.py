"""A guard that warns, and one that suspends: held until the user has said so once, whatever happens meanwhile."""

from __future__ import annotations

import pytest
from model_cluster import Cluster
from reconcile_kit import everybody, ready_cluster, said

from posttrain_api.reasons import Reason

WARNING = {"reason": "GuardWarned", "message": "entropy was 0.002 at step 8, below 0.01", "step": 8}
HELD = said(Reason.GUARD_SUSPENDED, 163, rank=0, step=6)


def running() -> Cluster:
    cluster = ready_cluster()
    cluster.report(phase="Training", step=5)
    cluster.settle()
    assert cluster.status["state"] == "Running"
    return cluster


def tripped(cluster: Cluster) -> None:
    """Both pods end as the guard wants it, and are made anew at once."""
    for role in ("master", "worker"):
        cluster.end(cluster.uid(role), 163, HELD)
    cluster.training_operator()


def held() -> Cluster:
    cluster = running()
    tripped(cluster)
    everybody(cluster)
    assert (cluster.status["state"], cluster.status["reason"]) == ("Suspended", "GuardSuspended")
    return cluster


def released(cluster: Cluster) -> None:
    """Its user suspends it and takes that back; its pods begin."""
    for suspend in (True, False):
        cluster.edit(suspend=suspend)
        everybody(cluster)


def trains_again(cluster: Cluster) -> bool:
    cluster.report(phase="Training", step=7)
    everybody(cluster)
    return bool(cluster.status["state"] == "Running")


def events(cluster: Cluster) -> list[tuple[str, str]]:
    return [(event.kind, event.reason) for actions in cluster.history for event in actions.events]


def test_a_warning_shows_and_goes() -> None:
    cluster = running()
    assert cluster.condition("TrainingHealthy")["status"] == "True"
    for _ in range(2):
        cluster.report(phase="Training", step=9, warning=WARNING)
        cluster.settle()
    healthy = cluster.condition("TrainingHealthy")
    assert (healthy["status"], healthy["reason"], healthy["message"]) == ("False", "GuardWarned", WARNING["message"])
    assert cluster.status["state"] == "Running"
    cluster.report(phase="Training", step=10, warning={**WARNING, "reason": "SamplerMismatch"})
    cluster.settle()
    assert cluster.condition("TrainingHealthy")["reason"] == "SamplerMismatch"
    cluster.report(phase="Training", step=11)
    cluster.settle()
    assert cluster.condition("TrainingHealthy")["status"] == "True"
    warnings = [event for event in events(cluster) if event[0] == "Warning"]
    assert warnings == [("Warning", "GuardWarned"), ("Warning", "SamplerMismatch")]


def test_suspended_by_its_guard() -> None:
    cluster = held()
    assert not cluster.pods
    assert cluster.child is not None
    assert cluster.child["spec"]["runPolicy"]["suspend"] is True
    condition = cluster.condition("Suspended")
    assert (condition["status"], condition["reason"]) == ("True", "GuardSuspended")
    assert "master-0 (rank 0, step 6" in condition["message"]
    assert cluster.status["failure"]["reason"] == "GuardSuspended"
    assert cluster.status.get("restarts", {}).get("total", 0) == 0, "no restart was needed"
    assert ("Warning", "GuardSuspended") in events(cluster)


def test_the_decision_is_written_before_the_pods_are_taken() -> None:
    cluster = running()
    tripped(cluster)
    actions = cluster.step()
    assert (actions.patch, actions.requeue_after) == ((), 0)
    assert cluster.status["reason"] == "GuardSuspended"
    cluster.forget()
    everybody(cluster)
    assert (cluster.status["state"], cluster.status["reason"]) == ("Suspended", "GuardSuspended")


def test_pods_that_came_meanwhile_get_no_grace() -> None:
    """Made before the child was suspended: left alone they would train on for their whole grace, perhaps to the end."""
    cluster = running()
    tripped(cluster)
    cluster.step()
    assert {(pod.uid, pod.grace_seconds) for pod in cluster.step().delete} == {(uid, 1) for uid in cluster.pods}
    everybody(cluster)
    assert (cluster.status["state"], cluster.status["reason"]) == ("Suspended", "GuardSuspended")


def test_it_stays_so() -> None:
    cluster = held()
    cluster.forget()
    cluster.pass_time(100_000)
    everybody(cluster)
    assert cluster.status["reason"] == "GuardSuspended"
    assert not cluster.pods


@pytest.mark.parametrize("forgets", [False, True])
def test_the_user_sets_it_going_again(forgets: bool) -> None:
    cluster = held()
    cluster.edit(suspend=True)
    everybody(cluster)
    assert (cluster.status["state"], cluster.status["reason"]) == ("Suspended", "UserSuspended")
    if forgets:
        cluster.forget()
    cluster.edit(suspend=False)
    everybody(cluster)
    assert trains_again(cluster)
    assert cluster.status["attempt"]["number"] == 2
    assert cluster.condition("Suspended")["status"] == "False"


def test_a_second_time() -> None:
    cluster = held()
    released(cluster)
    assert trains_again(cluster)
    tripped(cluster)
    everybody(cluster)
    assert cluster.status["reason"] == "GuardSuspended"


def test_while_it_is_held_its_child_may_go() -> None:
    """Somebody deletes the PyTorchJob: nothing begins by itself."""
    cluster = held()
    cluster.lose_child()
    everybody(cluster)
    assert cluster.status["reason"] == "GuardSuspended"
    assert cluster.child is None
    released(cluster)
    assert cluster.child is not None
    assert cluster.pods


def test_a_user_who_suspends_meanwhile_is_heard() -> None:
    cluster = running()
    tripped(cluster)
    cluster.edit(suspend=True)
    everybody(cluster)
    assert cluster.status["reason"] == "UserSuspended"


def test_a_guard_that_asked_before_its_pods_were_recorded_holds_nothing_later() -> None:
    cluster = Cluster()
    cluster.settle()
    cluster.training_operator()
    tripped(cluster)
    released(cluster)
    assert (cluster.status["state"], cluster.status["attempts"]) == ("Running", 2)


def test_its_child_is_deleted_before_its_word_is_read() -> None:
    """The restart was decided for the deletion; what the guard wanted shows while the old pods go."""
    cluster = running()
    cluster.lose_child()
    cluster.settle()
    cluster.end(cluster.uid("master"), 163, HELD)
    everybody(cluster)
    assert (cluster.status["state"], cluster.status["reason"]) == ("Suspended", "GuardSuspended")
    released(cluster)
    assert cluster.status["state"] == "Running"


def test_nobody_saw_the_end() -> None:
    """No operator ran: the pods were made anew, and their trainer's rules have all their steps again."""
    cluster = running()
    tripped(cluster)
    cluster.forget()
    everybody(cluster)
    assert trains_again(cluster)


def test_a_permanent_end_goes_first() -> None:
    cluster = running()
    cluster.end(cluster.uid("worker"), 40, said(Reason.NON_FINITE, 40))
    cluster.end(cluster.uid("master"), 163, HELD)
    everybody(cluster)
    assert (cluster.status["state"], cluster.status["reason"]) == ("Failed", "NonFinite")


def test_its_word_shows_after_a_restart_was_decided() -> None:
    """Its peer went first, which was to be a restart: it is none, and no pod of either attempt trains on."""
    cluster = running()
    cluster.vanish(cluster.uid("worker"))
    cluster.training_operator()
    cluster.pass_time(60)
    cluster.step()
    assert cluster.status["restarts"]["byCause"] == {"PeerLost": 1}
    cluster.end(cluster.uid("master"), 163, HELD)
    cluster.step()
    deleted = {pod.uid for pod in cluster.step().delete}
    assert deleted == set(cluster.pods)
    everybody(cluster)
    assert (cluster.status["state"], cluster.status["reason"]) == ("Suspended", "GuardSuspended")
    assert (cluster.status["restarts"]["total"], cluster.status["restarts"]["byCause"]) == (0, {})
    assert cluster.status["message"].startswith("master-0 (rank 0, step 6")


@pytest.mark.parametrize("refused", [0, 1])
def test_the_users_word_holds_where_a_write_is_refused(refused: int) -> None:
    cluster = held()
    cluster.edit(suspend=True)
    everybody(cluster)
    cluster.edit(suspend=False)
    for _ in range(2):
        cluster.step(prefix=refused)
    everybody(cluster)
    assert (cluster.status["state"], cluster.status["attempts"]) == ("Running", 2)


def test_the_users_word_holds_against_a_pause_that_was_asked_for_before() -> None:
    """The attempt had not been seen to train, so the restart began with a pause; what is held since is none."""
    cluster = ready_cluster()
    cluster.vanish(cluster.uid("worker"))
    cluster.training_operator()
    cluster.pass_time(cluster.timing.settle + 1)
    cluster.step()
    assert "notBefore" in cluster.status["restarts"]
    cluster.end(cluster.uid("master"), 163, HELD)
    everybody(cluster)
    assert (cluster.status["state"], cluster.status["reason"]) == ("Suspended", "GuardSuspended")
    released(cluster)
    assert cluster.status["state"] == "Initializing"
    assert cluster.pods


def test_its_word_shows_after_a_restart_for_another_cause() -> None:
    """A pod is drained while the guard's rule breaks: held all the same, and once."""
    cluster = running()
    cluster.terminate(cluster.uid("worker"), 30)
    cluster.end(cluster.uid("worker"), 143)
    cluster.step()
    assert cluster.status["restarts"]["byCause"] == {"Preempted": 1}
    cluster.end(cluster.uid("master"), 163, HELD)
    everybody(cluster)
    assert (cluster.status["state"], cluster.status["reason"]) == ("Suspended", "GuardSuspended")
    released(cluster)
    assert trains_again(cluster)


def test_the_users_word_holds_where_a_held_jobs_child_is_deleted_while_its_pods_go() -> None:
    cluster = running()
    tripped(cluster)
    cluster.step()
    cluster.step()
    cluster.edit(suspend=True)
    cluster.lose_child()
    cluster.settle()
    cluster.edit(suspend=False)
    everybody(cluster)
    assert trains_again(cluster)
