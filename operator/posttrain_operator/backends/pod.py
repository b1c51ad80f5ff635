"""The pod template of a trainer: one container under the restricted Pod Security Standard, its mounts and its
environment.

Used by every backend. No user's pod template reaches this place: making a job must not equal making a pod.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from posttrain_api import names
from posttrain_operator.backends.configmaps import CA_FILE
from posttrain_operator.backends.owned import config_name, labels, status_ca_name
from posttrain_operator.plan.types import Plan

COMMAND = ("python", "-m", "posttrain_trainer")
TOKEN_SECONDS = 3600
USER = 1000
_CA = f"{names.STATUS_DIR}/{CA_FILE}"
_TOKEN = f"{names.STATUS_DIR}/token"
_STAGING = f"{names.WORK_DIR}/{names.STAGING_DIR}"


@dataclass(frozen=True)
class StatusEndpoint:
    """Where pods report to: the status server's own address, `https://service.namespace.svc:port`."""

    url: str


def pod_template(plan: Plan, status: StatusEndpoint | None, metrics: bool) -> dict[str, Any]:
    """The template of one replica. `metrics`: the master's, which alone is scraped."""
    marks = {names.LABEL_METRICS: "true"} if metrics else {}
    return {
        "metadata": {"labels": {**labels(plan.config, "trainer"), **marks}},
        "spec": {
            **_placement(plan),
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": plan.grace_seconds,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [_container(plan, status, metrics)],
            "volumes": _volumes(plan, status),
        },
    }


def _container(plan: Plan, status: StatusEndpoint | None, metrics: bool) -> dict[str, Any]:
    resources = _resources(plan)
    return {
        "name": names.CONTAINER,
        "image": plan.image,
        "imagePullPolicy": plan.image_pull_policy,
        "command": list(COMMAND),
        "env": pod_env(plan, status),
        "ports": _ports(plan, metrics),
        "resources": {"requests": resources, "limits": resources},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePath": names.TERMINATION_LOG,
        # A launcher that was killed leaves no last word.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": _mounts(plan, status),
    }


def _ports(plan: Plan, metrics: bool) -> list[dict[str, Any]]:
    ports = [{"name": names.RENDEZVOUS_PORT_NAME, "containerPort": plan.rendezvous_port, "protocol": "TCP"}]
    if metrics:
        ports.append({"name": names.METRICS_PORT_NAME, "containerPort": plan.metrics_port, "protocol": "TCP"})
    return ports


def _resources(plan: Plan) -> dict[str, str]:
    wanted = plan.resources
    gpus = {wanted.gpu_resource_name: str(wanted.gpus)} if wanted.gpus else {}
    return {"cpu": wanted.cpu, "memory": wanted.memory, **gpus}


def pod_env(plan: Plan, status: StatusEndpoint | None) -> list[dict[str, Any]]:
    """The plan's environment, then what only a pod knows, then where it reports to (ours and Kubeflow's names for
    it)."""
    literals = {**plan.env, **(_status_env(plan, status) if status else {})}
    return [
        *({"name": name, "value": value} for name, value in literals.items()),
        field_env(names.ENV_POD_NAME, "metadata.name"),
        field_env(names.ENV_NODE_NAME, "spec.nodeName"),
    ]


def field_env(name: str, path: str) -> dict[str, Any]:
    """A variable whose value only the pod knows."""
    return {"name": name, "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": path}}}


def _status_env(plan: Plan, status: StatusEndpoint) -> dict[str, str]:
    job = plan.config.job
    ours = names.STATUS_PATH.format(namespace=job.namespace, name=job.name)
    kubeflow = names.KUBEFLOW_STATUS_PATH.format(namespace=job.namespace, name=job.name)
    return {
        names.ENV_STATUS_URL: status.url + ours,
        names.ENV_STATUS_CA: _CA,
        names.ENV_STATUS_TOKEN: _TOKEN,
        names.ENV_KUBEFLOW_URL: status.url + kubeflow,
        names.ENV_KUBEFLOW_CA: _CA,
        names.ENV_KUBEFLOW_TOKEN: _TOKEN,
    }


