"""Waiting, deadlines, cleaning up: what a job does when something is missing, and what is left of it afterwards."""

from __future__ import annotations

import time

import pytest
from e2e_kit import TINY_SFT, Bench, condition, job, stalled, step, waiting

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e")]

LONG = {"maxSteps": 100000, "batchSize": 32}


@pytest.fixture(scope="module")
def submitted(bench: Bench) -> Bench:
    """Everything that waits for something, and everything that ends by the clock."""
    bench.claim("small", size_limit="768Ki")  # one checkpoint and no second: for that the first must not go
    bench.apply(
        job("no-claim", storage={"claimName": "later"}),
        job("no-data-claim", data={"train": [{"uri": "pvc://nowhere/text.jsonl"}]}),
        job("too-many-gpus", resources={"gpusPerNode": 9}),
        job("impatient", resources={"gpusPerNode": 9}, runPolicy={"startupDeadlineSeconds": 5}),
        job("deadline", training=LONG, runPolicy={"activeDeadlineSeconds": 25}),
        job("short-lived", runPolicy={"ttlSecondsAfterFinished": 1}),
        job("deleted", training=LONG),
        job("full", storage={"claimName": "small"}, checkpoint={"everySteps": 1}, training={"maxSteps": 50}),
        after("orphan", "missing"),
        after("left", "right"),
        after("right", "left"),
        after("child", "full"),
    )
    return bench


def after(name: str, parent: str) -> dict[str, object]:
    return job(name, TINY_SFT, model={"uri": None, "fromJob": {"name": parent}})


def test_a_missing_claim_is_waited_for(submitted: Bench) -> None:
    status = submitted.until("no-claim", stalled("StorageNotFound"), 30)
    assert "later" in status["message"]
    assert submitted.pods("no-claim") == []
    submitted.claim("later")
    submitted.succeeded("no-claim")


def test_a_missing_data_claim_is_named(submitted: Bench) -> None:
    assert "nowhere" in submitted.until("no-data-claim", stalled("StorageNotFound"), 30)["message"]


def test_more_gpus_than_any_node_has(submitted: Bench) -> None:
    status = submitted.until("too-many-gpus", stalled("Unschedulable"), 60)
    assert "nvidia.com/gpu" in status["message"]


def test_the_startup_deadline_ends_the_waiting(submitted: Bench) -> None:
    status = submitted.finished("impatient")
    assert (status["state"], status["reason"]) == ("Failed", "StartupTimeout")


def test_the_deadline_ends_the_job(submitted: Bench) -> None:
    status = submitted.finished("deadline")
    assert (status["state"], status["reason"]) == ("Failed", "DeadlineExceeded")
    assert "25" in status["message"]


def test_pods_of_a_finished_job_go_after_their_time_and_the_job_stays(submitted: Bench) -> None:
    submitted.succeeded("short-lived")
    gone(submitted, "short-lived", "pods", "pytorchjobs")
    assert submitted.status("short-lived")["state"] == "Succeeded"


def test_full_storage_ends_the_job_and_names_the_claim(submitted: Bench) -> None:
    status = submitted.finished("full")
    assert (status["state"], status["reason"]) == ("Failed", "StorageFull"), submitted.story("full")
    assert status["failure"]["message"].startswith("pvc://small/full/"), status["failure"]["message"]


def test_a_job_whose_parent_failed_fails(submitted: Bench) -> None:
    submitted.finished("full")
    status = submitted.finished("child", 30)
    assert (status["state"], status["reason"]) == ("Failed", "DependencyFailed")
    assert "full" in status["message"]


def test_a_job_whose_parent_is_not_there_waits(submitted: Bench) -> None:
    status = submitted.until("orphan", waiting, 30)
    assert "missing" in status["message"]
    assert submitted.pods("orphan") == []


def test_jobs_that_wait_for_each_other_fail(submitted: Bench) -> None:
    """The one that is looked at second may see only that the first has failed."""
    ended = [submitted.finished(name, 120) for name in ("left", "right")]
    assert [status["state"] for status in ended] == ["Failed", "Failed"]
    reasons = {status["reason"] for status in ended}
    assert "DependencyCycle" in reasons
    assert reasons <= {"DependencyCycle", "DependencyFailed"}


def test_deletion_removes_everything_but_the_storage(submitted: Bench) -> None:
    submitted.until("deleted", lambda status: step(status) >= 1)
    folder = submitted.run_folder("deleted")
    submitted.kubectl("delete", "ptj", "deleted", "--wait=true")
    gone(submitted, "deleted", "pods", "pytorchjobs", "configmaps")
    assert (folder / "metrics.jsonl").exists()


def gone(bench: Bench, name: str, *kinds: str) -> None:
    deadline = time.monotonic() + 60
    left: list[str] = []
    while time.monotonic() < deadline:
        found = [item for kind in kinds for item in bench.items(kind, "-l", f"posttrain.dev/job-name={name}")]
        left = [f"{item['kind']}/{item['metadata']['name']}" for item in found]
        if not left:
            return
        time.sleep(0.5)
    raise AssertionError(f"still there: {left}")


def test_the_spec_of_a_started_job_is_frozen(submitted: Bench) -> None:
    submitted.finished("full")
    patch = '{"spec":{"training":{"learningRate":0.5}}}'
    said = submitted.kubectl("patch", "ptj", "full", "--type=merge", "-p", patch, check=False)
    assert "immutable" in said or "may not change" in said or "only" in said, said
    assert condition(submitted.status("full"), "Finished")["status"] == "True"
