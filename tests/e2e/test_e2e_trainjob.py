"""Jobs as TrainJobs, under the real Trainer and JobSet: the same ends, the same status, the same weights.

A cluster of its own, because only here these two run. One job on two pods is killed, suspended and resumed; the same
job as a PyTorchJob, which nothing happens to, is what it is held against.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import e2e_models
import fault_kit
import pytest
from e2e_cluster import images, install
from e2e_kit import PAIRS, Bench, condition, restarts, step

from devcluster.testing import Cluster, full_cluster

pytestmark = [pytest.mark.e2e, pytest.mark.faults, pytest.mark.xdist_group("e2e-trainjob")]
PATIENCE = 600


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Both backends are there; TrainJob is what Auto means."""
    with full_cluster(images=images(), extras=("trainjob",)) as running:
        install(running, "backend=TrainJob")
        yield running


@dataclass(frozen=True)
class Lives:
    """All jobs of this file; `killed`, `suspended`, `resumed`: the hit one's status before its kill and later."""

    bench: Bench
    killed: Mapping[str, Any]
    suspended: Mapping[str, Any]
    resumed: Mapping[str, Any]


@pytest.fixture(scope="module")
def lives(bench: Bench) -> Lives:
    """Starts all, and hits the one twice."""
    fault_kit.install(bench)
    e2e_models.save(bench.volume() / "models" / "good", e2e_models.tokenizer([row["prompt"] for row in PAIRS]))
    nowhere = {"train": [{"uri": "pvc://runs/data/none.jsonl"}]}
    bench.apply(
        fault_kit.two_pods("hit", "SFT", runPolicy={"ttlSecondsAfterFinished": 3600}),
        fault_kit.two_pods("wrong", "SFT", data=nowhere),
        fault_kit.two_pods("v1", "SFT", backend="PyTorchJob"),
    )
    hit = fault_kit.in_the_middle(bench, "hit", "SFT")
    hit.signal_rank(1, signal.SIGKILL)
    bench.until("hit", lambda status: attempt(status) == 2 and condition(status, "Running").get("status") == "True")
    saved = fault_kit.last_saved(bench.status("hit"))
    bench.until("hit", lambda status: step(status) > saved and attempt(status) == 2, PATIENCE)
    suspend(bench, "hit", True)
    stopped = bench.until("hit", lambda status: status.get("state") == "Suspended" and not bench.pods("hit"))
    suspend(bench, "hit", False)
    resumed = bench.until("hit", lambda status: attempt(status) == 3)
    return Lives(bench, hit.before, stopped, resumed)


def attempt(status: Mapping[str, Any]) -> int:
    return int((status.get("attempt") or {}).get("number") or 0)


def suspend(bench: Bench, name: str, yes: bool) -> None:
    bench.kubectl("patch", "ptj", name, "--type=merge", "-p", json.dumps({"spec": {"suspend": yes}}))


def shape(value: Any, path: str = "") -> set[str]:
    """Every path of fields that a status has."""
    if isinstance(value, Mapping):
        return set().union({path}, *(shape(item, f"{path}.{name}") for name, item in value.items()))
    if isinstance(value, list):
        return set().union({path}, *(shape(item, f"{path}[]") for item in value))
    return {path}


def test_the_status_names_the_child(lives: Lives) -> None:
    child = lives.bench.get("trainjob", "hit")
    assert lives.killed["backend"] == {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "name": "hit",
        "uid": child["metadata"]["uid"],
    }
    assert lives.bench.status("v1")["backend"]["kind"] == "PyTorchJob"


def test_a_killed_rank_restarts_all_pods(lives: Lives) -> None:
    """By JobSet, once, and within our budget."""
    status = lives.bench.succeeded("hit", PATIENCE)
    assert restarts(status) == 1, lives.bench.story("hit")
    assert status["restarts"]["byCause"] == {"ProcessKilled": 1}
    assert set(lives.suspended["attempt"]["podUIDs"]).isdisjoint(lives.killed["attempt"]["podUIDs"])


def test_suspend_saves_and_resume_goes_on(lives: Lives) -> None:
    assert condition(lives.suspended, "Suspended")["reason"] == "UserSuspended"
    assert lives.resumed["attempt"]["number"] == 3
    assert set(lives.resumed["attempt"]["podUIDs"]).isdisjoint(lives.suspended["attempt"]["podUIDs"])
    lives.bench.succeeded("hit", PATIENCE)


def test_the_weights_are_those_of_an_undisturbed_pytorchjob(lives: Lives) -> None:
    lives.bench.succeeded("hit", PATIENCE)
    lives.bench.succeeded("v1", PATIENCE)
    assert fault_kit.weights(lives.bench, "hit") == fault_kit.weights(lives.bench, "v1")


def test_the_status_has_the_shape_of_a_pytorchjob_s(lives: Lives) -> None:
    hit, plain = (shape(lives.bench.succeeded(name, PATIENCE)) for name in ("hit", "v1"))
    assert plain - hit == set()
    assert {path.split(".")[1] for path in hit - plain} <= {"restarts", "failure", "usage"}


def test_a_permanent_end_is_not_restarted_by_jobset(lives: Lives) -> None:
    status = lives.bench.finished("wrong", PATIENCE)
    assert (status["state"], status["reason"]) == ("Failed", "DatasetNotFound"), lives.bench.story("wrong")
    assert attempt(status) == 1
    sets = lives.bench.get("jobset", "wrong")["status"]
    assert sets.get("restarts", 0) == 0
    assert sets.get("terminalState") == "Failed"


def test_nothing_is_left_behind(lives: Lives) -> None:
    """The child's runtime, JobSet, Jobs and pods go with the job."""
    lives.bench.finished("wrong", PATIENCE)
    lives.bench.kubectl("delete", "ptj", "wrong", "--timeout=60s")
    deadline = time.monotonic() + 60
    while (left := remains(lives.bench, "wrong")) and time.monotonic() < deadline:
        time.sleep(1)
    assert not left


def remains(bench: Bench, name: str) -> list[str]:
    """Everything whose name begins with the job's."""
    kinds = ("trainjob", "trainingruntime", "jobset", "job", "pod", "configmap", "service")
    found = [(kind, str(item["metadata"]["name"])) for kind in kinds for item in bench.items(kind)]
    return [f"{kind}/{each}" for kind, each in found if each.startswith(name)]
