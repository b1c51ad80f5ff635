"""Half-placed jobs: they give their places back, wait, and come again; a deadline ends that too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from model_cluster import START, Cluster, running_cluster
from reconcile_kit import everybody, said

from posttrain_api.reasons import Reason
from posttrain_operator import clock
from posttrain_operator.facts import Note
from posttrain_operator.reconcile import pauses


def half_placed(**spec: Any) -> Cluster:
    """Two pods and room for one."""
    cluster = Cluster(**spec)
    cluster.bundle = "PEM"
    cluster.room = 1
    cluster.settle()
    cluster.training_operator()
    cluster.run_all()
    cluster.settle()
    return cluster


def suspended(cluster: Cluster) -> bool:
    assert cluster.child is not None
    return bool(cluster.child["spec"]["runPolicy"]["suspend"])


def give_back(cluster: Cluster) -> None:
    """The pods have waited for long enough; everybody does their part."""
    cluster.pass_time(cluster.timing.half_placed)
    cluster.settle()
    cluster.training_operator()
    cluster.kubelet()
    cluster.settle()


def pause_of(cluster: Cluster) -> float:
    end = clock.parse(cluster.status["restarts"]["notBefore"])
    assert end is not None
    return (end - cluster.now).total_seconds()


def test_places_are_given_back_after_a_while() -> None:
    cluster = half_placed()
    cluster.pass_time(cluster.timing.half_placed - 1)
    cluster.settle()
    assert cluster.status["reason"] == "Unschedulable"
    assert not suspended(cluster)
    cluster.pass_time(1)
    decision = cluster.step()
    assert not decision.patch, "the decision is written first"
    assert [(event.kind, event.reason) for event in decision.events] == [("Warning", "Unschedulable")]
    assert "1 of 2 pods find no node (job-worker-0: 0/2 nodes)" in decision.events[0].message
    cluster.settle()
    assert suspended(cluster)
    cluster.kubelet()
    cluster.settle()
    assert not cluster.pods
    status = cluster.status
    assert (status["state"], status["reason"]) == ("Pending", "Unschedulable")
    assert cluster.condition("Stalled")["status"] == "True"
    assert f"begins after {status['restarts']['notBefore']}" in status["message"]
    assert status["restarts"]["total"] == 0
    assert status["restarts"]["byCause"] == {"Unschedulable": 1}
    assert "failure" not in status


def test_it_comes_again_and_trains_once_there_is_room() -> None:
    cluster = half_placed()
    give_back(cluster)
    cluster.room = 2
    cluster.pass_time(pause_of(cluster))
    everybody(cluster)
    cluster.report(phase="Training")
    cluster.settle()
    assert (cluster.status["state"], cluster.status["attempts"]) == ("Running", 2)
    cluster.pass_time(cluster.timing.silence)
    cluster.end(cluster.uid("worker"), 162, said(Reason.PROCESS_KILLED, 162))
    everybody(cluster)
    assert "pauseSeconds" not in cluster.status["restarts"], "the next pause is a short one again"


def test_pauses_grow_and_differ_from_job_to_job() -> None:
    cluster = half_placed()
    nominal, drawn = [], []
    for _ in range(7):
        give_back(cluster)
        nominal.append(cluster.status["restarts"]["pauseSeconds"])
        drawn.append(pause_of(cluster) / nominal[-1])
        cluster.pass_time(pause_of(cluster))
        cluster.settle()
        cluster.training_operator()
        cluster.run_all()
        cluster.settle()
    assert nominal == [30, 60, 120, 240, 480, 600, 600]
    assert all(0.5 <= part <= 1.6 for part in drawn)
    assert max(drawn) - min(drawn) > 0.2
    others = {
        pauses.before_placement(replace(cluster.facts(), uid=f"u{n}"), cluster.timing, 9, cluster.now)["notBefore"]
        for n in range(20)
    }
    assert len(others) > 10


def test_a_startup_deadline_ends_it() -> None:
    cluster = half_placed(runPolicy={"startupDeadlineSeconds": 400})
    give_back(cluster)
    assert cluster.status["reason"] == "Unschedulable"
    cluster.pass_time(100)
    cluster.settle()
    assert cluster.status["reason"] == "StartupTimeout"


def test_an_operator_that_dies_in_between_goes_on_where_it_was() -> None:
    cluster = half_placed()
    cluster.pass_time(cluster.timing.half_placed)
    for prefix in (0, 1, None):
        cluster.step(prefix)
        cluster.forget()
    cluster.settle()
    before = cluster.status["restarts"]
    cluster.forget()
    cluster.settle()
    assert cluster.status["restarts"] == before
    assert before["byCause"] == {"Unschedulable": 1}


def lost_in_waiting(cluster: Cluster, seconds: float) -> None:
    """So long nobody but the workers does anything: they look for the master's name, give up after 200 s and are made
    again."""
    for _ in range(int(seconds / 100)):
        cluster.pass_time(100)
        if int((cluster.now - START).total_seconds()) % 200 == 0:
            for uid in list(filter(cluster.waits_for_the_first, cluster.pods)):
                cluster.give_up(uid)
        cluster.settle()
        cluster.training_operator()
        cluster.settle()


def late_master(room: int) -> Cluster:
    """Two pods; the worker has a node and waits for the master, which has none, or pulls its image."""
    cluster = Cluster()
    cluster.bundle = "PEM"
    cluster.room = 0
    cluster.settle()
    cluster.training_operator()
    cluster.room = room
    for role in ("worker", "master"):
        cluster.place(cluster.pods[cluster.uid(role)])
    cluster.settle()
    return cluster


def test_a_worker_that_waits_for_a_master_without_a_node_is_no_loss() -> None:
    """It gives up before the places are given back; what follows is as if it had not."""
    cluster = late_master(room=1)
    lost_in_waiting(cluster, 200)
    assert "restarts" not in cluster.status
    assert (cluster.status["reason"], suspended(cluster)) == ("Unschedulable", False)
    assert cluster.status["attempt"]["podUIDs"] == sorted(cluster.pods)
    lost_in_waiting(cluster, 200)
    assert suspended(cluster)
    assert cluster.status["restarts"]["byCause"] == {"Unschedulable": 1}
    assert cluster.status["restarts"]["total"] == 0
    cluster.room = 2
    cluster.kubelet()
    cluster.settle()
    cluster.pass_time(pause_of(cluster))
    everybody(cluster)
    cluster.report(phase="Training")
    cluster.settle()
    assert (cluster.status["state"], cluster.status["attempts"]) == ("Running", 2)


def test_a_master_may_pull_its_image_for_an_hour() -> None:
    cluster = late_master(room=2)
    master = cluster.uid("master")
    lost_in_waiting(cluster, 3600)
    assert "restarts" not in cluster.status
    assert master in cluster.pods
    cluster.run_all()
    cluster.report(phase="Training")
    cluster.settle()
    assert (cluster.status["state"], cluster.status["attempts"]) == ("Running", 1)
    assert cluster.status["attempt"]["podUIDs"] == sorted(cluster.pods)


def test_a_worker_that_finds_a_master_that_has_long_been_there_not_is_a_failure() -> None:
    """Names do not work on its node: nobody would ever see it if that were forgiven."""
    cluster = late_master(room=2)
    cluster.run(cluster.uid("master"))
    cluster.pass_time(cluster.timing.named - 1)
    for seconds, restarts in ((0, {}), (1, {"PeerLost": 1})):
        cluster.pass_time(seconds)
        cluster.give_up(cluster.uid("worker"))
        cluster.settle()
        cluster.training_operator()
        cluster.pass_time(cluster.timing.settle)
        cluster.settle()
        assert cluster.status.get("restarts", {}).get("byCause", {}) == restarts
    assert "init-pytorch" in cluster.status["failure"]["message"]


GPUS = 'pods "job-x-0" is forbidden: exceeded quota: gpus'


def refuse(cluster: Cluster, role: str, message: str = GPUS) -> None:
    """The pod of this role is gone and is not made again; the operator has not seen it go."""
    cluster.vanish(cluster.uid(role))
    cluster.forget()
    note(cluster, message)


def note(cluster: Cluster, message: str = GPUS) -> None:
    assert cluster.child is not None
    cluster.notes = (Note(cluster.child["metadata"]["uid"], "FailedCreatePod", message, clock.render(cluster.now)),)


def test_a_job_whose_other_pods_are_over_the_quota_gives_its_place_back() -> None:
    cluster = late_master(room=2)
    refuse(cluster, "worker")
    cluster.settle()
    assert cluster.status["reason"] == "QuotaExceeded"
    cluster.pass_time(cluster.timing.half_placed - 1)
    cluster.settle()
    assert not suspended(cluster)
    cluster.pass_time(1)
    decision = cluster.step()
    assert f"1 of 2 pods cannot be made ({GPUS})" in decision.events[0].message
    cluster.settle()
    assert suspended(cluster)
    assert cluster.status["restarts"]["byCause"] == {"Unschedulable": 1}


def test_a_worker_that_waits_for_a_master_over_the_quota_gives_its_place_back() -> None:
    """It is made again and again meanwhile, and so is the refusal."""
    cluster = late_master(room=2)
    refuse(cluster, "master")
    for _ in range(2):
        cluster.pass_time(200)
        worker = cluster.uid("worker")
        cluster.give_up(worker)
        cluster.settle()
        cluster.training_operator()
        cluster.vanish(cluster.uid("master"))
        cluster.gone.pop(next(uid for uid in cluster.gone if "master" in uid))
        note(cluster)
        cluster.settle()
    assert suspended(cluster)
    assert cluster.status["restarts"]["byCause"] == {"Unschedulable": 1}


def test_a_pod_that_a_policy_refuses_keeps_nobody_waiting() -> None:
    """That does not change by itself: nobody is helped by asking again and again."""
    cluster = late_master(room=2)
    refuse(cluster, "worker", 'pods "job-worker-0" is forbidden: violates PodSecurity "restricted:latest"')
    cluster.pass_time(2 * cluster.timing.half_placed)
    cluster.settle()
    assert (cluster.status["reason"], suspended(cluster)) == ("PodSecurityDenied", False)


def test_what_a_quota_once_refused_is_forgotten_when_the_pod_was_made() -> None:
    """The worker is only between two lives, and the master goes on pulling."""
    cluster = late_master(room=2)
    note(cluster)
    cluster.pass_time(2 * cluster.timing.half_placed)
    cluster.give_up(cluster.uid("worker"))
    cluster.settle()
    assert (cluster.status["reason"], suspended(cluster)) == ("PodsMissing", False)


def test_a_job_that_has_trained_gives_nothing_back_for_free() -> None:
    """Its worker is lost and not made again: that is told by the one that is left."""
    cluster = running_cluster()
    cluster.bundle = "PEM"
    cluster.pass_time(10 * cluster.timing.half_placed)
    refuse(cluster, "worker")
    for _ in range(3):
        cluster.settle()
        cluster.pass_time(20)
    assert (cluster.status["reason"], suspended(cluster)) == ("QuotaExceeded", False)


@pytest.mark.parametrize("room", [0, 2])
def test_a_job_with_no_place_or_all_of_them_holds_nobody_up(room: int) -> None:
    cluster = half_placed()
    cluster.room = room
    for pod in cluster.pods.values():
        pod["spec"].pop("nodeName", None)
    cluster.scheduler()
    cluster.pass_time(10 * cluster.timing.half_placed)
    cluster.settle()
    assert not suspended(cluster)


def test_a_user_may_suspend_and_resume_meanwhile() -> None:
    cluster = half_placed()
    give_back(cluster)
    cluster.edit(suspend=True)
    cluster.settle()
    assert cluster.status["state"] == "Suspended"
    cluster.edit(suspend=False)
    cluster.settle()
    assert cluster.status["reason"] == "Unschedulable"
    cluster.room = 2
    cluster.pass_time(pause_of(cluster))
    everybody(cluster)
    cluster.report(phase="Training")
    cluster.settle()
    assert cluster.status["state"] == "Running"


def test_a_running_job_whose_next_attempt_finds_half_its_places() -> None:
    cluster = running_cluster()
    cluster.end(cluster.uid("worker"), 162, said(Reason.PROCESS_KILLED, 162))
    cluster.room = 1
    everybody(cluster)
    cluster.pass_time(cluster.timing.mount)
    cluster.settle()
    assert cluster.status["reason"] == "Unschedulable"
    give_back(cluster)
    assert cluster.status["restarts"]["byCause"] == {"ProcessKilled": 1, "Unschedulable": 1}
    assert cluster.status["restarts"]["sinceCheckpoint"] == {"processKilled": 1}
    cluster.room = 2
    cluster.pass_time(pause_of(cluster))
    everybody(cluster)
    assert (cluster.status["state"], cluster.status["attempts"]) == ("Running", 3)
