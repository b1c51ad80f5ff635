"""Two operators at once: one leads, the other follows it whatever happens to it, and nothing is ever done twice.

What was done twice is read from the API server's audit log, not from what the operators say.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from api_proxy import Fault, kubeconfig_through, proxy_of
from operator_kit import LEASE, SYSTEM, World, wait_for
from replicas_kit import (
    PATIENCE,
    REAL,
    SECRET,
    Replica,
    acquired,
    last_of_lease,
    lease_holder,
    no_double_action,
    replica,
    two,
    written,
)
from test_operator_flow import started

from devcluster.testing import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("operator"), pytest.mark.timeout(400)]
SLACK = 6.0
"""Seconds that a busy machine may need beside what the constants say."""
EXIT_LOST = 4


@pytest.fixture
def pair(plane: Cluster, tmp_path: Path) -> Iterator[tuple[Replica, Replica]]:
    """A leader with complete lists, and a standby."""
    with two(plane, tmp_path) as both:
        yield both


@pytest.mark.faults
@pytest.mark.parametrize(("ending", "bound"), [(signal.SIGTERM, 3.0), (signal.SIGKILL, 20.0)])
def test_the_hand_over_at_the_chart_s_own_times(
    plane: Cluster, world: World, tmp_path: Path, ending: signal.Signals, bound: float
) -> None:
    """No tenth of the scale, no slack: from the signal until the other holds the lease."""
    with two(plane, tmp_path, TIME_SCALE="1", LEASE_SECONDS="15") as (first, second):
        names, told = burst(world, 4), datetime.now(UTC)
        first.stop(ending)
        second.ready(PATIENCE)
        served(world, names)
        taken = acquired(no_double_action(plane, world.namespace, [first, second]), second.identity)
        waited = (taken.answered - told).total_seconds()
        print(f"{ending.name}: the lease was taken over after {waited:.1f} s")
        assert waited < bound


def burst(world: World, count: int) -> list[str]:
    """Jobs applied at once, so that the leader is in the middle of something."""
    names = [f"burst-{number}" for number in range(count)]
    for name in names:
        world.job(name)
    return names


def served(world: World, names: list[str]) -> None:
    for name in names:
        world.child(name, PATIENCE)
        world.until(name, PATIENCE, state="Pending")


def test_sigterm_hands_over_at_once(plane: Cluster, world: World, pair: tuple[Replica, Replica]) -> None:
    first, second = pair
    assert second.http("/readyz") == "ok\n"  # readiness is not leadership
    assert (first.gauge("leader"), second.gauge("leader")) == (1, 0)
    assert "GET /apis/posttrain.dev" not in second.log.read_text()  # the standby watches nothing
    started(world)
    names = burst(world, 4)
    assert first.stop(signal.SIGTERM) == 0
    second.ready(PATIENCE)
    assert second.gauge("leader") == 1
    served(world, names)
    entries = no_double_action(plane, world.namespace, [first, second])
    given_up, taken = last_of_lease(entries, first.identity), acquired(entries, second.identity)
    # Half of what a lease lasts that nobody gives up: see the next test.
    assert (taken.sent - given_up.answered).total_seconds() < REAL / 2
    assert lease_holder(plane) == second.identity


def test_a_killed_leader_is_followed(plane: Cluster, world: World, pair: tuple[Replica, Replica]) -> None:
    first, second = pair
    names = burst(world, 4)
    first.stop(signal.SIGKILL)
    second.ready(PATIENCE)
    served(world, names)
    entries = no_double_action(plane, world.namespace, [first, second])
    renewed, taken = last_of_lease(entries, first.identity), acquired(entries, second.identity)
    waited = (taken.sent - renewed.answered).total_seconds()
    assert REAL * 0.9 < waited < REAL * 20 / 15 + SLACK


def test_a_frozen_leader_writes_nothing_when_it_thaws(
    plane: Cluster, world: World, pair: tuple[Replica, Replica]
) -> None:
    """Everything that it missed lies in its sockets when it wakes up: new jobs, pods that failed."""
    first, second = pair
    master, worker = started(world)
    first.process.send_signal(signal.SIGSTOP)
    names = burst(world, 3)
    world.end_pod(worker, 137)
    second.ready(PATIENCE)
    served(world, names)
    world.until("job", PATIENCE, state="Restarting")
    thawed = time.monotonic()
    first.process.send_signal(signal.SIGCONT)
    assert first.process.wait(PATIENCE) == EXIT_LOST
    assert time.monotonic() - thawed < 1 + SLACK
    no_double_action(plane, world.namespace, [first, second])
    assert second.process.poll() is None
    assert master


def test_a_leader_without_a_network_ends_before_another_begins(plane: Cluster, world: World, tmp_path: Path) -> None:
    with proxy_of(plane) as proxy, two(plane, tmp_path, kubeconfig_through(proxy, plane, tmp_path)) as (first, second):
        proxy.fault(Fault.BLACK_HOLE)
        names = burst(world, 3)
        assert first.process.wait(PATIENCE) == EXIT_LOST
        assert not [each for each in written(plane) if each.by(second.identity) and each.resource == "leases"]
        second.ready(PATIENCE)
        served(world, names)
        no_double_action(plane, world.namespace, [first, second])


def test_what_arrives_after_the_hand_over_is_refused(plane: Cluster, world: World, tmp_path: Path) -> None:
    """The fence let them pass, and then the wire was slow: a creation, a patch of a child, a status."""
    with proxy_of(plane) as proxy, two(plane, tmp_path, kubeconfig_through(proxy, plane, tmp_path)) as (first, second):
        (_, worker), _ = started(world, "struck"), started(world, "paused")
        proxy.hold()
        world.job("new")
        world.patch_job("paused", {"suspend": True})
        world.end_pod(worker, 137)
        wanted = {"/configmaps", "/pytorchjobs/paused", "/posttrainingjobs/struck/status"}
        wait_for(lambda: wanted <= {_below(each.path) for each in proxy.held}, f"the writes {wanted}", PATIENCE)
        first.stop(signal.SIGKILL)
        second.ready(PATIENCE)
        served(world, ["new"])
        world.struck("struck", "ProcessKilled")
        wait_for(lambda: world.child("paused")["spec"]["runPolicy"]["suspend"], "the suspension", PATIENCE)
        proxy.release()
        wait_for(lambda: all(each.code for each in proxy.held), "their arrival", PATIENCE)
        assert {each.code for each in proxy.held if _below(each.path) in wanted} == {409}, proxy.held
        no_double_action(plane, world.namespace, [first, second])


def _below(path: str) -> str:
    """The path below its namespace."""
    return re.sub("^.*/namespaces/[^/]+", "", path)


def test_a_lease_that_somebody_takes_ends_the_leader(plane: Cluster, pair: tuple[Replica, Replica]) -> None:
    first, _ = pair
    patch = '{"spec":{"holderIdentity":"somebody","leaseDurationSeconds":1}}'
    plane.kubectl("patch", "lease", LEASE, "-n", SYSTEM, "--type=merge", "-p", patch)
    assert first.process.wait(PATIENCE) == EXIT_LOST
    assert "the lease is lost: somebody holds it" in first.log.read_text()


def test_two_that_start_together_share_one_certificate(plane: Cluster, tmp_path: Path) -> None:
    """Both find the Secret empty; one writes it, the other takes what was written."""
    plane.kubectl("delete", "lease", LEASE, "-n", SYSTEM, "--ignore-not-found")
    plane.kubectl("patch", "secret", SECRET, "-n", SYSTEM, "--type=merge", "-p", '{"data":null}')
    both = [replica(plane, tmp_path / name, name) for name in ("a", "b")]
    try:
        for each in both:
            wait_for(each.certificate, "the status server", PATIENCE)
        assert both[0].certificate() == both[1].certificate()
        assert sum(each.log.read_text().count("certificates renewed") for each in both) == 1
    finally:
        for each in both:
            each.stop(signal.SIGKILL)
