"""What happens to a running job when something dies: nothing saved is lost, no step is done twice or left out."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from e2e_kit import OPERATOR_NAMESPACE, Bench, Manifest, condition, job, restarts, step

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e")]

STEPS, EVERY = 600, 40
PATIENCE = 600


def long_job(name: str, **resources: int) -> Manifest:
    """Trains long enough to be hit in the middle, with a checkpoint now and then."""
    return job(
        name, training={"maxSteps": STEPS, "batchSize": 64}, checkpoint={"everySteps": EVERY}, resources=resources
    )


@dataclass(frozen=True)
class Seen:
    """Three jobs, each hit in the middle by something else, and their status before or at that moment."""

    bench: Bench
    killed: dict[str, Any]
    suspended: dict[str, Any]
    orphaned: dict[str, Any]


@pytest.fixture(scope="module")
def seen(bench: Bench) -> Seen:
    """Hits all three while they run beside each other; the tests look at how they ended."""
    bench.apply(long_job("killed", gpusPerNode=2), long_job("paused"))
    killed = bench.until("killed", lambda status: step(status) >= EVERY + 1)
    os.kill(rank_process(bench, "killed", 1), signal.SIGKILL)
    bench.until("paused", lambda status: step(status) >= 2)
    bench.kubectl("patch", "ptj", "paused", "--type=merge", "-p", '{"spec":{"suspend":true}}')
    bench.apply(long_job("orphaned"))
    suspended = bench.until("paused", lambda status: status.get("state") == "Suspended" and not bench.pods("paused"))
    bench.kubectl("patch", "ptj", "paused", "--type=merge", "-p", '{"spec":{"suspend":false}}')
    bench.until("killed", lambda status: status.get("attempt", {}).get("number") == 2)
    orphaned = bench.until("orphaned", lambda status: step(status) >= 1)
    operator = ("-l", "app.kubernetes.io/name=posttrain-operator", "--grace-period=0", "--force")
    bench.cluster.kubectl("-n", OPERATOR_NAMESPACE, "delete", "pod", *operator)
    return Seen(bench, killed, suspended, orphaned)


def rank_process(bench: Bench, name: str, rank: int) -> int:
    """The pid, on this machine, of a rank of a one-pod job; its storage tells it from a job of another cluster."""
    wanted = {f"POSTTRAIN_POD_NAME={name}-master-0".encode(), f"RANK={rank}".encode(), f"LOCAL_RANK={rank}".encode()}
    uid = str(bench.get("ptj", name)["metadata"]["uid"])
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = set((folder / "environ").read_bytes().split(b"\0"))
            ours = uid in (folder / "root/etc/posttrain/config/config.json").read_text()
        except OSError:  # ended meanwhile, another user's, or no container of a job
            continue
        if ours and wanted <= variables:
            return int(folder.name)
    raise AssertionError(f"no process of rank {rank} of {name}")


def whole(bench: Bench, name: str) -> None:
    """metrics.jsonl has every step once, in order."""
    assert [line["step"] for line in bench.metrics(name) if "loss" in line] == list(range(1, STEPS + 1))


def test_a_killed_rank_restarts_the_job_from_its_checkpoint(seen: Seen) -> None:
    status = seen.bench.succeeded("killed", PATIENCE)
    assert restarts(status) == 1, seen.bench.story("killed")
    assert status["restarts"]["byCause"] == {"ProcessKilled": 1}
    assert status["attempt"]["number"] == 2
    assert set(status["attempt"]["podUIDs"]).isdisjoint(seen.killed["attempt"]["podUIDs"])
    whole(seen.bench, "killed")
    assert f"step-{EVERY:06d}" in seen.bench.kubectl("logs", "killed-master-0") or "resum" in seen.bench.kubectl(
        "logs", "killed-master-0"
    )


def test_suspend_saves_and_resume_goes_on(seen: Seen) -> None:
    assert condition(seen.suspended, "Suspended")["reason"] == "UserSuspended"
    assert 1 <= seen.suspended["checkpoints"]["last"]["step"] < STEPS
    status = seen.bench.succeeded("paused", PATIENCE)
    assert restarts(status) == 0
    whole(seen.bench, "paused")


def test_the_operator_may_die_in_the_middle_and_nothing_changes(seen: Seen) -> None:
    status = seen.bench.succeeded("orphaned", PATIENCE)
    assert restarts(status) == 0
    assert status["attempt"]["podUIDs"] == seen.orphaned["attempt"]["podUIDs"]
    whole(seen.bench, "orphaned")