def _placement(plan: Plan) -> dict[str, Any]:
    place = plan.placement
    wanted: dict[str, Any] = {
        "nodeSelector": dict(place.node_selector),
        "tolerations": [dict(toleration) for toleration in place.tolerations],
        "priorityClassName": place.priority_class_name,
        "schedulerName": place.scheduler_name,
        "serviceAccountName": place.service_account_name,
        "imagePullSecrets": [{"name": name} for name in place.image_pull_secrets],
    }
    return {field: value for field, value in wanted.items() if value}


def _volumes(plan: Plan, status: StatusEndpoint | None) -> list[dict[str, Any]]:
    name = plan.config.job.name
    return [
        {"name": "config", "configMap": {"name": config_name(name)}},
        {"name": "storage", "persistentVolumeClaim": {"claimName": plan.storage_claim}},
        *({"name": f"claim-{i}", **_claim(claim)} for i, claim in enumerate(_other_claims(plan))),
        *({"name": f"configmap-{i}", "configMap": {"name": item}} for i, item in enumerate(plan.config_maps)),
        *({"name": f"secret-{i}", "secret": {"secretName": item}} for i, item in enumerate(plan.secrets)),
        {"name": "work", "emptyDir": {}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": plan.resources.shared_memory}},
        *([{"name": "staging", "emptyDir": {"medium": "Memory"}}] if _stages_in_memory(plan) else []),
        *([_status_volume(name)] if status else []),
    ]


def _stages_in_memory(plan: Plan) -> bool:
    """On disk the folder is a part of the work volume."""
    return plan.config.checkpoint.staging == "Memory"


def _claim(name: str) -> dict[str, Any]:
    # Read-only is a matter of the mount: a read-only *volume* of a claim that is also mounted to write would clash on
    # a node.
    return {"persistentVolumeClaim": {"claimName": name}}


def _other_claims(plan: Plan) -> list[str]:
    return [claim for claim in plan.claims if claim != plan.storage_claim]


def _status_volume(name: str) -> dict[str, Any]:
    token = {"audience": names.STATUS_AUDIENCE, "expirationSeconds": TOKEN_SECONDS, "path": "token"}
    # Optional: a lost CA bundle must not keep a pod from training; its reports then fail, which disturbs nothing.
    bundle = {"name": status_ca_name(name), "items": [{"key": CA_FILE, "path": CA_FILE}], "optional": True}
    return {"name": "status", "projected": {"sources": [{"serviceAccountToken": token}, {"configMap": bundle}]}}


def _mounts(plan: Plan, status: StatusEndpoint | None) -> list[dict[str, Any]]:
    volumes = {claim: f"claim-{i}" for i, claim in enumerate(_other_claims(plan))} | {plan.storage_claim: "storage"}
    return [
        _read_only("config", names.CONFIG_DIR),
        {"name": "storage", "mountPath": names.STORAGE_DIR},
        *(_read_only(volumes[claim], f"{names.CLAIMS_DIR}/{claim}") for claim in plan.claims),
        *(_read_only(f"configmap-{i}", f"{names.CONFIGMAPS_DIR}/{item}") for i, item in enumerate(plan.config_maps)),
        *(_read_only(f"secret-{i}", f"{names.SECRETS_DIR}/{item}") for i, item in enumerate(plan.secrets)),
        {"name": "work", "mountPath": names.WORK_DIR},
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "shm", "mountPath": "/dev/shm"},
        *([{"name": "staging", "mountPath": _STAGING}] if _stages_in_memory(plan) else []),
        *([_read_only("status", names.STATUS_DIR)] if status else []),
    ]


def _read_only(volume: str, path: str) -> dict[str, Any]:
    return {"name": volume, "mountPath": path, "readOnly": True}
