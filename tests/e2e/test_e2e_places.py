"""Pods that are not all there: the first one's image is late, or there is room for one of two. Here with the real
scheduler, and with the training-operator that makes pods again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from e2e_kit import Bench, job, stalled, step

pytestmark = [pytest.mark.e2e, pytest.mark.faults, pytest.mark.xdist_group("e2e")]
TRAINER, ANY = "posttrain-trainer:0.1.0", "devcluster/tools:dev"
GPUS = 8
"""Of each node."""


def until(found: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.3)
    return value


def waiting(bench: Bench, pod: str) -> str | None:
    """uid of the pod while its init container runs."""
    found = bench.find("pod", pod) or {}
    init = (found.get("status", {}).get("initContainerStatuses") or [{}])[0]
    return str(found["metadata"]["uid"]) if "running" in init.get("state", {}) else None


def test_a_worker_that_waits_in_vain_for_the_first_pod(bench: Bench) -> None:
    """Its init container is ended here, as it ends itself after a while; the training-operator makes it again."""
    seen = set()
    bench.cluster.ask("refuse-image", image=TRAINER)
    try:
        bench.apply(job("late", resources={"nodes": 2}))
        for _ in range(3):
            uid = until(lambda: (now := waiting(bench, "late-worker-0")) not in seen and now, "a worker that waits")
            seen.add(uid)
            bench.cluster.ask("kill", pod="late-worker-0", namespace=bench.namespace, container="init-pytorch")
        bench.until("late", stalled("ImagePullFailed"))
    finally:
        bench.cluster.ask("allow-image", image=TRAINER)
    status = bench.succeeded("late")
    assert status["attempts"] == 1, bench.story("late")
    assert "restarts" not in status
    assert not seen & set(status["attempt"]["podUIDs"])


@pytest.fixture
def impatient(reinstall: Callable[..., None]) -> Iterator[None]:
    """An operator that gives places back after ten seconds; it is the chart's own again for the tests after."""
    name, value = "POSTTRAIN_OPERATOR_HALF_PLACED_SECONDS", "10.0"
    reinstall(f"operator.extraEnv[0].name={name}", f"operator.extraEnv[0].value={value}")
    yield
    reinstall()


def holder(node: str, gpus: int) -> dict[str, Any]:
    container = {"name": "holds", "image": ANY, "command": ["sleep", "3600"]}
    container |= {"resources": {"limits": {"nvidia.com/gpu": str(gpus)}}}
    spec = {"nodeName": node, "containers": [container], "terminationGracePeriodSeconds": 1}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"on-{node}"}, "spec": spec}


def test_room_for_one_of_two(bench: Bench, impatient: None) -> None:
    nodes = [node["metadata"]["name"] for node in bench.items("node")]
    bench.apply(*(holder(node, GPUS - (node == nodes[0])) for node in nodes))
    bench.apply(job("halved", resources={"nodes": 2}))

    def has_retreated(status: dict[str, Any]) -> bool:
        return bool(status.get("restarts", {}).get("byCause", {}).get("Unschedulable"))

    status = bench.until("halved", has_retreated)
    assert "1 of 2 pods find no node" in status["message"] or "begins after" in status["message"], status
    until(lambda: not bench.pods("halved"), "no pods")
    bench.kubectl("delete", "pod", "--wait=false", *(f"on-{node}" for node in nodes))
    status = bench.succeeded("halved")
    assert status["restarts"]["total"] == 0, bench.story("halved")
    assert set(status["restarts"]["byCause"]) == {"Unschedulable"}
    until(lambda: step(bench.status("halved")) == 4, "the last report")
