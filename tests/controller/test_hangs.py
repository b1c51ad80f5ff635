"""Hangs: no verdict without fresh reports, stacks first, then a gang restart under its own budget."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_cluster import Cluster
from reconcile_kit import everybody, ready_cluster

from posttrain_operator import clock
from posttrain_operator.reconcile.hangs import CANNOT, suspect

STALL = 1800
STOPPED = f"{CANNOT}it is stopped (state T)"
WAITS = "all_reduce (distributed_c10d.py:2825) < _reduce (runtime.py:102)"


def trains(cluster: Cluster, idle: float, **fields: Any) -> None:
    """A report of now that says that the loop got on `idle` seconds ago."""
    advanced = clock.render(cluster.now - timedelta(seconds=idle))
    cluster.report(**{"phase": "Training", "step": 7, "lastAdvanceTime": advanced, **fields})


def standing(idle: float = STALL, seconds: float = 5000, **spec: Any) -> Cluster:
    """A job of two pods that has run for `seconds` and now stands still."""
    cluster = ready_cluster()
    cluster.job["spec"].update(spec)
    trains(cluster, 0)
    cluster.settle()
    assert cluster.status["state"] == "Running"
    cluster.pass_time(seconds)
    trains(cluster, idle)
    return cluster


def asks(cluster: Cluster) -> bool:
    """Whether the pods are asked for their stacks."""
    return cluster.facts().stalled_since is not None


def stacks(*places: tuple[int, str]) -> list[dict[str, Any]]:
    return [{"rank": rank, "where": where} for rank, where in places]


def test_first_the_condition_and_the_wish_then_the_restart() -> None:
    cluster = standing()
    cluster.settle()
    assert cluster.status["state"] == "Running"
    health = cluster.condition("TrainingHealthy")
    assert (health["status"], health["reason"]) == ("False", "NoProgress")
    assert asks(cluster)
    events = [event for actions in cluster.history for event in actions.events]
    assert [(event.kind, event.reason) for event in events].count(("Warning", "NoProgress")) == 1
    cluster.pass_time(30)
    trains(cluster, STALL + 30)
    cluster.settle()
    assert cluster.status["attempts"] == 1  # the stacks are not in, and there is time
    cluster.pass_time(30)
    trains(cluster, STALL + 60)
    actions = cluster.step()
    assert (actions.status["state"], actions.status["reason"]) == ("Restarting", "Hang")
    assert not actions.delete  # decided first, deleted by the pass that reads it
    cluster.settle()
    assert cluster.status["restarts"]["byCause"] == {"Hang": 1}
    assert cluster.status["restarts"]["sinceCheckpoint"] == {"hang": 1}
    assert "no stacks came" in cluster.status["failure"]["message"]
    everybody(cluster)
    assert cluster.status["attempt"]["number"] == 2
    assert not asks(cluster)


def test_all_stacks_in_ends_the_waiting() -> None:
    cluster = standing()
    cluster.settle()
    trains(cluster, STALL + 5, stacks=stacks((0, WAITS), (1, STOPPED)))
    cluster.settle()
    failure = cluster.status["failure"]
    assert (failure["reason"], failure["rank"], failure["replica"], failure["step"]) == ("Hang", 1, "worker-0", 7)
    assert failure["node"] == "node-job-worker-0"
    assert failure["logTail"] == f"rank 1: {STOPPED}\nrank 0: {WAITS}"
    assert "stood still for 1805 s (runPolicy.stallSeconds 1800) in phase Training at step 7" in failure["message"]
    assert failure["message"].endswith("/stacks/")
    assert cluster.condition("Running")["reason"] == "Hang"


@pytest.mark.parametrize(
    "fields",
    [
        {"lastUpdateTime": "2026-01-01T00:00:00Z"},
        {"lastAdvanceTime": None},
        {"phase": "Preparing"},
        {"phase": "Loading"},
        {"phase": "Done"},
    ],
)
def test_no_fresh_word_of_the_loop_is_no_verdict(fields: dict[str, Any]) -> None:
    cluster = standing()
    trains(cluster, STALL + 100, **fields)
    cluster.settle()
    assert cluster.status["attempts"] == 1
    assert not asks(cluster)
    assert cluster.condition("TrainingHealthy")["reason"] != "NoProgress"


def test_without_reports_nothing_is_restarted_for_ever() -> None:
    """A status server that is away: the last words of a job are old, and grow older."""
    cluster = standing(idle=60)
    for _ in range(10):
        cluster.pass_time(3600)
        cluster.settle()
        assert (cluster.status["attempts"], asks(cluster)) == (1, False)


def test_a_long_silence_that_ends_with_an_advance_is_no_hang() -> None:
    """What counts is the span that the trainer tells, not how long nobody heard of it."""
    cluster = standing(idle=60)
    cluster.pass_time(3 * STALL)
    trains(cluster, 10)
    cluster.settle()
    assert not asks(cluster)


def test_getting_on_again_ends_it() -> None:
    cluster = standing()
    cluster.settle()
    cluster.pass_time(20)
    trains(cluster, 1)
    cluster.settle()
    assert not asks(cluster)
    assert cluster.condition("TrainingHealthy")["status"] == "True"
    cluster.pass_time(600)
    trains(cluster, 1)
    cluster.settle()
    assert cluster.status["attempts"] == 1


def test_suspended_or_restarting_is_no_hang() -> None:
    cluster = standing()
    cluster.edit(suspend=True)
    cluster.settle()
    assert not asks(cluster)
    everybody(cluster)
    assert cluster.status["state"] == "Suspended"
    assert "restarts" not in cluster.status


def test_the_words_of_the_last_attempt_mean_nothing_for_the_next() -> None:
    cluster = standing()
    cluster.settle()
    trains(cluster, STALL + 5, stacks=stacks((0, WAITS), (1, WAITS)))
    everybody(cluster)
    trains(cluster, STALL + 60)  # advanced, by its own word, before this attempt began
    cluster.settle()
    assert cluster.status["attempt"]["number"] == 2
    assert cluster.status["attempts"] == 2


def test_the_limit_may_be_changed_while_the_job_runs() -> None:
    cluster = standing(idle=100)
    cluster.settle()
    assert not asks(cluster)
    cluster.edit(runPolicy={"stallSeconds": 60})
    cluster.settle()
    assert asks(cluster)
    cluster.edit(runPolicy={"stallSeconds": 3600})
    cluster.settle()
    assert not asks(cluster)


def test_the_budget_of_hangs_ends_the_job() -> None:
    cluster = standing(runPolicy={"restarts": {"hang": 0}})
    cluster.settle()
    trains(cluster, STALL + 5, stacks=stacks((0, WAITS), (1, WAITS)))
    cluster.settle()
    assert (cluster.status["state"], cluster.status["reason"]) == ("Failed", "RestartBudgetExhausted")
    assert cluster.status["failure"]["reason"] == "Hang"
    assert "runPolicy.restarts.hang" in cluster.status["message"]


def test_an_operator_that_comes_late_still_collects_stacks_first() -> None:
    cluster = standing(idle=10 * STALL, seconds=20 * STALL)
    cluster.forget()
    cluster.settle()
    assert asks(cluster)
    assert cluster.status["attempts"] == 1


@pytest.mark.parametrize(
    ("places", "silent", "expected"),
    [
        ({WAITS: [0, 2, 3], "load (x.py:1)": [1]}, [], 1),
        ({WAITS: [0], "load (x.py:1)": [1]}, [], None),
        ({WAITS: [0, 1, 2, 3]}, [], None),
        ({WAITS: [0, 1, 2]}, [3], 3),
        ({WAITS: [0, 1]}, [2, 3], None),
        ({STOPPED: [2], WAITS: [0], "load (x.py:1)": [1]}, [], 2),
        ({}, [0, 1], None),
    ],
)
def test_who_is_waited_for(places: dict[str, list[int]], silent: list[int], expected: int | None) -> None:
    assert suspect(places, silent) == expected


@given(
    idle=st.floats(0, 4 * STALL),
    age=st.floats(0, 4 * STALL),
    phase=st.sampled_from(["Preparing", "Waiting", "Loading", "Training", "Evaluating", "Saving", "Exporting", "Done"]),
    stall=st.integers(10, 2 * STALL),
)
def test_stacks_are_asked_for_only_on_a_fresh_word_of_a_long_stand(
    idle: float, age: float, phase: str, stall: int
) -> None:
    """Whatever is reported, and however late it is looked at."""
    cluster = standing(idle=0, seconds=5 * STALL, runPolicy={"stallSeconds": stall})
    trains(cluster, idle, phase=phase)
    cluster.pass_time(age)
    cluster.settle()
    told = round(idle)  # times are whole seconds
    fresh = age <= cluster.timing.fresh
    loop = phase in ("Training", "Evaluating", "Saving", "Exporting")
    if asks(cluster):
        assert loop
        assert age <= cluster.timing.fresh + 1
        assert told + 1 >= stall
    elif loop and fresh and told - 1 >= stall:
        raise AssertionError(cluster.status)
    assert cluster.status["attempts"] == 1
