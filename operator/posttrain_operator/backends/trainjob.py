"""Backend TrainJob v2 (trainer.kubeflow.org/v1alpha1): Kubeflow Trainer makes a JobSet of it, JobSet two batch Jobs,
`m` with the first pod and `w` with the others.

A TrainJob takes its pods from a TrainingRuntime and can change little of them (no priority, no scheduler, the same
for all pods), so each job brings a runtime of its own, whose name says its content. The exit codes are judged by
JobSet: a Job that fails for a code of 1–127 fails the set, one that fails otherwise restarts all of it, as often as
it takes: the budget of restarts is ours. PET_* are set here, because the first pod has a template of its own, which
alone has the secrets; Trainer's torch policy knows one template.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from posttrain_api import names
from posttrain_operator.backends.owned import controlled_by, labels, metadata
from posttrain_operator.backends.pod import StatusEndpoint, field_env, pod_template
from posttrain_operator.plan.types import Plan
from posttrain_operator.records import ChildRecord, Seat

API_VERSION = "trainer.kubeflow.org/v1alpha1"
KIND = "TrainJob"
RUNTIME = "TrainingRuntime"
INSTALL = "Kubeflow Trainer v2 and JobSet"
AWAITS_FIRST = False
FIRST, OTHERS = "m", "w"
"""Short, because a pod is called <job>-<this>-0-<index>-<5 letters> and JobSet takes no more than 63 characters."""
NAME_LIMIT = 63
_REPLICATED = "jobset.sigs.k8s.io/replicatedjob-name"
_INDEX = "batch.kubernetes.io/job-completion-index"
_PERMANENT = {"containerName": names.CONTAINER, "operator": "In", "values": list(range(1, 128))}
_UNMADE = ("FailedCreate", "TrainJobResourcesCreationFailed", "JobCreationFailed", "HeadlessServiceCreationFailed")


def build(plan: Plan, status: StatusEndpoint | None) -> dict[str, Any]:
    """The child, named like the job; all of its pods are in the runtime."""
    runtime = runtime_name(plan.config.job.name, plan.spec_hash)
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": metadata(plan.config, plan.config.job.name, "trainer", plan.spec_hash),
        "spec": {
            "runtimeRef": {"apiGroup": API_VERSION.rpartition("/")[0], "kind": RUNTIME, "name": runtime},
            "suspend": False,
        },
    }


def before(plan: Plan, status: StatusEndpoint | None) -> tuple[dict[str, Any], ...]:
    """The runtime: the JobSet with its policies and pods."""
    nodes = plan.config.topology.nodes
    jobs = [_replicated(plan, FIRST, 1, pod_template(plan, status, metrics=True))]
    if nodes > 1:
        # Only the first pod fetches; the others have a use for the tokens of reward servers alone.
        others = replace(plan, secrets=plan.shared_secrets)
        jobs.append(_replicated(plan, OTHERS, nodes - 1, pod_template(others, status, metrics=False)))
    job_set = {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "successPolicy": {"operator": "All", "targetReplicatedJobs": [FIRST]},
        "failurePolicy": {
            "maxRestarts": 0,
            # Two generations of pods must not meet.
            "restartStrategy": "BlockingRecreate",
            "rules": [
                {"name": "permanent", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
                {"name": "gang", "action": "RestartJobSetAndIgnoreMaxRestarts"},
            ],
        },
        "replicatedJobs": jobs,
    }
    template = {"metadata": {"labels": labels(plan.config, "trainer")}, "spec": job_set}
    name = runtime_name(plan.config.job.name, plan.spec_hash)
    its = metadata(plan.config, name, "config", plan.spec_hash)
    return ({"apiVersion": API_VERSION, "kind": RUNTIME, "metadata": its, "spec": {"template": template}},)


def runtime_name(job: str, spec_hash: str) -> str:
    """One for each content: a runtime is never changed, and one of an edited spec is not taken for another."""
    return f"{job}-{spec_hash.rpartition(':')[2][:10]}"


def left(job: str, spec_hash: str) -> tuple[tuple[str, str], ...]:
    """The runtime."""
    return ((RUNTIME, runtime_name(job, spec_hash)),)


def _replicated(plan: Plan, name: str, count: int, pod: dict[str, Any]) -> dict[str, Any]:
    pod["spec"]["restartPolicy"] = "Never"
    pod["spec"]["containers"][0]["env"] += _rendezvous(plan, name)
    spec = {
        "completionMode": "Indexed",
        "completions": count,
        "parallelism": count,
        "backoffLimit": 0,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": _PERMANENT}]},
        "template": pod,
    }
    marks = {"labels": labels(plan.config, "trainer")}
    return {"name": name, "replicas": 1, "template": {"metadata": marks, "spec": spec}}


def _rendezvous(plan: Plan, name: str) -> list[dict[str, Any]]:
    """torchrun's variables. A pod of the others counts from 0 too; the launcher adds the offset."""
    job, world = plan.config.job.name, plan.config.topology
    literals = {
        "PET_NNODES": str(world.nodes),
        "PET_NPROC_PER_NODE": str(world.processes_per_node),
        "PET_MASTER_ADDR": f"{job}-{FIRST}-0-0.{job}",
        "PET_MASTER_PORT": str(plan.rendezvous_port),
        names.ENV_NODE_RANK_OFFSET: "0" if name == FIRST else "1",
    }
    index = field_env("PET_NODE_RANK", f"metadata.annotations['{_INDEX}']")
    return [*({"name": key, "value": value} for key, value in literals.items()), index]


