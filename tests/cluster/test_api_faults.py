"""The API server is away, in every way that it can be: nothing is lost, nothing is doubled, and all ends as it should.

Each fault once and for a second in `make test`; the same for longer than any back-off or deadline of the operator, as
scaled here, under the marker `faults`.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_proxy import RETRY_AFTER, Fault, Proxy, kubeconfig_through, proxy_of
from kept import Kept, allow_any_lease, kept
from operator_kit import World, uid_of, wait_for
from test_operator_flow import started, success

from devcluster.testing import Cluster
from posttrain_operator.settings import Timing

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("operator")]
SHORT, LONG = 1.0, 20.0
"""Seconds. At this scale of time the longest back-off is 3 s, a silent watch is given up after 7 s."""
ENVIRON = {"TIME_SCALE": "0.1", "LEASE_SECONDS": "3000", "LEASE_NAME": "behind-a-proxy"}
"""A lease that outlasts every outage here: who loses it is ended by it, and what follows is another test's."""
PATIENCE = 90.0
ONE_POD = {"nodes": 1, "gpusPerNode": 0, "processesPerNode": 1}
EVERY = [fault for fault in Fault if fault is not Fault.NONE]


class Rig:
    """An operator behind a proxy, kept running."""

    def __init__(self, proxy: Proxy, operator: Kept) -> None:
        self.proxy, self.operator = proxy, operator

    def whole(self) -> None:
        """No fault, nothing held, and an operator that is ready."""
        self.proxy.fault(Fault.NONE)
        self.proxy.release()
        self.operator.ready(PATIENCE)


