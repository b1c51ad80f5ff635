"""The Plan: all that follows from a job's spec and the operator's settings, before anything is created.

Built by `plan.build` (pure), read by the backends, by reconcile and by `posttrain run`. It holds no Kubernetes
shapes: a backend
turns it into a child, the command line into local processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from posttrain_api.records import Best, Checkpoint, Output
from posttrain_api.trainer import TrainerConfig


@dataclass(frozen=True)
class PlanSettings:
    """What the platform decides: images, whether a job that asks for GPUs may run on the CPU, and the ports."""

    trainer_image: str
    image_pull_policy: str = "IfNotPresent"
    allow_cpu: bool = False
    rendezvous_port: int = 23456
    metrics_port: int = 9464
    storage_dir: str = "/storage"
    claims_dir: str = "/claims"
    configmaps_dir: str = "/etc/posttrain/configmaps"
    secrets_dir: str = "/etc/posttrain/secrets"
    work_dir: str = "/work"


@dataclass(frozen=True)
class Parent:
    """A finished job that `fromJob` names: what its status says."""

    name: str
    uid: str
    stage: str
    output: Output
    checkpoint: Checkpoint | None = None
    """status.checkpoints.last: where `checkpoint.from.fromJob` starts."""
    best: Best | None = None
    """status.checkpoints.best: what `fromJob: {checkpoint: Best}` means."""
    resolved: Mapping[str, Any] = field(default_factory=dict)
    """status.resolved: what its adapter was trained on, and the adapter's shape."""


@dataclass(frozen=True)
class Resources:
    """Per pod; requests equal limits. Quantities are Kubernetes strings ("8", "64Gi")."""

    cpu: str
    memory: str
    gpus: int
    gpu_resource_name: str
    shared_memory: str


@dataclass(frozen=True)
class Placement:
    """Where pods may run, as the spec says it."""

    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, Any], ...] = ()
    priority_class_name: str | None = None
    scheduler_name: str | None = None
    service_account_name: str | None = None
    image_pull_secrets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """One job, resolved. `claims`, `config_maps` and `secrets` are what the pods mount (all read-only but
    `storage_claim`)."""

    config: TrainerConfig
    image: str
    image_pull_policy: str
    resources: Resources
    placement: Placement
    storage_claim: str
    claims: tuple[str, ...]
    config_maps: tuple[str, ...]
    secrets: tuple[str, ...]
    """In the first pod, which fetches."""
    shared_secrets: tuple[str, ...]
    """Of these what every pod mounts."""
    env: Mapping[str, str]
    """The user's literals and what the trainer needs; without what only a pod knows (its name, its node)."""
    rendezvous_port: int
    metrics_port: int
    grace_seconds: int
    resolved: Mapping[str, Any]
    """status.resolved: effective values under the spec's own names, "Auto" where prepare decides."""
    spec_hash: str
    """Of everything above: a ConfigMap or child with another hash was made from another spec."""
