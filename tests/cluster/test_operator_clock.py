"""A wall clock that is wrong: for a moment it changes nothing, and where it stays wrong it is believed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import jumping_clock
import pytest
from operator_kit import Operator, World, operator, wait_for
from test_operator_flow import started, success

from devcluster.testing import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("operator")]
DAY = 86400
LIMITS = {"runPolicy": {"activeDeadlineSeconds": 3600}}


class Clock:
    """What the operator takes for the time."""

    def __init__(self, file: Path, process: Operator) -> None:
        self._file, self._process = file, process

    def set(self, ahead: int) -> None:
        """Ahead of the machine's by so many seconds."""
        new = self._file.with_suffix(".new")
        new.write_text(str(ahead))
        new.replace(self._file)

    def noticed(self, world: World, pod: str, times: int) -> None:
        """Returns when the operator has seen so many jumps; each look at a job is a look at the clock."""

        def seen() -> bool:
            world.kubectl("annotate", "pod", pod, f"seen={time.monotonic_ns()}", "--overwrite")
            return self._process.log.read_text().count("the clock has jumped") >= times

        wait_for(seen, f"{times} jumps of the clock")


@pytest.fixture
def clock(plane: Cluster, tmp_path: Path) -> Iterator[Clock]:
    """Of an operator that runs."""
    file = tmp_path / "ahead"
    file.write_text("0")
    with operator(plane, tmp_path, program=[jumping_clock.__file__, str(file)]) as process:
        yield Clock(file, process)


def _age(moment: str) -> float:
    return abs((datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds())


def test_wrong_for_a_moment(world: World, clock: Clock) -> None:
    """Jobs run on, start and end while it is a day ahead or behind, at times that are right."""
    master, worker = started(world, **LIMITS)
    for number, ahead in enumerate((DAY, -DAY)):
        clock.set(ahead)
        clock.noticed(world, worker, number + 1)
        started(world, f"meanwhile-{number}", **LIMITS)
        assert world.status("job")["state"] == "Running"
    world.end_pod(worker, 0)
    world.end_pod(master, 0, success())
    ended = world.until("job", state="Succeeded")
    assert _age(ended["completionTime"]) < 60
    clock.set(0)
    for number in range(2):
        status = world.status(f"meanwhile-{number}")
        assert (status["state"], status["attempts"]) == ("Running", 1)
        assert _age(status["startTime"]) < 60


@pytest.mark.faults
def test_wrong_for_longer(world: World, clock: Clock) -> None:
    """Somebody has set it: after a minute it is the time, and deadlines are judged by it."""
    _, worker = started(world, **LIMITS)
    clock.set(DAY)
    clock.noticed(world, worker, 1)
    time.sleep(50)
    assert world.status("job")["state"] == "Running"
    time.sleep(15)
    world.kubectl("annotate", "pod", worker, "seen=again", "--overwrite")
    world.until("job", state="Failed", reason="DeadlineExceeded")
