"""What happens to a running job when something dies: nothing saved is lost, no step is done twice or left out."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from e2e_kit import OPERATOR_NAMESPACE, Bench, condition, job, restarts, step

pytestmark = pytest.mark.e2e

STEPS, EVERY = 120, 10


def long_job(name: str, **resources: int) -> dict[str, object]:
    """Trains for some fifteen seconds, with a checkpoint now and then."""
    return job(
        name, training={"maxSteps": STEPS, "batchSize": 64}, checkpoint={"everySteps": EVERY}, resources=resources
    )


@pytest.fixture(scope="module")
def running(bench: Bench) -> Bench:
    """Three jobs of which each suffers another fate."""
    bench.apply(long_job("killed", gpusPerNode=2), long_job("restarted"), long_job("paused"))
    return bench


def rank_process(pod: str, rank: int) -> int:
    """The pid, on this machine, of a rank of a pod."""
    wanted = {f"POSTTRAIN_POD_NAME={pod}".encode(), f"RANK={rank}".encode(), f"LOCAL_RANK={rank}".encode()}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = set((folder / "environ").read_bytes().split(b"\0"))
        except OSError:  # ended meanwhile, or another user's
            continue
        if wanted <= variables:
            return int(folder.name)
    raise AssertionError(f"no process of rank {rank} in {pod}")


def whole(bench: Bench, name: str) -> None:
    """metrics.jsonl has every step once, in order."""
    assert [line["step"] for line in bench.metrics(name) if "loss" in line] == list(range(1, STEPS + 1))


def test_a_killed_rank_restarts_the_job_from_its_checkpoint(running: Bench) -> None:
    before = running.until("killed", lambda status: step(status) >= 2 * EVERY)
    os.kill(rank_process("killed-master-0", 1), signal.SIGKILL)
    status = running.succeeded("killed")
    assert restarts(status) == 1, running.story("killed")
    assert status["attempt"]["number"] == 2
    assert set(status["attempt"]["podUIDs"]).isdisjoint(before["attempt"]["podUIDs"])
    whole(running, "killed")
    logs = running.kubectl("logs", "killed-master-0")
    assert "resum" in logs.lower(), logs[-2000:]


def test_the_operator_may_die_in_the_middle_and_nothing_changes(running: Bench) -> None:
    before = running.until("restarted", lambda status: step(status) >= 1)
    pods = "app.kubernetes.io/name=posttrain-operator"
    running.cluster.kubectl("-n", OPERATOR_NAMESPACE, "delete", "pod", "-l", pods, "--grace-period=0", "--force")
    status = running.succeeded("restarted")
    assert restarts(status) == 0
    assert status["attempt"]["podUIDs"] == before["attempt"]["podUIDs"]
    whole(running, "restarted")


def test_suspend_saves_and_resume_goes_on(running: Bench) -> None:
    running.until("paused", lambda status: step(status) >= 2)
    running.kubectl("patch", "ptj", "paused", "--type=merge", "-p", '{"spec":{"suspend":true}}')
    status = running.until("paused", lambda status: status.get("state") == "Suspended" and not running.pods("paused"))
    assert condition(status, "Suspended")["reason"] == "UserSuspended"
    saved = status["checkpoints"]["last"]["step"]
    assert saved >= 1
    running.kubectl("patch", "ptj", "paused", "--type=merge", "-p", '{"spec":{"suspend":false}}')
    status = running.succeeded("paused")
    assert restarts(status) == 0
    whole(running, "paused")
