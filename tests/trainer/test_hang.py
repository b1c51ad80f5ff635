"""A run that stands still: its launcher ends it with the stacks of every rank. Real processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launcher_kit import Pod, Start, failure_of, launchers, two_nodes

from posttrain_api import names
from posttrain_api.reasons import Reason
from posttrain_trainer.vigil import ENV_MARGIN_SECONDS

STALL = "3"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with launchers(tmp_path) as begin:
        yield lambda *args, **env: begin(*args, **{names.ENV_STALL_SECONDS: STALL, **env})


def pid_of(pod: Pod, rank: int) -> int:
    return int((Path(pod.config.run_dir) / f"waiting-{rank}").read_text())


def kept(pod: Pod, rank: int) -> str:
    """The stacks on the job's storage."""
    return (Path(pod.config.run_dir) / names.STACKS_DIR / f"1-rank-{rank}.txt").read_text()


def test_a_rank_in_an_endless_sleep(start: Start) -> None:
    pod = start({0: ["begin", ["report", 4], ["sleep", 600]], 1: ["begin", ["sleep", 600]]})
    word = failure_of(pod)
    assert (word.reason, word.exit_code, word.step) == (Reason.HANG, 161, 4)
    assert f"{pod.config.run_uri}/{names.STACKS_DIR}/" in word.message
    assert "rank 1: <module> (stub_worker.py:" in word.message
    assert "in <module>" in (word.log_tail or "")
    for rank in (0, 1):
        assert 'stub_worker.py", line' in kept(pod, rank)
        assert f"stacks of rank {rank}" in pod.output.read_text()


def test_a_stopped_rank_cannot_answer_and_is_named_first(start: Start) -> None:
    pod = start({0: ["begin", "wait"], 1: ["begin", "wait"]})
    pod.wait_for("waiting-0", "waiting-1")
    os.kill(pid_of(pod, 1), signal.SIGSTOP)
    word = failure_of(pod)
    assert (word.reason, word.rank) == (Reason.HANG, 1), pod.output.read_text()
    assert "rank 1: cannot answer: it is stopped (state T" in word.message
    assert "state T" in kept(pod, 1)
    assert 'stub_worker.py", line' in kept(pod, 0)
    assert 'stub_worker.py", line' in (word.log_tail or "")  # rank 0's: rank 1 has none


def test_a_rank_blocked_in_a_collective_answers(start: Start) -> None:
    """Its main thread is in gloo and holds no Python that could run a handler."""
    pod = start({0: ["collective"], 1: ["collective", ["sleep", 600]]})
    word = failure_of(pod)
    assert word.reason is Reason.HANG
    assert "rank 0: all_reduce (distributed_c10d.py:" in word.message
    assert "wait_in_a_collective" in kept(pod, 0)


def test_a_rank_that_gets_on_keeps_the_others_alive(start: Start) -> None:
    """One rank of another node works for longer than the limit (an export, a reward), then all stand still."""
    env = two_nodes()
    actions = {0: ["begin", "wait"], 1: ["begin", "go on", "wait"]}
    pods = [start(actions, nodes=2, node=node, PET_NODE_RANK=str(node), **env) for node in (0, 1)]
    pods[0].wait_for("waiting-0", "waiting-1")
    deadline = time.monotonic() + 3 * float(STALL)
    while time.monotonic() < deadline:
        assert [pod.process.poll() for pod in pods] == [None, None], pods[0].output.read_text()
        time.sleep(0.2)
    os.kill(pid_of(pods[1], 1), signal.SIGSTOP)
    words = [failure_of(pod) for pod in pods]
    assert {word.reason for word in words} <= {Reason.HANG, Reason.PEER_LOST, Reason.PREEMPTED}
    assert Reason.HANG in {word.reason for word in words}


def test_before_the_loop_begins_nothing_is_a_hang(start: Start) -> None:
    pod = start({0: [["sleep", 3 * float(STALL)], "succeed"]})
    assert pod.end()[0] == 0, pod.output.read_text()


def test_told_to_stop_is_no_hang(start: Start) -> None:
    """The last save takes longer than the limit."""
    pod = start({0: ["begin", "wait", ["sleep", 2 * float(STALL)], "save"]}, grace=30)
    pod.wait_for("waiting-0")
    pod.process.terminate()
    assert failure_of(pod).exit_code == 143


def test_with_a_status_server_the_operator_is_first(start: Start) -> None:
    """It is configured and not reachable: the launcher acts later by the margin."""
    server = {names.ENV_STATUS_URL: "https://localhost:9/report", ENV_MARGIN_SECONDS: "4"}
    pod = start({0: ["begin", ["sleep", 600]]}, **server)
    word = failure_of(pod)
    assert word.reason is Reason.HANG
    assert "(limit 7 s)" in word.message
