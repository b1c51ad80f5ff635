"""Nodes that fall silent and pods that find none, on a real API server under the chart's rights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from operator_kit import NODE, Cluster, Operator, World, node_ready, operator, uid_of, utc_now, wait_for

from tests.cluster.test_operator_chain import sft
from tests.cluster.test_operator_flow import started

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("operator")]


@pytest.fixture(scope="module")
def running(plane: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    """One that gives places back after a second; all other times at a tenth."""
    with operator(plane, tmp_path_factory.mktemp("operator"), HALF_PLACED_SECONDS="10") as process:
        yield process


def condition(kind: str, status: str, **more: str) -> dict[str, Any]:
    return {"type": kind, "status": status, "lastTransitionTime": utc_now(), **more}


def patch(world: World, kind: str, name: str, *conditions: dict[str, Any], **status: Any) -> None:
    body = json.dumps({"status": {"conditions": list(conditions), **status}})
    world.kubectl("patch", kind, name, "--subresource=status", "--type=merge", "-p", body)


@pytest.fixture
def node(world: World) -> Iterator[str]:
    """The node of all pods that the tests make; it answers until told otherwise, and afterwards."""
    yield NODE
    node_ready(world.cluster, "True")


def test_pods_on_a_silent_node_are_given_up(running: Operator, world: World, node: str) -> None:
    master, worker = started(world)
    node_ready(world.cluster, "Unknown")
    for pod in (master, worker):
        patch(world, "pod", pod, condition("PodScheduled", "True"), condition("Ready", "False"))
    status = world.struck("job", "NodeLost")
    assert status["restarts"] == {"total": 0, "byCause": {"NodeLost": 1}}
    assert status["failure"]["node"] == node
    for pod in (master, worker):
        wait_for(lambda pod=pod: world.get("pod", pod) is None, f"{pod} to be deleted by force")
    node_ready(world.cluster, "True")
    for pod in world.pods("job"):
        world.run_pod(pod)
    assert world.until("job", state="Running")["attempts"] == 2


def test_a_half_placed_job_gives_its_place_back_and_comes_again(running: Operator, world: World, node: str) -> None:
    world.job("job")
    master, worker = world.pods("job")
    world.run_pod(master)
    blocked = condition("PodScheduled", "False", reason="Unschedulable", message="0/2 nodes are available")
    patch(world, "pod", worker, blocked)
    status = world.until("job", timeout=40, reason="Unschedulable", attempts=2)
    assert status["restarts"]["byCause"] == {"Unschedulable": 1}
    wait_for(lambda: world.child("job")["spec"]["runPolicy"]["suspend"], "the child to be suspended")
    for pod in (master, worker):
        world.vanish(pod)
    told = world.kubectl("get", "events.events.k8s.io", "-o", "json")
    reasons = [(event["reason"], event["type"]) for event in json.loads(told)["items"]]
    assert ("Unschedulable", "Warning") in reasons
    world.resumed("job")
    for pod in world.pods("job"):
        world.run_pod(pod)
    assert world.until("job", state="Running")["attempts"] == 2


def test_a_worker_that_waits_in_vain_for_the_first_pod_is_no_loss(running: Operator, world: World, node: str) -> None:
    """The init container of the training-operator gives up after 200 s, while the master still pulls its image."""
    world.job("job")
    master, worker = world.pods("job")
    for _ in range(2):
        wait_for(lambda: recorded(world) == uids(world, master, worker), "both pods to be recorded")
        gave_up = {"exitCode": 1, "reason": "Error", "finishedAt": utc_now(), "startedAt": utc_now()}
        init = {"name": "init-pytorch", "image": "alpine", "imageID": "", "restartCount": 0, "ready": False}
        placed = condition("PodScheduled", "True")
        init["state"] = {"terminated": gave_up}
        patch(world, "pod", worker, placed, phase="Failed", initContainerStatuses=[init])
        world.vanish(worker)
        wait_for(lambda: world.get("pod", worker) is None, "the worker to go")
        world.pod("job", "worker", 0)
    wait_for(lambda: recorded(world) == uids(world, master, worker), "both pods to be recorded")
    for pod in (master, worker):
        world.run_pod(pod)
    status = world.until("job", state="Running")
    assert status["attempts"] == 1
    assert "restarts" not in status


def recorded(world: World) -> set[str]:
    return set((world.status("job").get("attempt") or {}).get("podUIDs") or ())


def uids(world: World, *pods: str) -> set[str]:
    return {uid_of(world.get("pod", pod)) for pod in pods}


def test_a_job_that_is_made_again_remembers_its_parent(running: Operator, world: World, node: str) -> None:
    sft(world, best=False)
    world.until("sft", state="Succeeded")
    world.job("next", stage="SFT", lora={"continueAdapter": True}, model={"fromJob": {"name": "sft"}})
    world.until("next", reason="PodsMissing", timeout=40)
    before = world.get("configmap", "next-config")
    assert before is not None
    world.kubectl("delete", "ptj", "sft")
    old = world.child("next")["metadata"]["uid"]
    world.kubectl("delete", "pytorchjob", "next", "--wait=false")
    wait_for(lambda: world.child("next")["metadata"]["uid"] != old, "the child to be made again")
    assert world.get("configmap", "next-config") == before
