"""The launcher with real torchrun and stub ranks: exit codes, signals, termination messages, two nodes."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from launcher_kit import Start, all_of, failure_of, launchers, two_nodes
from prepare_kit import texts, write_jsonl

from posttrain_api.reasons import Reason
from posttrain_api.records import Success


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with launchers(tmp_path) as begin:
        yield begin


def test_success(start: Start) -> None:
    token = {"HF_TOKEN": "hf_secret"}
    pod = start({0: [["say", "hello"], "environment", "succeed"], 1: ["environment", "succeed"]}, **token)
    code, word = pod.end()
    assert code == 0, pod.output.read_text()
    assert isinstance(word, Success)
    assert word.step == 7
    output = pod.output.read_text()
    assert "[rank0]: hello" in output
    assert "hf_secret" not in output
    seen = json.loads((Path(pod.config.run_dir) / "environment-1.json").read_text())
    assert "HF_TOKEN" not in seen
    assert seen["HF_HUB_OFFLINE"] == "1"
    assert (seen["POSTTRAIN_ATTEMPT"], seen["WORLD_SIZE"], seen["DS_ACCELERATOR"]) == ("1", "2", "cpu")
    assert json.loads((Path(pod.config.run_dir) / "attempt.json").read_text())["attempt"] == 1


def test_failure_of_one_rank_is_the_cause(start: Start) -> None:
    """The other rank loses its peer later, with a record of its own: a consequence."""
    pod = start({0: ["wait", ["fail", "PeerLost"]], 1: [["say", "last words"], ["sleep", 0.5], ["fail", "NonFinite"]]})
    word = failure_of(pod)
    assert (word.reason, word.rank, word.step, word.exit_code) == (Reason.NON_FINITE, 1, 3, 40)
    assert word.message == "because NonFinite"
    assert word.log_tail == "last words"


def test_rank_killed_and_rank_gone_without_a_word(start: Start) -> None:
    pod = start({0: ["wait", ["fail", "PeerLost"]], 1: ["wait"]})
    pod.wait_for("waiting-0", "waiting-1")
    os.kill(int((Path(pod.config.run_dir) / "waiting-1").read_text()), signal.SIGKILL)
    word = failure_of(pod)
    assert (word.reason, word.exit_code, word.signal, word.rank) == (Reason.PROCESS_KILLED, 162, 9, 1)


def test_exit_without_a_record_is_a_trainer_error(start: Start) -> None:
    word = failure_of(start({0: [["say", "Traceback of something"], ["exit", 3]]}))
    assert (word.reason, word.exit_code, word.rank) == (Reason.TRAINER_ERROR, 190, 0)
    assert "exit code 3" in word.message
    assert word.log_tail == "Traceback of something"


def test_sigterm_saves_and_ends_with_143(start: Start) -> None:
    pod = start({0: ["wait", "save"], 1: ["wait", "save"]})
    pod.wait_for("waiting-0", "waiting-1")
    pod.process.terminate()
    word = failure_of(pod)
    assert (word.reason, word.exit_code, word.step) == (Reason.PREEMPTED, 143, 5)


@pytest.mark.parametrize(
    ("after", "expected"),
    [("succeed", 0), (["fail", "StorageFull"], 51), (["fail", "PeerLost"], 143), (["exit", 9], 143)],
)
def test_sigterm_and_a_real_end(start: Start, after: Any, expected: int) -> None:
    """0 and permanent codes only where the run really ended so."""
    pod = start({0: ["wait", after]})
    pod.wait_for("waiting-0")
    pod.process.terminate()
    code, _ = pod.end()
    assert code == expected, pod.output.read_text()


def test_rank_that_ignores_sigterm_is_killed_in_time(start: Start) -> None:
    pod = start({0: ["ignore", ["sleep", 0.1], "wait"]})
    pod.wait_for("waiting-0")
    began = time.monotonic()
    pod.process.terminate()
    word = failure_of(pod)
    assert (word.reason, word.exit_code) == (Reason.PREEMPTED, 143)
    assert time.monotonic() - began < 8  # the grace period


def test_torchrun_killed_leaves_no_rank_behind(start: Start) -> None:
    pod = start({0: ["wait"]})
    pod.wait_for("waiting-0")
    rank = int((Path(pod.config.run_dir) / "waiting-0").read_text())
    torchrun = int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(torchrun, signal.SIGKILL)
    word = failure_of(pod)
    assert (word.reason, word.signal) == (Reason.PROCESS_KILLED, 9)
    assert not Path(f"/proc/{rank}").exists()


def test_launcher_killed_takes_its_ranks_along(start: Start) -> None:
    pod = start({0: ["wait", "save"]})
    pod.wait_for("waiting-0")
    rank = int((Path(pod.config.run_dir) / "waiting-0").read_text())
    pod.process.kill()
    pod.process.wait()
    deadline = time.monotonic() + 15
    while Path(f"/proc/{rank}/cmdline").exists() and Path(f"/proc/{rank}/cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_two_nodes_succeed(start: Start) -> None:
    env = two_nodes()
    actions = {0: ["environment", "succeed"], 1: ["environment", "succeed"]}
    pods = [start(actions, nodes=2, node=node, PET_NODE_RANK=str(node), **env) for node in (1, 0)]
    ends = [pod.end() for pod in pods]
    assert [code for code, _ in ends] == [0, 0], pods[0].output.read_text() + pods[1].output.read_text()
    assert ends[0][1] is None
    assert isinstance(ends[1][1], Success)


def test_two_nodes_one_rank_killed(start: Start) -> None:
    """Each node tells its part: the killed rank on one, the lost peer on the other."""
    env = two_nodes()
    actions = {0: ["wait", ["fail", "PeerLost"]], 1: ["wait"]}
    pods = [start(actions, nodes=2, node=node, PET_NODE_RANK=str(node), **env) for node in (0, 1)]
    pods[0].wait_for("waiting-0", "waiting-1")
    os.kill(int((Path(pods[0].config.run_dir) / "waiting-1").read_text()), signal.SIGKILL)
    assert failure_of(pods[1]).exit_code == 162
    os.kill(
        int((Path(pods[0].config.run_dir) / "waiting-0").read_text()), signal.SIGTERM
    )  # stands for the broken group
    assert failure_of(pods[0]).exit_code == 160


@pytest.mark.parametrize("silent", [0, 1])
def test_sigterm_beside_a_silent_node_does_not_wait_for_it(start: Start, silent: int) -> None:
    """Every process of one node stops without a word (SIGSTOP), as if the node were gone; the rank of the other is in
    a collective that never returns. Node 0 has the store."""
    env = two_nodes()
    actions = {0: ["ignore", "wait"], 1: ["ignore", "wait"]}
    pods = [start(actions, nodes=2, node=node, grace=90, PET_NODE_RANK=str(node), **env) for node in (0, 1)]
    pods[0].wait_for("waiting-0", "waiting-1")
    beats = [Path(pod.config.work_dir) / "ends" / f"node-{node}.beats" for node, pod in enumerate(pods)]
    _wait_until(lambda: all(file.exists() for file in beats))
    stopped = all_of(pods[silent].process.pid)
    try:
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        other = pods[1 - silent]
        other.process.terminate()
        word = failure_of(other)
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGKILL)
    assert (word.reason, word.exit_code) == (Reason.PREEMPTED, 143)
    assert f"node {silent} had not been heard for" in word.message
    assert 5 <= time.monotonic() - began < 60  # of 90


def test_sigterm_waits_for_a_slow_save_of_nodes_that_are_heard(start: Start) -> None:
    """Longer than a silent node is waited for; one of the two is done earlier and gone."""
    env = two_nodes()
    actions = {0: ["wait", ["sleep", 8], "save"], 1: ["wait", "save"]}
    pods = [start(actions, nodes=2, node=node, grace=90, PET_NODE_RANK=str(node), **env) for node in (0, 1)]
    pods[0].wait_for("waiting-0", "waiting-1")
    for pod in pods:
        pod.process.terminate()
    words = [failure_of(pod) for pod in pods]
    assert [(word.exit_code, word.step) for word in words] == [(143, 5), (143, 5)]


def _wait_until(is_so: Callable[[], bool], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_second_node_hears_of_a_failed_prepare(start: Start, tmp_path: Path) -> None:
    """A real prepare on node 0, on data that is not there; node 1 waits for the manifest."""
    env = two_nodes()
    pods = [
        start({0: ["succeed"], 1: ["succeed"]}, nodes=2, node=node, prepared=False, PET_NODE_RANK=str(node), **env)
        for node in (0, 1)
    ]
    words = [failure_of(pod) for pod in pods]
    assert [word.reason for word in words] == [Reason.DATASET_NOT_FOUND] * 2
    assert words[1].message.startswith("Node 0 could not prepare")


def test_not_shared_volume_ends_with_the_question_of_rwx(start: Start) -> None:
    env = {**two_nodes(), "PET_NODE_RANK": "1", "POSTTRAIN_WAIT_SECONDS": "1"}
    word = failure_of(start({0: ["succeed"], 1: ["succeed"]}, nodes=2, node=1, prepared=False, **env))
    assert word.reason is Reason.PEER_LOST
    assert "ReadWriteMany" in word.message


def test_sigterm_while_waiting_for_node_0(start: Start) -> None:
    env = {**two_nodes(), "PET_NODE_RANK": "1"}
    pod = start({0: ["succeed"], 1: ["succeed"]}, nodes=2, node=1, prepared=False, **env)
    pod.wait_to_say("node 1 of 2")
    pod.process.terminate()
    assert failure_of(pod).exit_code == 143


def test_sigterm_during_the_backoff(start: Start, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    record = {"attempt": 4, "checkpointStep": -1, "fruitless": 9, "time": "2030-01-01T00:00:00Z"}
    (run / "attempt.json").write_text(json.dumps(record))
    pod = start({0: ["succeed"]}, POSTTRAIN_BACKOFF_SCALE="1")
    pod.wait_to_say("waiting")
    pod.process.terminate()
    assert failure_of(pod).exit_code == 143
    assert json.loads((run / "attempt.json").read_text())["attempt"] == 5


def test_whole_way_with_the_real_prepare(start: Start, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", texts(20))
    pod = start({0: ["succeed"]}, prepared=False)
    code, _ = pod.end()
    assert code == 0, pod.output.read_text()
    assert "20 rows, 20 used" in pod.output.read_text()
