"""What each pod gets: world, resources, grace, environment, placement."""

from __future__ import annotations

from dataclasses import replace

import pytest

from posttrain_api import names
from posttrain_api.reasons import Reason
from posttrain_api.spec.fields import QUANTITY_PATTERN
from posttrain_operator.plan.errors import PlanError
from posttrain_operator.plan.quantities import read_quantity, write_bytes
from tests.api.rule_cases import PRETRAIN
from tests.controller.plan_kit import SETTINGS, plan

CPU = {"spec.resources": {"gpusPerNode": 0, "processesPerNode": 3}}


@pytest.mark.parametrize(
    ("said", "world", "pod"),
    [
        ({}, (1, 1, 1), ("8", "64Gi", "16Gi")),
        ({"nodes": 2, "gpusPerNode": 8}, (2, 8, 8), ("64", "512Gi", "16Gi")),
        ({"gpusPerNode": 0, "processesPerNode": 3}, (1, 3, 0), ("3", "6Gi", "1Gi")),
        ({"gpusPerNode": 0, "processesPerNode": 1, "memory": "1Gi"}, (1, 1, 0), ("1", "1Gi", "512Mi")),
        ({"cpu": "7500m", "memory": "20Gi"}, (1, 1, 1), ("7500m", "20Gi", "10Gi")),
        ({"cpu": 4, "memory": 34359738368, "sharedMemory": "1G"}, (1, 1, 1), ("4", "34359738368", "1G")),
    ],
)
def test_resources(said: dict[str, object], world: tuple[int, int, int], pod: tuple[str, str, str]) -> None:
    made = plan({"spec.resources": said})
    topology = made.config.topology
    assert (topology.nodes, topology.processes_per_node, topology.gpus_per_node) == world
    assert (made.resources.cpu, made.resources.memory, made.resources.shared_memory) == pod
    assert (made.resources.gpus, made.resources.gpu_resource_name) == (world[2], "nvidia.com/gpu")


def test_shared_memory_is_counted_in_memory() -> None:
    with pytest.raises(PlanError) as caught:
        plan({"spec.resources": {"memory": "8Gi", "sharedMemory": "8Gi"}})
    assert caught.value.reason == Reason.INVALID_SPEC
    assert "spec.resources.sharedMemory: must be less than memory (8Gi)" in str(caught.value)


def test_grace() -> None:
    assert plan().grace_seconds == 600
    assert plan({"spec.runPolicy": {"terminationGracePeriodSeconds": 5}}).grace_seconds == 5
    small = plan(PRETRAIN).grace_seconds
    assert 60 < small < 70, "60 s and what a small checkpoint takes"
    large = {
        "family": "Llama",
        "vocabSize": 128256,
        "hiddenSize": 4096,
        "intermediateSize": 14336,
        "layers": 32,
        "heads": 32,
        "kvHeads": 8,
    }
    seconds = plan({**PRETRAIN, "spec.model.scratch": large}).grace_seconds
    assert seconds == 60 + -(-8_030_261_248 * 16 // 10**8), "the parameters of Llama 3 8B, 16 bytes each, at 100 MB/s"
    assert plan(PRETRAIN).config.grace_seconds == small


def test_environment() -> None:
    env = plan().env
    assert env[names.ENV_CONFIG] == "/etc/posttrain/config/config.json"
    assert env[names.ENV_METRICS_PORT] == "9464"
    assert env["HOME"] == "/work"
    assert all(value.startswith("/work") for key, value in env.items() if key.endswith(("_HOME", "_DIR")))
    assert "DS_ACCELERATOR" not in env
    assert names.ENV_ALLOW_CPU not in env
    assert not [key for key in env if key.startswith(("PET_", "MASTER_"))]


def test_environment_on_the_cpu() -> None:
    env = plan({"spec.resources": {"gpusPerNode": 0, "processesPerNode": 2, "cpu": "5500m"}}).env
    assert (env["DS_ACCELERATOR"], env["OMP_NUM_THREADS"]) == ("cpu", "2")
    assert plan(CPU).env["OMP_NUM_THREADS"] == "1"


def test_platform_allows_the_cpu() -> None:
    assert plan(settings=replace(SETTINGS, allow_cpu=True)).env[names.ENV_ALLOW_CPU] == "true"


def test_users_environment_wins() -> None:
    env = plan({"spec.env": [{"name": "HF_HOME", "value": "/cache"}, {"name": "NCCL_DEBUG", "value": "WARN"}]}).env
    assert (env["HF_HOME"], env["NCCL_DEBUG"]) == ("/cache", "WARN")


def test_placement() -> None:
    place = plan(
        {
            "spec.resources": {
                "nodeSelector": {"a": "b"},
                "tolerations": [{"key": "k", "operator": "Exists", "tolerationSeconds": 3}],
                "priorityClassName": "high",
                "schedulerName": "other",
            },
            "spec.serviceAccountName": "trainer",
            "spec.imagePullSecrets": [{"name": "registry"}],
        }
    ).placement
    assert place.node_selector == {"a": "b"}
    assert place.tolerations == ({"key": "k", "operator": "Exists", "tolerationSeconds": 3},)
    assert (place.priority_class_name, place.scheduler_name) == ("high", "other")
    assert (place.service_account_name, place.image_pull_secrets) == ("trainer", ("registry",))


@pytest.mark.parametrize(
    ("text", "number"),
    [("8", 8), (8, 8), ("500m", 0.5), ("1.5Gi", 1.5 * 2**30), ("2k", 2000), ("1P", 10**15), ("3Mi", 3 * 2**20)],
)
def test_quantities(text: str | int, number: float) -> None:
    assert float(read_quantity(text)) == number


@pytest.mark.parametrize("text", ["", "x", "1 Gi", "-1", "1e3", "Gi"])
def test_not_quantities(text: str) -> None:
    with pytest.raises(ValueError, match="not a quantity"):
        read_quantity(text)


def test_every_unit_of_the_schema_is_read() -> None:
    units = QUANTITY_PATTERN.rpartition("(")[2].partition(")")[0].split("|")
    assert len(units) == 11
    assert all(read_quantity(f"1{unit}") > 0 for unit in units)


@pytest.mark.parametrize(("number", "text"), [(2**30, "1Gi"), (3 * 2**29, "1536Mi"), (1000, "1000"), (0, "0")])
def test_bytes_are_written_short(number: int, text: str) -> None:
    assert write_bytes(number) == text
