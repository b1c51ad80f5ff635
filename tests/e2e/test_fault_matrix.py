"""The fault matrix: every fault on a job of two pods, for SFT and for GRPO. `make test-faults` writes the report.

What can be gone on from ends as if nothing had happened: the weights of the undisturbed run, bit for bit, and each of
its lines. What cannot ends as Failed, with its cause, and keeps the last checkpoint.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import e2e_models
import fault_kit
import pytest
from e2e_kit import Bench, step
from fault_kit import Hit, Strike

pytestmark = [pytest.mark.e2e, pytest.mark.faults, pytest.mark.xdist_group("e2e"), pytest.mark.timeout(1500)]
PATIENCE = 1200


def kill_rank(rank: int) -> Strike:
    return lambda hit: hit.signal_rank(rank, signal.SIGKILL)


def kill_launcher(hit: Hit) -> None:
    hit.bench.cluster.ask("kill", pod=hit.pods[1], namespace=hit.bench.namespace)


def run_out_of_memory(hit: Hit) -> None:
    hit.bench.cluster.ask("oom", pod=hit.pods[1], namespace=hit.bench.namespace)


def delete_a_pod(hit: Hit) -> None:
    hit.bench.kubectl("delete", "pod", hit.pods[1], "--wait=false")


def lose_the_node(hit: Hit) -> None:
    """Another node takes its pods, the other pod too where both were on this one; it comes back for the tests after."""
    node = hit.node_of(hit.pods[1])
    hit.bench.cluster.ask("lose-node", node=node)
    hit.bench.until(hit.name, lambda status: "NodeLost" in status.get("restarts", {}).get("byCause", {}), 600)
    hit.bench.cluster.ask("restore-node", node=node)


def stop_a_rank(hit: Hit) -> None:
    hit.signal_rank(1, signal.SIGSTOP)


def order(**what: Any) -> Strike:
    return lambda hit: hit.order(**what)


def fill_the_volume(hit: Hit) -> None:
    claim = hit.bench.get("ptj", hit.name)["spec"]["storage"]["claimName"]
    hit.bench.cluster.ask("fill-volume", claim=claim, namespace=hit.bench.namespace)


def tear_the_rows(hit: Hit) -> None:
    """What one rank reads them from; some steps ahead, so that every attempt meets it at the same one."""
    stage = hit.name.partition("-")[0].upper()
    hit.order(who="rank:1", do="tear", always=True, step=step(hit.before) + fault_kit.EVERY[stage])


def kill_while_no_operator_runs(hit: Hit) -> None:
    fault_kit.operator(hit.bench, 0)
    before = uids(hit)
    hit.signal_rank(1, signal.SIGKILL)
    deadline = time.monotonic() + 120
    while before & uids(hit) and time.monotonic() < deadline:
        time.sleep(0.5)
    fault_kit.operator(hit.bench, 2)  # as the chart has it: the lost node may be one of theirs


def uids(hit: Hit) -> set[str]:
    """Of the pods that are there."""
    return {pod["metadata"]["uid"] for pod in hit.bench.pods(hit.name)}


@dataclass(frozen=True)
class Fault:
    """`reason`: of the failure; None where all pods were replaced before anybody looked. `counted`: restarts that use
    up the budget. `ends`: the state. `told`: of the failure besides. `small`: on a volume that can be full. `saves`:
    the pods are asked to end, so no step is lost."""

    name: str
    strike: Strike
    reason: str | None
    ends: str = "Succeeded"
    counted: int = 1
    spec: dict[str, Any] | None = None
    told: dict[str, Any] | None = None
    small: bool = False
    saves: bool = False


TOLD = ("replica", "rank", "node", "signal", "exitCode")
WORKER = {"replica": "worker-0"}
GONE_ON = (
    Fault("rank-0-killed", kill_rank(0), "ProcessKilled", told={"replica": "master-0", "rank": 0, "signal": 9}),
    Fault("rank-1-killed", kill_rank(1), "ProcessKilled", told={"replica": "worker-0", "rank": 1, "signal": 9}),
    Fault("launcher-killed", kill_launcher, "ProcessKilled", told={**WORKER, "exitCode": 137}),
    Fault("out-of-memory", run_out_of_memory, "OutOfMemory", told=WORKER),
    Fault("pod-deleted", delete_a_pod, "Preempted", counted=0, told={"exitCode": 143}, saves=True),
    Fault("rank-exits-1", order(who="rank:1", do="exit", code=1), "TrainerError", told={**WORKER, "rank": 1}),
    Fault(
        "launcher-exits-143",
        order(who="launcher:worker-0", do="exit", code=143),
        "Preempted",
        told={**WORKER, "exitCode": 143},
    ),
    Fault("rank-hangs", stop_a_rank, "Hang", told={**WORKER, "rank": 1}, spec={"runPolicy": {"stallSeconds": 20}}),
    Fault("killed-without-operator", kill_while_no_operator_runs, None, counted=0),
    Fault("node-lost", lose_the_node, "NodeLost", counted=0),
)
ENDED = (
    Fault(
        "launcher-exits-1",
        order(who="launcher:worker-0", do="exit", code=1),
        "InternalError",
        "Failed",
        0,
        told={**WORKER, "exitCode": 1},
    ),
    Fault("weights-nan", order(who="rank:1", do="nan"), "NonFinite", "Failed", 0),
    Fault("data-error", tear_the_rows, "TrainerError", "Failed", 1, told={**WORKER, "rank": 1}),
    Fault("volume-full", fill_the_volume, "StorageFull", "Failed", 0, small=True),
)
STAGES = ("SFT", "RL")


def cases(faults: tuple[Fault, ...]) -> list[Any]:
    return [pytest.param(stage, fault, id=f"{stage}-{fault.name}") for stage in STAGES for fault in faults]


@pytest.fixture(scope="module")
def report() -> Iterator[list[dict[str, Any]]]:
    """Rows of the report; written to the file that POSTTRAIN_FAULT_REPORT names."""
    rows: list[dict[str, Any]] = []
    yield rows
    if path := os.environ.get("POSTTRAIN_FAULT_REPORT"):
        with Path(path).open("a") as out:
            out.write("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def arena(bench: Bench) -> Bench:
    """The bench with a model and the saboteur; the undisturbed run of each stage beside it."""
    fault_kit.install(bench)
    words = e2e_models.tokenizer([row["prompt"] for row in fault_kit.PROMPTS])
    e2e_models.save(bench.volume() / "models" / "good", words)
    for stage in STAGES:
        bench.claim(f"small-{stage.lower()}", "96Mi")
    bench.apply(*(fault_kit.two_pods(f"calm-{stage.lower()}", stage) for stage in STAGES))
    for stage in STAGES:
        bench.succeeded(f"calm-{stage.lower()}", PATIENCE)
    return bench


def struck(arena: Bench, stage: str, fault: Fault, report: list[dict[str, Any]]) -> dict[str, Any]:
    """Applies a job, hits it in the middle, waits for its end; its status."""
    name = f"{stage.lower()}-{fault.name}"
    storage = {"storage": {"claimName": f"small-{stage.lower()}"}} if fault.small else {}
    arena.apply(fault_kit.two_pods(name, stage, **(fault.spec or {}), **storage))
    hit = fault_kit.in_the_middle(arena, name, stage)
    begun = time.monotonic()
    with ThreadPoolExecutor(1) as beside:
        reached = beside.submit(last_step, hit)
        fault.strike(hit)
        at = reached.result()
    then = arena.status(name).get("failure")
    status = arena.finished(name, PATIENCE)
    failure = status.get("failure") or then or {}  # a job that succeeds after all has none at its end
    causes = status.get("restarts", {}).get("byCause", {})
    report.append(
        {
            "stage": "GRPO" if stage == "RL" else stage,
            "fault": fault.name,
            "state": status["state"],
            "reason": status.get("failure", {}).get("reason") or next(iter(causes), None),
            "attempts": status.get("attempts"),
            "failure": {key: failure[key] for key in TOLD if key in failure},
            "restarts": causes,
            "at": at,
            "from": fault_kit.resumed_at(arena, name) if status["state"] == "Succeeded" else None,
            "saved": fault_kit.last_saved(status),
            "seconds": round(time.monotonic() - begun),
        }
    )
    return status


def last_step(hit: Hit) -> int:
    """The last step that the struck attempt wrote a line for: read until the next attempt, or the end. 0 where its
    volume is a mount that only the nodes see."""
    path, found = hit.bench.run_folder(hit.name) / "metrics.jsonl", 0
    if not path.exists():
        return 0
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        status = hit.bench.status(hit.name)
        if status.get("attempt", {}).get("number", 1) > 1 or status["state"] in ("Succeeded", "Failed"):
            break
        written = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        found = max([found, *(int(line["step"]) for line in written)])
        time.sleep(0.3)
    return found


def assert_told(failure: dict[str, Any], fault: Fault) -> None:
    """The failure names who failed first, and how."""
    assert {key: failure.get(key) for key in fault.told or {}} == (fault.told or {}), failure
    assert fault.reason is None or failure.get("node"), failure


@pytest.mark.parametrize(("stage", "fault"), cases(GONE_ON))
def test_it_ends_as_if_nothing_had_happened(
    arena: Bench, report: list[dict[str, Any]], stage: str, fault: Fault
) -> None:
    name, calm = f"{stage.lower()}-{fault.name}", f"calm-{stage.lower()}"
    status = struck(arena, stage, fault, report)
    row, story = report[-1], arena.story(name)
    assert status["state"] == "Succeeded", story
    restarts = status.get("restarts", {})
    assert restarts.get("byCause", {}) == ({fault.reason: 1} if fault.reason else {}), story
    assert (restarts.get("total", 0), status["attempts"]) == (fault.counted, 2), story
    assert 0 <= row["at"] - row["from"] <= (0 if fault.saves else fault_kit.EVERY[stage]), story
    assert_told(row["failure"], fault)
    assert fault_kit.lines(arena, name) == fault_kit.lines(arena, calm)
    assert fault_kit.weights(arena, name) == fault_kit.weights(arena, calm)


@pytest.mark.parametrize(("stage", "fault"), cases(ENDED))
def test_it_ends_as_failed_and_keeps_what_was_saved(
    arena: Bench, report: list[dict[str, Any]], stage: str, fault: Fault
) -> None:
    name = f"{stage.lower()}-{fault.name}"
    status = struck(arena, stage, fault, report)
    assert (status["state"], status["reason"]) == ("Failed", fault.reason), arena.story(name)
    assert status.get("restarts", {}).get("total", 0) == fault.counted, arena.story(name)
    assert status["attempts"] == fault.counted + 1, arena.story(name)
    assert_told(report[-1]["failure"], fault)
    saved = fault_kit.last_saved(status)
    assert saved >= fault_kit.EVERY[stage]
    if not fault.small:  # that one's volume is a mount that only the nodes see
        assert (arena.run_folder(name) / "checkpoints" / f"step-{saved:06d}").is_dir()
