"""The Lease's JSON, and what this replica tells of the election."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest

from posttrain_operator.cluster.errors import Unavailable
from posttrain_operator.cluster.writes import Write
from posttrain_operator.health import Health
from posttrain_operator.leader import leadership
from posttrain_operator.leader.leadership import Leadership, Told
from posttrain_operator.leader.lease import Lease, lease_of, manifest, micro_time
from posttrain_operator.metrics import OperatorMetrics
from posttrain_operator.settings import Timing

FULL = Lease("a", 15, 3, "2026-03-01T12:00:00.000001Z", "2026-03-01T12:00:02.000001Z", "77")


def test_what_is_written_is_read_back() -> None:
    body = manifest(FULL, "ns", "name")
    assert lease_of(body) == FULL
    assert (body["metadata"]["namespace"], body["metadata"]["name"]) == ("ns", "name")


def test_a_new_lease_has_no_version_and_one_of_nobody_no_empty_time() -> None:
    body = manifest(Lease(), "ns", "name")
    assert "resourceVersion" not in body["metadata"]
    assert body["spec"] == {"holderIdentity": "", "leaseDurationSeconds": 1, "leaseTransitions": 0}


def test_a_lease_that_somebody_made_empty_is_read() -> None:
    assert lease_of({"metadata": {"resourceVersion": "1"}}) == Lease(version="1")
    nulls = {"holderIdentity": None, "leaseDurationSeconds": None, "leaseTransitions": None}
    assert lease_of({"metadata": {"resourceVersion": "1"}, "spec": nulls}) == Lease(version="1")


def test_times_have_six_digits() -> None:
    """The server refuses a MicroTime without them."""
    assert micro_time(datetime(2026, 3, 1, 12, tzinfo=UTC)) == "2026-03-01T12:00:00.000000Z"


class Store:
    """One lease in memory; `away`: nothing answers."""

    def __init__(self, lease: Lease | None = None) -> None:
        self.lease, self.away = lease, False

    async def read(self) -> Lease | None:
        self._must_answer()
        return self.lease

    async def create(self, lease: Lease) -> Lease:
        return await self.replace(lease)

    async def replace(self, lease: Lease) -> Lease:
        self._must_answer()
        version = str(int(self.lease.version) + 1 if self.lease else 1)
        self.lease = Lease(lease.holder, lease.seconds, lease.transitions, lease.acquired, lease.renewed, version)
        return self.lease

    def _must_answer(self) -> None:
        if self.away:
            raise Unavailable(0, "Refused", "connection refused")


def one(store: Store) -> tuple[Leadership, Health, OperatorMetrics]:
    health, metrics = Health(), OperatorMetrics()
    return Leadership("me", Timing().scaled(0.05), store, Told(health, metrics)), health, metrics


def gauge(metrics: OperatorMetrics, name: str) -> float | None:
    return metrics.registry.get_sample_value(f"posttraining_{name}")


async def test_a_standby_is_ready_and_says_who_leads() -> None:
    standby, health, metrics = one(Store(Lease("other", 60, 4, version="1")))
    keeper = asyncio.create_task(standby.keep())
    while not health.ready:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert health.detail == "standing by: other leads"
    assert (gauge(metrics, "leader"), gauge(metrics, "lease_transitions")) == (0, 4)
    await standby.hand_over(keeper)


async def test_who_cannot_read_the_lease_is_not_ready() -> None:
    store = Store()
    store.away = True
    standby, health, metrics = one(store)
    keeper = asyncio.create_task(standby.keep())
    await asyncio.sleep(0.1)
    assert not health.ready
    assert (metrics.registry.get_sample_value("posttraining_lease_requests_total", {"result": "failed"}) or 0) > 0
    await standby.hand_over(keeper)


async def test_the_winner_leads_and_gives_the_lease_back() -> None:
    store = Store()
    leader, health, metrics = one(store)
    keeper = asyncio.create_task(leader.keep())
    await leader.won()
    assert not health.ready  # it leads and has not read its lists
    assert gauge(metrics, "leader") == 1
    await leader.hand_over(keeper)
    assert store.lease is not None
    assert store.lease.holder == ""


def kept(store: Store, leader: Leadership, keeper: asyncio.Task[None]) -> bool:
    """Whether the lease is still ours; ends `keeper`."""
    keeper.cancel()
    leader._watchdog.stop()  # or it ends the test
    return store.lease is not None and store.lease.holder == "me"


async def test_a_write_without_an_answer_keeps_the_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever follows waits until it has run out: the write may still arrive."""
    store = Store()
    leader, _, _ = one(store)
    monkeypatch.setattr(leadership, "DRAIN", 0.05)
    keeper = asyncio.create_task(leader.keep())
    await leader.won()
    leader.fence.before(Write("POST", "pods", "n", "x"))
    await leader.hand_over(keeper)
    assert kept(store, leader, keeper)


async def test_a_write_that_is_given_up_here_may_still_arrive_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watches fail while a write hangs: its worker is cancelled, which is no answer."""
    store = Store()
    leader, _, _ = one(store)
    monkeypatch.setattr(leadership, "DRAIN", 0.05)
    keeper = asyncio.create_task(leader.keep())
    await leader.won()
    write = Write("POST", "pods", "n", "x")
    leader.fence.before(write)
    assert not await leader.end_writing()
    leader.fence.after(write)
    await leader.hand_over(keeper)
    assert kept(store, leader, keeper)
