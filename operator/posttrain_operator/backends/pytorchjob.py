"""Backend PyTorchJob v1 (kubeflow.org/v1): a Master and N−1 Workers, each pod one launcher of the trainer.

`restartPolicy: ExitCode` and truthful exit codes make the training-operator decide what can be decided from one pod;
deadlines, retries and clean-up are ours, because its own do not work. After creation only `runPolicy.suspend` is ever
changed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from posttrain_operator.backends.owned import metadata
from posttrain_operator.backends.pod import StatusEndpoint, pod_template
from posttrain_operator.plan.types import Plan

API_VERSION = "kubeflow.org/v1"
KIND = "PyTorchJob"


def build(plan: Plan, status: StatusEndpoint | None) -> dict[str, Any]:
    """The child, named like the job. `status` None: the pods report nowhere."""
    nodes = plan.config.topology.nodes
    replicas = {"Master": _replica(1, pod_template(plan, status, metrics=True))}
    if nodes > 1:
        # Only the first pod fetches; the others have a use for the tokens of reward servers alone.
        others = replace(plan, secrets=plan.shared_secrets)
        replicas["Worker"] = _replica(nodes - 1, pod_template(others, status, metrics=False))
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": metadata(plan.config, plan.config.job.name, "trainer", plan.spec_hash),
        "spec": {
            "nprocPerNode": str(plan.config.topology.processes_per_node),
            "runPolicy": {"cleanPodPolicy": "Running", "suspend": False},
            "pytorchReplicaSpecs": replicas,
        },
    }


def _replica(count: int, template: dict[str, Any]) -> dict[str, Any]:
    return {"replicas": count, "restartPolicy": "ExitCode", "template": template}


def suspension(resource_version: str, suspend: bool) -> dict[str, Any]:
    """The only patch a child ever gets; refused where somebody else changed it meanwhile."""
    return {"metadata": {"resourceVersion": resource_version}, "spec": {"runPolicy": {"suspend": suspend}}}
