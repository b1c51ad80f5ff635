"""status.usage over whole lives: held and lost GPU time against a plain count of the same life."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_cluster import Cluster
from reconcile_kit import SUCCESS, everybody, said

from posttrain_api.reasons import Reason
from posttrain_operator import clock

GPUS = 8


@dataclass(frozen=True)
class Stretch:
    """One attempt: how long it holds its pods, when in it a checkpoint is committed (None: never), how it ends."""

    seconds: int
    saved_at: int | None
    ends: str


STRETCHES = st.builds(
    lambda seconds, share, ends: Stretch(seconds, None if share is None else int(share * seconds), ends),
    st.integers(61, 500),
    st.none() | st.floats(0, 1),
    st.sampled_from(["killed", "preempted", "preempted, told late", "suspended", "never trained", "replaced"]),
)


def begin(cluster: Cluster) -> None:
    everybody(cluster)
    cluster.report(phase="Training")
    cluster.settle()
    assert cluster.status["state"] == "Running", cluster.status


def live(cluster: Cluster, stretch: Stretch, step: int) -> int:
    """Plays one attempt; returns the seconds of work that it loses."""
    saved = stretch.saved_at
    if stretch.ends == "never trained":
        cluster.pass_time(stretch.seconds)
        cluster.settle()
        cluster.end(cluster.uid("master"), 128, "exec: not found", "StartError")
        return stretch.seconds
    begin(cluster)
    if saved is not None:
        cluster.pass_time(saved)
        cluster.commit(step)
        cluster.settle()
    cluster.pass_time(stretch.seconds - (saved or 0))
    lost = stretch.seconds - (saved or 0)
    if stretch.ends == "suspended":
        cluster.edit(suspend=True)
        everybody(cluster)
        return 0
    if stretch.ends == "preempted":
        cluster.commit(step + 1)
        cluster.terminate(cluster.uid("worker"), 600)
        cluster.end(cluster.uid("master"), 143, said(Reason.PREEMPTED, 143))
        return 0
    if stretch.ends == "preempted, told late":
        cluster.terminate(cluster.uid("worker"), 600)
        cluster.end(cluster.uid("worker"), 143, said(Reason.PREEMPTED, 143))
        committed = cluster.now
        cluster.settle()
        cluster.pass_time(1)
        cluster.commit(step + 1, committed)
        return 0
    if stretch.ends == "replaced":
        for role in ("master", "worker"):
            cluster.vanish(cluster.uid(role))
        cluster.forget()
        cluster.training_operator()
        return lost
    cluster.end(cluster.uid("worker"), 162, said(Reason.PROCESS_KILLED, 162))
    return lost


def rest(cluster: Cluster, stretch: Stretch, idle: int) -> None:
    """From the end of an attempt to the pods of the next; nothing is held meanwhile."""
    cluster.settle()
    if stretch.ends == "replaced":
        return
    cluster.training_operator()
    cluster.kubelet()
    cluster.settle()
    if stretch.ends == "suspended":
        cluster.pass_time(idle)
        cluster.edit(suspend=False)
        cluster.settle()
    pause = clock.parse((cluster.status.get("restarts") or {}).get("notBefore"))
    if pause and pause > cluster.now:
        cluster.now = pause
    cluster.settle()
    cluster.training_operator()
    cluster.settle()


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(stretches=st.lists(STRETCHES, max_size=6), last=st.integers(1, 300), idle=st.integers(1, 5000))
def test_usage_is_the_sum_of_all_attempts(stretches: list[Stretch], last: int, idle: int) -> None:
    budgets = {"total": 100, "processKilled": 100}
    cluster = Cluster(resources={"nodes": 2, "gpusPerNode": GPUS // 2}, runPolicy={"restarts": budgets})
    cluster.bundle = "PEM"
    cluster.settle()
    cluster.training_operator()
    cluster.settle()
    lost = 0
    for number, stretch in enumerate(stretches):
        lost += live(cluster, stretch, 10 * (number + 1))
        rest(cluster, stretch, idle)
    begin(cluster)
    cluster.pass_time(last)
    cluster.end(cluster.uid("master"), 0, SUCCESS)
    cluster.settle()
    held = sum(stretch.seconds for stretch in stretches) + last
    assert cluster.status["usage"] == {
        "activeSeconds": held,
        "gpuSeconds": held * GPUS,
        "gpuSecondsLost": lost * GPUS,
    }


def test_what_a_failed_job_did_since_its_checkpoint_is_lost() -> None:
    cluster = Cluster(resources={"nodes": 2, "gpusPerNode": GPUS // 2})
    cluster.bundle = "PEM"
    begin(cluster)
    cluster.pass_time(100)
    cluster.commit(10)
    cluster.pass_time(40)
    cluster.end(cluster.uid("worker"), 51, said(Reason.STORAGE_FULL, 51))
    cluster.settle()
    assert cluster.status["usage"] == {"activeSeconds": 140, "gpuSeconds": 140 * GPUS, "gpuSecondsLost": 40 * GPUS}


def test_a_set_that_was_replaced_long_ago_is_charged_with_its_own_time_only() -> None:
    """While no operator ran: 30 s of the old pods, then an hour of the new ones."""
    cluster = Cluster(resources={"nodes": 2, "gpusPerNode": GPUS // 2})
    cluster.bundle = "PEM"
    begin(cluster)
    cluster.pass_time(30)
    for role in ("master", "worker"):
        cluster.vanish(cluster.uid(role))
    cluster.forget()
    cluster.training_operator()
    cluster.run_all()
    cluster.pass_time(3600)
    cluster.settle()
    assert cluster.status["attempt"]["startTime"] == "2026-01-01T00:00:30Z"
    cluster.end(cluster.uid("master"), 0, SUCCESS)
    cluster.settle()
    assert cluster.status["usage"] == {"activeSeconds": 3630, "gpuSeconds": 3630 * GPUS, "gpuSecondsLost": 30 * GPUS}