def refusal(plan: Plan) -> str | None:
    """JobSet counts the whole name of the longest pod."""
    job, nodes = plan.config.job.name, plan.config.topology.nodes
    longest = f"{job}-{OTHERS}-0-{nodes - 2}-abcde" if nodes > 1 else f"{job}-{FIRST}-0-0-abcde"
    if len(longest) <= NAME_LIMIT:
        return None
    return (
        f".metadata.name: must have at most {NAME_LIMIT - len(longest) + len(job)} characters with backend TrainJob "
        f"and {nodes} nodes, because pods are named after it (found {len(job)}); choose a shorter name"
    )


def suspension(resource_version: str, suspend: bool) -> dict[str, Any]:
    """See Backend."""
    return {"metadata": {"resourceVersion": resource_version}, "spec": {"suspend": suspend}}


def suspended(child: Mapping[str, Any]) -> bool:
    """See Backend."""
    return bool((child.get("spec") or {}).get("suspend"))


def condition(kind: str) -> str:
    """A finished TrainJob is Complete."""
    return "Succeeded" if kind == "Complete" else kind


def seat(pod: Mapping[str, Any], job: str) -> Seat | None:
    """By JobSet's label. Who fails first brings the others down by JobSet's hand, so when they were asked counts."""
    marks = pod["metadata"].get("labels") or {}
    replicated = marks.get(_REPLICATED)
    if replicated is None:
        return None
    index = marks.get(_INDEX, "")
    return Seat(
        role="Master" if replicated == FIRST else "Worker",
        index=int(index) if isinstance(index, str) and index.isdigit() else 0,
        owned=controlled_by(pod["metadata"], "Job", f"{job}-{replicated}-0"),
        ends_peers=True,
    )


def told_by(child: ChildRecord) -> tuple[str, ...]:
    """Pods are refused to the Jobs, Jobs to the JobSet, and the JobSet to the TrainJob."""
    job = child.key.name
    below = [("JobSet", job), ("Job", f"{job}-{FIRST}-0"), ("Job", f"{job}-{OTHERS}-0")]
    named = (f"involvedObject.kind={kind},involvedObject.name={name}" for kind, name in below)
    return (f"involvedObject.uid={child.uid}", *named)


def unmade(reason: str) -> bool:
    """See Backend."""
    return reason.startswith(_UNMADE)


def unseen(message: str) -> bool:
    """Trainer's webhook looks the runtime up in its own memory, which is some milliseconds old."""
    return "must be created before the TrainJob is created" in message
