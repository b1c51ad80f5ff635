"""The objects of the operator's benchmark and of its soak: jobs, and what kubelet and training-operator make of them.

Pure: manifests in, manifests out. The shapes are those that the real controllers were seen to write.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from posttrain_api import names
from posttrain_api.records import Checkpoint, Output, Success, render_termination

Obj = dict[str, Any]
JOBS = f"/apis/{names.API_VERSION}/namespaces/{{}}/{names.PLURAL}"
CHILDREN = "/apis/kubeflow.org/v1/namespaces/{}/pytorchjobs"
PODS = "/api/v1/namespaces/{}/pods"
CONFIG_MAPS = "/api/v1/namespaces/{}/configmaps"
MANAGED = {"labelSelector": f"{names.LABEL_MANAGED_BY}={names.MANAGED_BY}"}
NODE = "node-a"
_LABEL = "training.kubeflow.org/"


def now() -> str:
    """This second, as Kubernetes writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def job(name: str, namespace: str, **spec: Any) -> Obj:
    """A PostTrainingJob of two nodes on the claim `runs`; `spec` overrides fields."""
    shape = {"family": "Llama", "vocabSize": 512, "hiddenSize": 64, "layers": 2, "heads": 4}
    base: Obj = {
        "stage": "Pretrain",
        "model": {"scratch": shape},
        "data": {"train": [{"uri": "pvc://runs/corpus.jsonl"}]},
        "storage": {"claimName": "runs"},
        "resources": {"nodes": 2, "gpusPerNode": 0, "processesPerNode": 1},
    }
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": name, "namespace": namespace},
        "spec": {**base, **spec},
    }


def claim(name: str) -> Obj:
    """A claim that nobody binds: the operator only wants it to exist."""
    spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": spec}


def replicas(child: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """(role in small letters, index) of every pod that a PyTorchJob wants, the master first."""
    for role, replica in sorted(child["spec"]["pytorchReplicaSpecs"].items()):
        for index in range(replica["replicas"]):
            yield role.lower(), index


def pod_name(child: Mapping[str, Any], role: str, index: int) -> str:
    """As the training-operator names it."""
    return f"{child['metadata']['name']}-{role}-{index}"


def pod_of(child: Mapping[str, Any], role: str, index: int) -> Obj:
    """The pod that the training-operator makes of a template, placed at once."""
    meta = child["metadata"]
    template = child["spec"]["pytorchReplicaSpecs"][role.capitalize()]["template"]
    marks = {
        f"{_LABEL}job-name": meta["name"],
        f"{_LABEL}replica-type": role,
        f"{_LABEL}replica-index": str(index),
    }
    owner = {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "name": meta["name"], "uid": meta["uid"]}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": pod_name(child, role, index),
            "namespace": meta["namespace"],
            "labels": {**template["metadata"]["labels"], **marks},
            "ownerReferences": [{**owner, "controller": True, "blockOwnerDeletion": True}],
        },
        "spec": {**template["spec"], "restartPolicy": "Never", "nodeName": NODE},
    }


def running() -> Obj:
    """A patch of a pod's status: its container runs and is ready."""
    state = {"state": {"running": {"startedAt": now()}}, "ready": True, "started": True}
    return _pod_status("Running", state, ready=True)


def ended(code: int, message: str = "", reason: str = "") -> Obj:
    """A patch of a pod's status: its container ended with `code`."""
    word = reason or ("Completed" if code == 0 else "Error")
    told = {"exitCode": code, "reason": word, "message": message, "startedAt": now(), "finishedAt": now()}
    state = {"state": {"terminated": told}, "ready": False, "started": False}
    return _pod_status("Succeeded" if code == 0 else "Failed", state, ready=False)


def _pod_status(phase: str, container: Mapping[str, Any], ready: bool) -> Obj:
    moment = now()
    conditions = [
        {"type": "PodScheduled", "status": "True", "lastTransitionTime": moment},
        {"type": "PodReadyToStartContainers", "status": "True", "lastTransitionTime": moment},
        {"type": "Ready", "status": str(ready), "lastTransitionTime": moment},
    ]
    status = {"name": names.CONTAINER, "image": "trainer", "imageID": "", "restartCount": 0, **container}
    return {"status": {"phase": phase, "conditions": conditions, "containerStatuses": [status]}}


def condition(kind: str, status: str = "True") -> Obj:
    """One condition of a PyTorchJob."""
    moment = now()
    return {
        "type": kind,
        "status": status,
        "reason": f"PyTorchJob{kind}",
        "message": f"PyTorchJob is {kind.lower()}.",
        "lastTransitionTime": moment,
        "lastUpdateTime": moment,
    }


def child_status(*conditions: Obj) -> Obj:
    """A merge patch of a PyTorchJob's status."""
    return {"status": {"conditions": list(conditions), "replicaStatuses": {}}}


def holds(child: Mapping[str, Any], kind: str) -> bool:
    """Whether a condition of a PyTorchJob is True."""
    found = (child.get("status") or {}).get("conditions") or ()
    return any(each["type"] == kind and each["status"] == "True" for each in found)


def success(step: int = 12) -> str:
    """Rank 0's record of a run that ended well."""
    output = Output(uri="pvc://runs/out", digest="sha256:aa", format="safetensors", size_bytes=5)
    saved = Checkpoint(step=step, time=now(), uri="pvc://runs/saved", size_bytes=9, digest="sha256:bb")
    return render_termination(Success(output=output, step=step, checkpoint=saved))
