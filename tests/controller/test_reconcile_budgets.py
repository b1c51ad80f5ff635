"""The budgets of restarts: which cause takes from which, what makes them whole again, and what the end says."""

from __future__ import annotations

import re
from typing import Any

import pytest
from model_cluster import Cluster, running_cluster
from reconcile_kit import everybody, said

from posttrain_api.reasons import Reason
from posttrain_api.spec.run import RESTARTS, RestartPolicy

KILL = (137, "", "Error")
ENDS: dict[str, tuple[int, str, str]] = {
    "outOfMemory": (137, "", "OOMKilled"),
    "hang": (161, said(Reason.HANG, 161), "Error"),
    "processKilled": (162, said(Reason.PROCESS_KILLED, 162), "Error"),
    "trainerError": (190, said(Reason.TRAINER_ERROR, 190, step=1), "Error"),
}


def strike(cluster: Cluster, how: tuple[int, str, str]) -> None:
    """One pod ends so; everybody does their part, and the next attempt runs for a while."""
    cluster.end(cluster.uid("worker"), *how)
    everybody(cluster)
    cluster.pass_time(cluster.timing.silence)


def commit(cluster: Cluster, step: int) -> None:
    cluster.commit(step)
    cluster.settle()


def ended(cluster: Cluster) -> tuple[Any, Any, Any]:
    status = cluster.status
    return status["state"], status["reason"], status.get("failure", {}).get("reason")


@pytest.mark.parametrize(
    ("budget", "cause"),
    [("outOfMemory", "OutOfMemory"), ("hang", "Hang"), ("processKilled", "ProcessKilled")],
)
def test_each_cause_has_its_own_budget(budget: str, cause: str) -> None:
    cluster = running_cluster()
    for _ in range(RESTARTS[budget]):
        strike(cluster, ENDS[budget])
        assert cluster.status["state"] == "Running"
    strike(cluster, ENDS[budget])
    assert ended(cluster) == ("Failed", "RestartBudgetExhausted", cause)
    assert f"runPolicy.restarts.{budget} allows" in cluster.status["message"]
    assert "without a later checkpoint" in cluster.status["message"]
    assert cluster.status["restarts"]["total"] == RESTARTS[budget]


def test_another_error_of_the_trainer_is_one_too_many() -> None:
    cluster = running_cluster()
    strike(cluster, ENDS["trainerError"])
    strike(cluster, (190, said(Reason.TRAINER_ERROR, 190, step=2), "Error"))
    assert ended(cluster) == ("Failed", "RestartBudgetExhausted", "TrainerError")


def test_budgets_do_not_mix() -> None:
    cluster = running_cluster()
    for budget in ("outOfMemory", "hang", "processKilled", "trainerError", "hang", "hang"):
        strike(cluster, ENDS[budget])
        assert cluster.status["state"] == "Running", budget
    assert cluster.status["restarts"]["sinceCheckpoint"] == {
        "outOfMemory": 1,
        "hang": 3,
        "processKilled": 1,
        "trainerError": 1,
    }


def test_a_later_checkpoint_makes_them_whole_and_total_never() -> None:
    cluster = running_cluster()
    for number in range(RESTARTS["total"]):
        commit(cluster, 10 * (number + 1))
        strike(cluster, ENDS["outOfMemory"])
        assert cluster.status["restarts"]["sinceCheckpoint"] == {"outOfMemory": 1}
    commit(cluster, 1000)
    strike(cluster, ENDS["outOfMemory"])
    assert ended(cluster) == ("Failed", "RestartBudgetExhausted", "OutOfMemory")
    assert "runPolicy.restarts.total allows 10 restarts;" in cluster.status["message"]
    assert cluster.status["restarts"]["total"] == RESTARTS["total"]


@pytest.mark.parametrize("again", [20, 10])
def test_the_same_checkpoint_told_again_is_no_later_one(again: int) -> None:
    """A resumed trainer repeats its report; an older one was fallen back to."""
    cluster = running_cluster()
    commit(cluster, 20)
    strike(cluster, ENDS["outOfMemory"])
    commit(cluster, again)
    strike(cluster, ENDS["outOfMemory"])
    assert cluster.status["reason"] == "RestartBudgetExhausted"


def test_a_checkpoint_that_was_reported_a_moment_ago_counts() -> None:
    """The report and the end are seen in one pass."""
    cluster = running_cluster()
    strike(cluster, ENDS["outOfMemory"])
    cluster.commit(5)
    strike(cluster, ENDS["outOfMemory"])
    assert cluster.status["state"] == "Running"


@pytest.mark.parametrize(
    ("policy", "strikes"), [({"total": 0}, 0), ({"processKilled": 0}, 0), ({"total": 2}, 2), ({"processKilled": 5}, 5)]
)
def test_the_spec_says_how_many(policy: dict[str, int], strikes: int) -> None:
    cluster = running_cluster(runPolicy={"restarts": policy})
    for _ in range(strikes):
        strike(cluster, KILL)
        assert cluster.status["state"] == "Running"
    strike(cluster, KILL)
    assert ended(cluster) == ("Failed", "RestartBudgetExhausted", "ProcessKilled")


def test_an_edit_while_it_runs_counts_at_once() -> None:
    cluster = running_cluster()
    for _ in range(RESTARTS["processKilled"]):
        strike(cluster, KILL)
    cluster.edit(runPolicy={"restarts": {"processKilled": 4}})
    strike(cluster, KILL)
    assert cluster.status["state"] == "Running"
    cluster.edit(runPolicy={"restarts": {"processKilled": 1}})
    strike(cluster, KILL)
    assert "runPolicy.restarts.processKilled allows one restart without" in cluster.status["message"]


def test_what_costs_nothing_is_free_without_a_budget_too() -> None:
    cluster = running_cluster(runPolicy={"restarts": dict.fromkeys(RESTARTS, 0)})
    for _ in range(3):
        cluster.terminate(cluster.uid("worker"), 600)
        cluster.end(cluster.uid("worker"), 143)
        everybody(cluster)
    assert cluster.status["state"] == "Running"
    assert cluster.status["restarts"] == {"total": 0, "byCause": {"Preempted": 3}}


def test_the_reference_says_the_same_numbers() -> None:
    told = {
        field.alias: re.search(r"Default: (\d+)", field.description or "")
        for field in RestartPolicy.model_fields.values()
    }
    assert {name: int(found[1]) for name, found in told.items() if found} == RESTARTS
