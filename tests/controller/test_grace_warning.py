"""GracePeriodTooShort: measured saves against the grace period, told once."""

from __future__ import annotations

from model_cluster import Cluster, running_cluster

from posttrain_operator import clock


def save(cluster: Cluster, step: int, seconds: float | None) -> list[str]:
    """A save is reported; the reasons of the events that follow."""
    took = {} if seconds is None else {"saveSeconds": seconds}
    known = {"step": step, "time": clock.render(cluster.now), "digest": str(step), **took}
    cluster.report(phase="Training", checkpoint=known)
    return [event.reason for event in cluster.step().events]


def test_it_is_told_once_when_two_saves_do_not_fit() -> None:
    cluster = running_cluster(runPolicy={"terminationGracePeriodSeconds": 100})
    assert save(cluster, 1, None) == []
    assert save(cluster, 2, 50.0) == []
    assert save(cluster, 3, 50.1) == ["GracePeriodTooShort"]
    assert save(cluster, 4, 70.0) == []
    assert save(cluster, 5, 10.0) == []
    assert save(cluster, 6, 51.0) == ["GracePeriodTooShort"]
    assert cluster.status["state"] == "Running"


def test_with_staging_the_last_one_is_read_back_too() -> None:
    cluster = running_cluster(runPolicy={"terminationGracePeriodSeconds": 150}, checkpoint={"staging": "Disk"})
    assert save(cluster, 1, 50.0) == []
    assert save(cluster, 2, 50.1) == ["GracePeriodTooShort"]


def test_it_says_both_times_and_the_field() -> None:
    cluster = running_cluster(runPolicy={"terminationGracePeriodSeconds": 60})
    known = {"step": 1, "time": clock.render(cluster.now), "digest": "1", "saveSeconds": 42.4}
    cluster.report(phase="Training", checkpoint=known)
    (event,) = cluster.step().events
    assert event.kind == "Warning"
    assert "took 42 s; a pod that is told to end needs up to twice that" in event.message
    assert "has 60 s (runPolicy.terminationGracePeriodSeconds)" in event.message
    assert cluster.status["checkpoints"]["last"]["saveSeconds"] == 42.4
