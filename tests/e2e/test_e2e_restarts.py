"""What happens to a running job when something dies: nothing saved is lost, no step is done twice or left out.

Each fault once, on small jobs that run beside each other. On two pods, for SFT and GRPO and with equal weights, all of
them are in test_fault_matrix.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import fault_kit
import pytest
from e2e_kit import Bench, Manifest, condition, job, restarts, step

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e")]

STEPS, EVERY, PACE = 80, 10, 0.25
PATIENCE = 600
STRUCK = {
    "killed": {"ProcessKilled": 1},
    "evicted": {"Preempted": 1},
    "hungry": {"OutOfMemory": 1},
    "unwatched": {},  # the pods were replaced before anybody looked: nobody knows why, and it counts as nothing
}
"""Job and what its restarts are for."""
FREE = ("evicted", "unwatched")


def long_job(name: str, **resources: int) -> Manifest:
    """Trains long enough to be hit in the middle, with a checkpoint now and then."""
    made = job(name, training={"maxSteps": STEPS}, checkpoint={"everySteps": EVERY}, resources=resources)
    made["spec"]["env"] = fault_kit.paced(name, PACE)
    return made


@dataclass(frozen=True)
class Seen:
    """Jobs that were each hit in the middle by something else, and their status before or at that moment."""

    bench: Bench
    struck: dict[str, dict[str, Any]]
    suspended: dict[str, Any]
    orphaned: dict[str, Any]


@pytest.fixture(scope="module")
def seen(bench: Bench) -> Seen:
    """Hits all of them while they run beside each other; the tests look at how they ended."""
    fault_kit.install(bench)
    bench.apply(long_job("killed", gpusPerNode=2), long_job("evicted"), long_job("hungry"))
    struck = struck_when_saved(bench, {"killed": kill, "evicted": evict, "hungry": starve})
    bench.apply(long_job("paused"))
    suspended = pause(bench, "paused")
    for name in struck:  # the next fault leaves them no operator
        bench.until(name, lambda status: status.get("attempt", {}).get("number") == 2, PATIENCE)
    bench.apply(long_job("orphaned"), long_job("unwatched"))
    seen: dict[str, dict[str, Any]] = {}

    def leave(bench: Bench, name: str) -> None:
        seen["orphaned"] = bench.until("orphaned", lambda status: step(status) >= 1)
        without_operator(bench, name)

    struck |= struck_when_saved(bench, {"unwatched": leave})
    return Seen(bench, struck, suspended, seen["orphaned"])


def kill(bench: Bench, name: str) -> None:
    fault_kit.Hit(bench, name).signal_rank(1, signal.SIGKILL)


def evict(bench: Bench, name: str) -> None:
    bench.kubectl("delete", "pod", f"{name}-master-0", "--wait=false")


def starve(bench: Bench, name: str) -> None:
    bench.cluster.ask("oom", pod=f"{name}-master-0", namespace=bench.namespace)


def struck_when_saved(bench: Bench, strikes: dict[str, Callable[[Bench, str], None]]) -> dict[str, dict[str, Any]]:
    """Hits each job as soon as it has saved and gone on; the statuses before."""
    before: dict[str, dict[str, Any]] = {}
    deadline = time.monotonic() + PATIENCE
    while len(before) < len(strikes) and time.monotonic() < deadline:
        for name, strike in strikes.items():
            status = {} if name in before else bench.status(name)
            if saved(status):
                strike(bench, name)
                before[name] = status
        time.sleep(0.2)
    assert len(before) == len(strikes), "\n".join(bench.story(name) for name in strikes if name not in before)
    return before


def saved(status: dict[str, Any]) -> bool:
    """Whether there is something to go on from, and steps after it."""
    return fault_kit.last_saved(status) >= EVERY and step(status) > fault_kit.last_saved(status)


def pause(bench: Bench, name: str) -> dict[str, Any]:
    """Suspends and resumes; the status between the two. What the last report said may be written after it."""
    bench.until(name, lambda status: step(status) >= 2, PATIENCE)
    bench.kubectl("patch", "ptj", name, "--type=merge", "-p", '{"spec":{"suspend":true}}')
    bench.until(name, lambda status: status.get("state") == "Suspended" and not bench.pods(name))
    status = bench.until(name, lambda status: fault_kit.last_saved(status) > 0)
    bench.kubectl("patch", "ptj", name, "--type=merge", "-p", '{"spec":{"suspend":false}}')
    return status


def without_operator(bench: Bench, name: str) -> None:
    """The operator dies, a rank dies while it is away, the operator comes back."""
    fault_kit.operator(bench, 0, "--grace-period=0", "--force")
    before = {pod["metadata"]["uid"] for pod in bench.pods(name)}
    fault_kit.Hit(bench, name).signal_rank(0, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while before & {pod["metadata"]["uid"] for pod in bench.pods(name)} and time.monotonic() < deadline:
        time.sleep(0.5)
    fault_kit.operator(bench, 1)


def whole(bench: Bench, name: str) -> None:
    """metrics.jsonl has every step once, in order."""
    assert [line["step"] for line in bench.metrics(name) if "loss" in line] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("name", STRUCK)
def test_it_restarts_from_its_checkpoint(seen: Seen, name: str) -> None:
    status, story = seen.bench.succeeded(name, PATIENCE), seen.bench.story(name)
    assert status.get("restarts", {}).get("byCause", {}) == STRUCK[name], story
    assert restarts(status) == (0 if name in FREE else 1), story
    assert status["attempt"]["number"] == 2, story
    assert set(status["attempt"]["podUIDs"]).isdisjoint(seen.struck[name]["attempt"]["podUIDs"])
    whole(seen.bench, name)
    assert fault_kit.resumed_at(seen.bench, name) >= fault_kit.last_saved(seen.struck[name]), story


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