@pytest.fixture(scope="module")
def rig(plane: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("faults")
    with proxy_of(plane) as proxy:
        config = kubeconfig_through(proxy, plane, folder)
        allow_any_lease(plane)
        with kept(config, folder / "operator", ENVIRON) as operator:
            yield Rig(proxy, operator)


class Team:
    """Jobs at every turn of their life when the fault begins; `disturb` lets each of them go on meanwhile."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.lost_master, self.lost_worker = started(world, "loses")
        self.loses = uid_of(world.get("pytorchjob", "loses"))
        (self.done,) = started(world, "ends", resources=ONE_POD)
        world.job("goes")
        world.until("goes", PATIENCE, reason="PodsMissing")

    def disturb(self) -> None:
        """A new job, one that loses a pod, one that ends, one that is deleted."""
        self.world.job("new", resources=ONE_POD)
        self.world.end_pod(self.lost_worker, 137, reason="OOMKilled")
        self.world.vanish(self.lost_worker)
        self.world.end_pod(self.done, 0, success())
        self.world.kubectl("delete", "ptj", "goes", "--wait=false")

    def check(self) -> None:
        """Each of them as if nothing had been, and everything only once (but for the second attempt's training)."""
        self._new_one_is_made()
        self._lost_one_is_restarted_once()
        status = self.world.until("ends", PATIENCE, state="Succeeded")
        assert status["output"]["uri"] == "pvc://runs/x/output"

    def check_the_rest(self) -> None:
        """What waits for the cluster's own garbage collector: half a minute after its start it knows no new kinds."""
        for kind, name in (("pytorchjob", "goes"), ("configmap", "goes-config")):
            wait_for(lambda kind=kind, name=name: self.world.get(kind, name) is None, f"{kind} {name} to go", PATIENCE)
        self._events_are_told_once()

    def _new_one_is_made(self) -> None:
        made = uid_of(self.world.child("new", PATIENCE))
        self.world.until("new", PATIENCE, state="Pending", reason="PodsMissing")
        for pod in self.world.pods("new"):
            self.world.run_pod(pod)
        status = self.world.until("new", PATIENCE, state="Running")
        assert status["backend"]["uid"] == made == uid_of(self.world.get("pytorchjob", "new"))

    def _lost_one_is_restarted_once(self) -> None:
        status = self.world.until("loses", PATIENCE, state="Restarting")
        assert status["restarts"]["total"] == 1
        assert list(status["restarts"]["byCause"]) in (["OutOfMemory"], ["PeerLost"])
        wait_for(self._is_condemned, "the other pod to be deleted", PATIENCE)
        self.world.vanish(self.lost_master)
        wait_for(lambda: self.world.get("pod", self.lost_master) is None, "the master to go")
        self.world.resumed("loses", PATIENCE)
        for pod in self.world.pods("loses"):
            self.world.run_pod(pod)
        status = self.world.until("loses", PATIENCE, state="Running")
        assert (status["attempts"], status["restarts"]["total"]) == (2, 1)
        assert status["backend"]["uid"] == self.loses == uid_of(self.world.get("pytorchjob", "loses"))

    def _is_condemned(self) -> bool:
        pod = self.world.get("pod", self.lost_master)
        return pod is None or "deletionTimestamp" in pod["metadata"]

    def _events_are_told_once(self) -> None:
        path = "jsonpath={range .items[*]}{.regarding.name}/{.reason}/{.note}{'\\n'}{end}"
        told = Counter(self.world.kubectl("get", "events.events.k8s.io", "-o", path).splitlines())
        twice = [event for event, times in told.items() if times > 1]
        assert all(event.startswith("loses/Training/") for event in twice), told
        assert all(told[event] <= 2 for event in twice), told


def suffered(rig: Rig, world: World, fault: Fault, seconds: float) -> list[int]:
    """Lives through a fault; returns how operators ended meanwhile."""
    rig.whole()
    team, before = Team(world), len(rig.operator.ends)
    rig.proxy.fault(fault)
    rig.proxy.seen.clear()
    try:
        team.disturb()
        time.sleep(seconds)
    finally:
        requests = len(rig.proxy.seen)
        rig.proxy.fault(Fault.NONE)
    over = time.monotonic()
    team.check()
    waited = round(time.monotonic() - over, 1)
    team.check_the_rest()
    ends = rig.operator.ends[before:]
    told = {"for": seconds, "seconds": waited, "ends": len(ends), "requests": requests}
    report({"outage": str(fault), **told})
    return ends


def report(row: dict[str, Any]) -> None:
    """Adds a row to the report of `make test-faults`."""
    if path := os.environ.get("POSTTRAIN_FAULT_REPORT"):
        with Path(path).open("a") as out:
            out.write(json.dumps(row) + "\n")


def ends_itself(fault: Fault) -> bool:
    """A watch that looks alive and tells nothing cannot be mended from inside: the second comparison that finds
    something untold ends the process, unless the watch has been opened anew before."""
    return fault is Fault.MUTE


@pytest.mark.timeout(240)
@pytest.mark.parametrize("fault", EVERY)
def test_a_short_fault(rig: Rig, world: World, fault: Fault) -> None:
    ends = suffered(rig, world, fault, SHORT)
    assert ends == [] or ends_itself(fault)


@pytest.mark.faults
@pytest.mark.timeout(360)
@pytest.mark.parametrize("fault", [fault for fault in EVERY if not ends_itself(fault)])
def test_a_long_fault(rig: Rig, world: World, fault: Fault) -> None:
    """Not for one that ends the operator: what it knew of a pod's end goes with it, and nobody here makes lost pods
    anew."""
    assert suffered(rig, world, fault, LONG) == []


def tries(seconds: float, waits: Iterator[float]) -> int:
    """How often whoever waits so long between two requests can ask in so many seconds."""
    return 1 + sum(1 for moment in itertools.takewhile(lambda moment: moment <= seconds, itertools.accumulate(waits)))


def quickest(fault: Fault) -> Iterator[float]:
    """The shortest waits that are allowed: a Retry-After; else half the back-off, which is the most that jitter takes
    off."""
    if fault is Fault.BUSY:
        return itertools.repeat(RETRY_AFTER)
    timing = Timing().scaled(float(ENVIRON["TIME_SCALE"]))
    return (min(timing.brake_limit, timing.brake * 2.0**number) / 2 for number in itertools.count())


@pytest.mark.parametrize("fault", [Fault.BUSY, Fault.UNAVAILABLE, Fault.CUT, Fault.BROKEN])
def test_an_absent_server_is_not_stormed(rig: Rig, world: World, fault: Fault) -> None:
    """Each watch, and each of ten jobs in the middle of a pass, asks as rarely as the back-off says."""
    rig.whole()
    names = [f"job-{number}" for number in range(10)]
    rig.proxy.held.clear()
    rig.proxy.hold()
    world.jobs(*names)
    wait_for(lambda: len(rig.proxy.held) >= len(names), "ten passes in the middle of a write", PATIENCE)
    began = time.monotonic()
    rig.proxy.fault(fault)
    rig.proxy.release()
    time.sleep(2 * RETRY_AFTER + 2)
    seen = [each for each in rig.proxy.seen if each.moment >= began and each.fault is fault]
    most = tries(time.monotonic() - began, quickest(fault))
    rig.proxy.fault(Fault.NONE)
    for name in names:
        world.child(name, PATIENCE)
    watches = Counter(each.path for each in seen if each.watch)
    assert len(watches) >= 3
    assert max(watches.values()) <= most, (most, watches)
    if fault in (Fault.BUSY, Fault.UNAVAILABLE):
        asked = Counter(each.path for each in seen if f"/{world.namespace}/" in each.path)
        assert 1 <= max(asked.values()) <= len(names) * most, (most, asked)
