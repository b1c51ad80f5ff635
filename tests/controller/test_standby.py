"""The status server of a replica that watches nothing: it asks for the one job and the one pod of a report."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from posttrain_api import names
from posttrain_operator.cache import Cache
from posttrain_operator.cluster.errors import Unavailable
from posttrain_operator.cluster.kinds import JOB, Kind
from posttrain_operator.slim import job_record
from posttrain_operator.standby import FRESH, ReplicaView

POD = ("job-master-0", "pod-1")


def job(uid: str = "job-1", **status: Any) -> dict[str, Any]:
    metadata = {"name": "job", "namespace": "team", "uid": uid, "resourceVersion": "5", "generation": 1}
    return {"metadata": metadata, "spec": {"stage": "SFT"}, "status": status}


def pod(uid: str = "pod-1") -> dict[str, Any]:
    labels = {names.LABEL_JOB_NAME: "job", names.LABEL_JOB_UID: "job-1", names.LABEL_MANAGED_BY: names.MANAGED_BY}
    owner = {"kind": "PyTorchJob", "name": "job", "uid": "c", "controller": True, "apiVersion": "kubeflow.org/v1"}
    metadata = {"name": "job-master-0", "namespace": "team", "uid": uid, "resourceVersion": "6", "labels": labels}
    return {"metadata": {**metadata, "ownerReferences": [owner]}, "spec": {}, "status": {}}


class Asked:
    """What the API server has, and what it was asked."""

    def __init__(self) -> None:
        self.job: dict[str, Any] | None = job()
        self.pod: dict[str, Any] | None = pod()
        self.asked: list[str] = []
        self.away = False

    async def get(self, kind: Kind, _namespace: str, _name: str) -> dict[str, Any] | None:
        await asyncio.sleep(0)
        if self.away:
            raise Unavailable(0, "Refused", "away")
        self.asked.append(kind.kind)
        return self.job if kind is JOB else self.pod


class Scene:
    def __init__(self) -> None:
        self.cluster, self.cache, self.complete, self.now = Asked(), Cache(), False, 0.0
        self.view = ReplicaView(self.cluster, self.cache, lambda: self.complete, lambda: self.now)  # type: ignore[arg-type]

    async def look(self, uid: str = POD[1]) -> frozenset[str]:
        await self.view.look("team", "job", (POD[0], uid))
        return self.view.pod_uids("team", "job")


async def test_a_report_to_a_standby_is_looked_up_once() -> None:
    scene = Scene()
    assert await scene.look() == {"pod-1"}
    found = scene.view.job("team", "job")
    assert found is not None
    assert (found.uid, found.resource_version) == ("job-1", "5")
    for _ in range(3):
        await scene.look()
    assert scene.cluster.asked == ["PostTrainingJob", "Pod"]


async def test_reports_that_come_together_ask_once() -> None:
    scene = Scene()
    assert await asyncio.gather(*(scene.look() for _ in range(5))) == [frozenset({"pod-1"})] * 5
    assert scene.cluster.asked == ["PostTrainingJob", "Pod"]


async def test_answers_grow_old() -> None:
    scene = Scene()
    await scene.look()
    scene.cluster.job, scene.now = None, FRESH
    assert await scene.look() == frozenset()
    assert scene.view.job("team", "job") is None


async def test_a_new_pod_of_an_old_name_is_asked_for_at_once() -> None:
    scene = Scene()
    await scene.look()
    scene.cluster.pod = pod("pod-2")
    assert "pod-2" in await scene.look("pod-2")


async def test_a_pod_that_is_not_the_jobs_does_not_become_it() -> None:
    scene = Scene()
    scene.cluster.pod = {"metadata": {"name": "x", "namespace": "team", "uid": "pod-9", "resourceVersion": "1"}}
    assert await scene.look("pod-9") == frozenset()


async def test_a_complete_cache_needs_no_question() -> None:
    scene = Scene()
    await scene.look()
    scene.complete = True
    scene.cache.put_job(job_record(job("job-2")))
    await scene.look()
    found = scene.view.job("team", "job")
    assert found is not None
    assert found.uid == "job-2"
    assert len(scene.cluster.asked) == 2


async def test_no_answer_is_an_error_and_is_not_remembered() -> None:
    scene = Scene()
    scene.cluster.away = True
    with pytest.raises(Unavailable):
        await scene.look()
    scene.cluster.away = False
    assert await scene.look() == {"pod-1"}
