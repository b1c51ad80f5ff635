"""A spec that was understood is not understood again a moment later; anything that it was made from makes it anew."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from model_cluster import PLAN, Cluster

from posttrain_operator.cache import Cache
from posttrain_operator.facts import Intent, JobFacts
from posttrain_operator.findings import Findings, Recent
from posttrain_operator.observe import Observer
from posttrain_operator.settings import Settings, Timing
from posttrain_operator.slim import job_record

PARENT = {"fromJob": {"name": "parent"}}


class Looks:
    """An observer of one job, whose parent is in the cache when told."""

    def __init__(self, model: Cluster) -> None:
        self.model, self.cache = model, Cache()
        settings = Settings(namespace="sys", plan=PLAN, timing=Timing())
        cluster: Any = SimpleNamespace()
        self._observer = Observer(cluster, self.cache, Findings(60, lambda: 0.0), settings, lambda: None)

    async def intent(self) -> Intent:
        record = job_record(self.model.job)
        return await self._observer._intent(record, JobFacts.of(record))


async def test_a_status_write_changes_nothing() -> None:
    looks = Looks(Cluster())
    first = await looks.intent()
    looks.model.report(phase="Training", step=3)
    assert await looks.intent() is first


@pytest.mark.parametrize("change", ["edit", "made again"])
async def test_another_spec_or_another_job(change: str) -> None:
    looks = Looks(Cluster())
    first = await looks.intent()
    if change == "edit":
        looks.model.edit(resources={"nodes": 1, "gpusPerNode": 0, "processesPerNode": 1})
    else:
        looks.model.job["metadata"]["uid"] = "another"
    second = await looks.intent()
    assert first.plan is not None
    assert second.plan is not None
    assert second.plan.spec_hash != first.plan.spec_hash


async def test_a_parent_that_comes_and_fails() -> None:
    looks = Looks(Cluster(stage="SFT", model=PARENT, tuning="Full"))
    assert "does not exist" in ((await looks.intent()).waiting or "")
    parent = Cluster()
    parent.job["metadata"]["name"] = "parent"
    looks.cache.put_job(job_record(parent.job))
    assert "does not exist" not in ((await looks.intent()).waiting or "")
    parent.job["status"] = {"conditions": [{"type": "Failed", "status": "True"}], "reason": "StorageFull"}
    parent.job["metadata"]["resourceVersion"] = "999999"
    looks.cache.put_job(job_record(parent.job))
    assert (await looks.intent()).failure is not None


def test_only_so_many_are_kept() -> None:
    recent: Recent[int, str] = Recent(60, lambda: 0.0, most=3)
    for key in (0, 1, 2, 0, 3):
        recent.put(key, str(key))
    assert [recent.get(key) for key in range(4)] == ["0", None, "2", "3"]
