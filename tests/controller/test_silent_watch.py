"""A watch that stands still must not turn a success into a failure: before it decides, the operator looks itself."""

from __future__ import annotations

from typing import Any

import pytest
from model_cluster import PLAN, running_cluster
from model_cluster import Cluster as Model
from reconcile_kit import SUCCESS

from posttrain_operator.cache import Cache
from posttrain_operator.cluster import Cluster
from posttrain_operator.facts import JobFacts
from posttrain_operator.findings import Findings
from posttrain_operator.observe import Observer
from posttrain_operator.reconcile.core import reconcile
from posttrain_operator.settings import Settings, Timing
from posttrain_operator.slim import child_record, job_record, pod_record


class Api:
    """Lists the pods that there are now, and counts how often it was asked."""

    def __init__(self, pods: list[dict[str, Any]]) -> None:
        self.pods, self.asked = pods, 0

    async def request(self, method: str, path: str, **_: Any) -> dict[str, Any]:
        assert (method, path) == ("GET", "/api/v1/namespaces/ns/pods")
        self.asked += 1
        return {"items": self.pods}


def _ended_unseen(model: Model) -> tuple[Cache, Api]:
    """The master has succeeded and its child says so; the cache has its pods from when they ran."""
    cache = Cache()
    owner = {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "name": "job", "controller": True}
    for pod in model.pods.values():
        pod["metadata"]["ownerReferences"] = [owner]
        record = pod_record(pod)
        assert record is not None
        cache.put_pod(record)
    model.end(model.uid("master"), 0, SUCCESS)
    model.training_operator()
    assert model.child is not None
    cache.put_job(job_record(model.job))
    cache.put_child(child_record(model.child))
    return cache, Api(list(model.pods.values()))


@pytest.mark.parametrize(("seconds", "asked", "state"), [(1, 0, "Running"), (60, 1, "Succeeded")])
async def test_an_end_that_no_watch_told_is_looked_up(seconds: int, asked: int, state: str) -> None:
    model = running_cluster()
    cache, api = _ended_unseen(model)
    model.pass_time(seconds)
    settings = Settings(namespace="sys", plan=PLAN, timing=Timing())
    observer = Observer(Cluster(api), cache, Findings(60, lambda: 0.0), settings, lambda: None)  # type: ignore[arg-type]
    record = cache.jobs[next(iter(cache.jobs))]
    job = JobFacts.of(record)
    actions = reconcile(job, await observer.observe(record, job, model.now), model.now)
    assert api.asked == asked
    found = (actions.status or job.status)["state"]
    assert found == ("Initializing" if state == "Running" else state), actions.status
