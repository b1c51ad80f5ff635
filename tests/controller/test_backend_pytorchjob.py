"""The child of one plan that uses everything, held word for word. POSTTRAIN_UPDATE_GOLDEN=1 writes it anew."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from posttrain_api import names
from posttrain_api.job import parse_job
from posttrain_operator.backends import configmaps, pytorchjob
from posttrain_operator.backends.pod import StatusEndpoint, pod_env
from posttrain_operator.plan.build import build_plan
from posttrain_operator.plan.types import Plan, PlanSettings

GOLDEN = Path(__file__).parent / "golden" / "pytorchjob.yaml"
STATUS = StatusEndpoint("https://posttrain-operator.posttrain-system.svc:10443")


def plan_of(**spec: Any) -> Plan:
    manifest = {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": "gsm8k", "namespace": "team-a", "uid": "0a4e7f52"},
        "spec": {
            "stage": "SFT",
            "model": {"uri": "hf://Qwen/Qwen2.5-0.5B-Instruct", "secretRef": {"name": "hf-token"}},
            "data": {
                "train": [{"uri": "pvc://datasets/gsm8k/train.jsonl"}, {"uri": "pvc://runs/more.jsonl"}],
                "eval": [{"uri": "configmap://small/rows.jsonl"}],
            },
            "lora": {"rank": 16},
            "storage": {"claimName": "runs"},
            "resources": {
                "nodes": 3,
                "gpusPerNode": 8,
                "nodeSelector": {"pool": "gpu"},
                "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
                "priorityClassName": "high",
            },
            "imagePullSecrets": [{"name": "registry"}],
            "env": [{"name": "NCCL_DEBUG", "value": "WARN"}],
            **spec,
        },
    }
    return build_plan(parse_job(manifest), PlanSettings(trainer_image="registry.example.com/trainer:1"), {})


def pod_of(child: dict[str, Any], role: str = "Master") -> dict[str, Any]:
    template: dict[str, Any] = child["spec"]["pytorchReplicaSpecs"][role]["template"]
    return template


def test_the_child_word_for_word() -> None:
    child = pytorchjob.build(replace(plan_of(), spec_hash="sha256:of-the-plan"), STATUS)
    text = yaml.safe_dump(child, sort_keys=False, width=120)
    if os.environ.get("POSTTRAIN_UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_one_node_has_no_worker() -> None:
    child = pytorchjob.build(plan_of(resources={"nodes": 1, "gpusPerNode": 8}), STATUS)
    assert list(child["spec"]["pytorchReplicaSpecs"]) == ["Master"]


def test_what_the_training_operator_and_its_webhook_demand() -> None:
    child = pytorchjob.build(plan_of(), STATUS)
    assert child["spec"]["nprocPerNode"] == "8"
    assert set(child["spec"]["runPolicy"]) == {"cleanPodPolicy", "suspend"}
    for role, count in (("Master", 1), ("Worker", 2)):
        replica = child["spec"]["pytorchReplicaSpecs"][role]
        assert (replica["replicas"], replica["restartPolicy"]) == (count, "ExitCode")
        container = replica["template"]["spec"]["containers"][0]
        assert container["name"] == "pytorch"
        assert {"name": "pytorchjob-port", "containerPort": 23456, "protocol": "TCP"} in container["ports"]
        set_by_it = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
        assert not [e for e in container["env"] if e["name"] in set_by_it or e["name"].startswith("PET_")]
        assert "readinessProbe" not in container


def test_only_the_master_is_scraped() -> None:
    child = pytorchjob.build(plan_of(), STATUS)
    assert pod_of(child)["metadata"]["labels"][names.LABEL_METRICS] == "true"
    assert names.LABEL_METRICS not in pod_of(child, "Worker")["metadata"]["labels"]


def test_only_the_storage_is_mounted_to_write() -> None:
    container = pod_of(pytorchjob.build(plan_of(), STATUS))["spec"]["containers"][0]
    writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {"/storage", "/work", "/tmp", "/dev/shm"}


def test_only_the_first_pod_which_fetches_gets_the_secrets() -> None:
    child = pytorchjob.build(plan_of(), STATUS)
    mounted = {
        role: [
            volume["secret"]["secretName"] for volume in pod_of(child, role)["spec"]["volumes"] if "secret" in volume
        ]
        for role in ("Master", "Worker")
    }
    assert mounted == {"Master": ["hf-token"], "Worker": []}


def test_data_on_the_job_s_own_claim_is_mounted_beside_it() -> None:
    spec = pod_of(pytorchjob.build(plan_of(), STATUS))["spec"]
    paths = {mount["mountPath"]: mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
    assert paths["/claims/runs"] == paths["/storage"]
    names_of_volumes = [volume["name"] for volume in spec["volumes"]]
    assert len(names_of_volumes) == len(set(names_of_volumes))


def test_without_a_status_server_nothing_of_it_is_there() -> None:
    child = pytorchjob.build(plan_of(), None)
    spec = pod_of(child)["spec"]
    assert "status" not in {volume["name"] for volume in spec["volumes"]}
    assert not [e for e in pod_env(plan_of(), None) if e["name"] in (names.ENV_STATUS_URL, names.ENV_KUBEFLOW_URL)]


def test_the_configuration_is_immutable_and_owned() -> None:
    plan = plan_of()
    made = configmaps.config_map(plan)
    assert made["immutable"] is True
    assert made["metadata"]["ownerReferences"][0]["uid"] == "0a4e7f52"
    assert made["metadata"]["annotations"][names.ANNOTATION_SPEC_HASH] == plan.spec_hash
    assert made["data"] == {names.CONFIG_FILE: plan.config.to_json()}
