"""Backend PyTorchJob v1 (kubeflow.org/v1): a Master and N−1 Workers, each pod one launcher of the trainer.

`restartPolicy: ExitCode` and truthful exit codes make the training-operator decide what can be decided from one pod;
deadlines, retries and clean-up are ours, because its own do not work. After creation only `runPolicy.suspend` is ever
changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from posttrain_operator.backends.owned import controlled_by, metadata
from posttrain_operator.backends.pod import StatusEndpoint, pod_template
from posttrain_operator.plan.types import Plan
from posttrain_operator.records import ChildRecord, Seat

API_VERSION = "kubeflow.org/v1"
KIND = "PyTorchJob"
INSTALL = "the Kubeflow training-operator"
AWAITS_FIRST = True
_ROLE = "training.kubeflow.org/replica-type"
_INDEX = "training.kubeflow.org/replica-index"


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


def before(plan: Plan, status: StatusEndpoint | None) -> tuple[dict[str, Any], ...]:
    """Nothing: a PyTorchJob says all of itself."""
    return ()


def left(job: str, spec_hash: str) -> tuple[tuple[str, str], ...]:
    """Nothing."""
    return ()


def refusal(plan: Plan) -> str | None:
    """Whatever the API takes can run."""
    return None


def suspension(resource_version: str, suspend: bool) -> dict[str, Any]:
    """See Backend."""
    return {"metadata": {"resourceVersion": resource_version}, "spec": {"runPolicy": {"suspend": suspend}}}


def suspended(child: Mapping[str, Any]) -> bool:
    """See Backend."""
    return bool(((child.get("spec") or {}).get("runPolicy") or {}).get("suspend"))


def condition(kind: str) -> str:
    """A PyTorchJob's own names are the ones used here."""
    return kind


def seat(pod: Mapping[str, Any], job: str) -> Seat | None:
    """By the training-operator's labels."""
    marks = pod["metadata"].get("labels") or {}
    role, index, owned = marks.get(_ROLE), marks.get(_INDEX), controlled_by(pod["metadata"], KIND, job)
    if role is None and not owned:
        return None
    number = int(index) if isinstance(index, str) and index.isdigit() else 0
    return Seat((role or "worker").capitalize(), number, owned)


def told_by(child: ChildRecord) -> tuple[str, ...]:
    """The training-operator tells it of the PyTorchJob."""
    return (f"involvedObject.uid={child.uid}",)


def unmade(reason: str) -> bool:
    """See Backend."""
    return reason.startswith("FailedCreate")


def unseen(message: str) -> bool:
    """Nothing is made before it."""
    return False
