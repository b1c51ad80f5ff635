"""The comparison of the cache with the cluster: what no watch told is dropped, and a dead watch ends the process."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from posttrain_operator.cache import Cache
from posttrain_operator.cluster import Cluster
from posttrain_operator.cluster.errors import Unavailable
from posttrain_operator.cluster.kinds import JOB, PYTORCHJOB
from posttrain_operator.records import Key
from posttrain_operator.resync import Diverged, Lists, compare_forever
from posttrain_operator.settings import Timing
from posttrain_operator.slim import child_record, job_record
from posttrain_operator.watch import Streams
from posttrain_operator.workqueue import Backoff, WorkQueue

TIMING = Timing().scaled(0.0001)
JOBS, CHILDREN = "/apis/posttrain.dev/v1alpha1/posttrainingjobs", "/apis/kubeflow.org/v1/pytorchjobs"
Json = dict[str, Any]


def meta(name: str, uid: str, version: str = "1") -> Json:
    return {"namespace": "ns", "name": name, "uid": uid, "resourceVersion": version}


class Api:
    """Lists what it is told to."""

    def __init__(self) -> None:
        self.lists: dict[str, list[Json]] = {"posttrainingjobs": [], "pytorchjobs": []}
        self.away = False

    async def request(self, method: str, path: str, **_: Any) -> Json:
        if self.away:
            raise Unavailable(503, "", "away")
        return {"items": [{"metadata": each} for each in self.lists[path.rpartition("/")[2]]], "metadata": {}}


class Rig:
    def __init__(self) -> None:
        self.api, self.cache, self.told = Api(), Cache(), list[tuple[str, str, int]]()
        self.queue: WorkQueue[Key] = WorkQueue(Backoff(1, 1))
        self.streams = Streams()
        self.streams.lives = {JOBS: 1, CHILDREN: 2}
        cluster = Cluster(self.api)  # type: ignore[arg-type]
        self.lists = Lists(cluster, self.cache, self.streams, (JOB, PYTORCHJOB), ())

    def put_job(self, name: str, uid: str, version: str = "1", parent: str = "") -> None:
        spec = {"model": {"fromJob": {"name": parent}}} if parent else {}
        self.cache.put_job(job_record({"metadata": meta(name, uid, version), "spec": spec}))

    def put_child(self, name: str, uid: str) -> None:
        self.cache.put_child(child_record({"metadata": meta(name, uid)}))

    async def compare(self, seconds: float = 0.3) -> None:
        """Compares some three times."""
        run = compare_forever(self.lists, self.cache, self.queue, TIMING, lambda *each: self.told.append(each))
        async with asyncio.timeout(seconds):
            await run


async def compared(rig: Rig) -> None:
    with pytest.raises(TimeoutError):
        await rig.compare()


async def test_a_deletion_that_no_watch_told_is_found() -> None:
    """The child and the parent are gone: their own job, and the one that waits for the parent, are looked at."""
    rig = Rig()
    rig.put_job("job", "j1")
    rig.put_child("job", "c1")
    rig.put_job("parent", "p1")
    rig.put_job("waits", "w1", parent="parent")
    rig.api.lists["posttrainingjobs"] = [meta("job", "j1"), meta("waits", "w1")]
    await compared(rig)
    assert set(rig.cache.jobs) == {Key("ns", "job"), Key("ns", "waits")}
    assert rig.cache.children(Key("ns", "job")) == ()
    looked_at = {await rig.queue.get() for _ in range(len(rig.queue))}
    assert looked_at == {Key("ns", "job"), Key("ns", "parent"), Key("ns", "waits")}
    assert ("PyTorchJob", "lost", 1) in rig.told
    assert ("PostTrainingJob", "lost", 1) in rig.told


async def test_a_watch_that_is_a_moment_late_is_no_divergence() -> None:
    """Gone and deleted, made and told: both while the comparison waits."""
    rig = Rig()
    rig.put_job("gone", "g1")
    rig.api.lists["posttrainingjobs"] = [meta("new", "n1")]
    comparison = asyncio.create_task(rig.lists.compare(0.2))
    await asyncio.sleep(0.05)
    rig.cache.drop_job(Key("ns", "gone"), "g1")
    rig.put_job("new", "n1")
    found = await comparison
    assert found.lost == ()
    assert not any(found.behind.values())


@pytest.mark.parametrize("version", [None, "1"])
async def test_a_cache_that_stays_behind_ends_the_process(version: str | None) -> None:
    """An object that was never told, or one whose change was not."""
    rig = Rig()
    if version:
        rig.put_job("job", "j1", version)
    rig.api.lists["posttrainingjobs"] = [meta("job", "j1", "2")]
    with pytest.raises(Diverged):
        await rig.compare(5)
    assert rig.told.count(("PostTrainingJob", "behind", 1)) == 2


async def test_a_stream_that_is_opened_again_is_late_and_not_dead() -> None:
    """It is not open; it was opened while the comparison waited. Once it stays open, it counts."""
    rig = Rig()
    rig.api.lists["posttrainingjobs"] = [meta("job", "j1", "2")]
    del rig.streams.lives[JOBS]
    assert (await rig.lists.compare(0)).reopened == {JOB}
    rig.streams.lives[JOBS] = 1
    comparison = asyncio.create_task(rig.lists.compare(0.1))
    await asyncio.sleep(0.01)
    rig.streams.lives[JOBS] = 3
    assert (await comparison).reopened == {JOB}
    assert (await rig.lists.compare(0)).reopened == frozenset()


@pytest.mark.parametrize(("open_", "times"), [(True, 2), (False, 6)])
async def test_how_often_running_it_may_be_behind(open_: bool, times: int) -> None:
    """Once less, then not behind, then for good."""
    rig = Rig()
    rig.api.lists["posttrainingjobs"] = behind = [meta("job", "j1", "2")]
    if not open_:
        del rig.streams.lives[JOBS]

    def told(kind: str, problem: str, objects: int) -> None:
        rig.told.append((kind, problem, objects))
        done = len(rig.told) // 4  # a comparison tells four times
        rig.api.lists["posttrainingjobs"] = [] if done == times - 1 else behind

    with pytest.raises(Diverged, match="1 of PostTrainingJob"):
        async with asyncio.timeout(30):
            await compare_forever(rig.lists, rig.cache, rig.queue, TIMING, told)
    assert [objects for kind, problem, objects in rig.told if (kind, problem) == ("PostTrainingJob", "behind")] == [
        *[1] * (times - 1),
        0,
        *[1] * times,
    ]


async def test_one_kind_and_then_another_is_not_twice_running() -> None:
    rig = Rig()
    names = ("posttrainingjobs", "pytorchjobs")

    def told(_kind: str, _problem: str, _objects: int) -> None:
        behind = names[len(rig.told) // 4 % 2]  # a comparison tells four times
        rig.told.append((_kind, _problem, _objects))
        for name in names:
            rig.api.lists[name] = [meta("job", "j1", "2")] if name == behind else []

    run = compare_forever(rig.lists, rig.cache, rig.queue, TIMING, told)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await run
    assert {kind for kind, problem, objects in rig.told if objects} == {"PostTrainingJob", "PyTorchJob"}


async def test_an_api_server_that_is_away_is_no_verdict() -> None:
    rig = Rig()
    rig.put_job("job", "j1")
    rig.api.away = True
    await compared(rig)
    assert Key("ns", "job") in rig.cache.jobs
    assert rig.told == []
