"""`checkpoint.staging`: what it adds to the pods and to the trainer's configuration, and that no other job changes."""

from __future__ import annotations

from typing import Any

import pytest
from model_cluster import running_cluster
from test_backend_pytorchjob import STATUS, plan_of

from posttrain_operator.backends import pytorchjob, trainjob
from posttrain_operator.plan.types import Plan

Json = dict[str, Any]
BACKENDS = ("PyTorchJob", "TrainJob")


def pods_of(plan: Plan, backend: str) -> dict[str, Json]:
    """The pod's spec of each kind of replica."""
    if backend == "PyTorchJob":
        replicas = pytorchjob.build(plan, STATUS)["spec"]["pytorchReplicaSpecs"]
        return {role: replica["template"]["spec"] for role, replica in replicas.items()}
    (runtime,) = trainjob.before(plan, STATUS)
    jobs = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    return {job["name"]: job["template"]["spec"]["template"]["spec"] for job in jobs}


def mounts_of(pod: Json) -> list[tuple[str, str]]:
    """Name and path, in the order in which they are mounted."""
    return [(mount["name"], mount["mountPath"]) for mount in pod["containers"][0]["volumeMounts"]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_is_a_volume_of_every_pod_inside_the_work_folder(backend: str) -> None:
    pods = pods_of(plan_of(checkpoint={"staging": "Memory"}), backend)
    assert len(pods) == 2
    for role, pod in pods.items():
        assert {"name": "staging", "emptyDir": {"medium": "Memory"}} in pod["volumes"], role
        mounts = mounts_of(pod)
        assert mounts.index(("work", "/work")) < mounts.index(("staging", "/work/staging")), role


@pytest.mark.parametrize("backend", BACKENDS)
def test_disk_is_a_part_of_the_work_folder_that_is_there(backend: str) -> None:
    assert pods_of(plan_of(checkpoint={"staging": "Disk"}), backend) == pods_of(plan_of(), backend)


@pytest.mark.parametrize("said", ["Disk", "Memory"])
def test_the_trainer_is_told(said: str) -> None:
    assert plan_of(checkpoint={"staging": said}).config.to_wire()["checkpoint"]["staging"] == said


def test_a_job_that_does_not_say_it_has_the_configuration_and_the_pods_of_before() -> None:
    """Its digest is that of a running job that an operator without this field has planned."""
    plan = plan_of()
    assert plan.config.to_wire()["checkpoint"] == {"everySeconds": 1800, "keepLast": 2, "resume": "Auto"}
    for backend in BACKENDS:
        assert all("staging" not in dict(mounts_of(pod)) for pod in pods_of(plan, backend).values())


@pytest.mark.parametrize("said", [{}, {"staging": "Disk"}, {"staging": "Memory"}])
def test_the_status_says_what_holds(said: Json) -> None:
    resolved = running_cluster(checkpoint=said).status["resolved"]["checkpoint"]
    assert {key: value for key, value in resolved.items() if key == "staging"} == said
