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
    """What the platform decides: images, whether a job that asks for GPUs may run on the CPU, the kind of child, and
    the ports."""

    trainer_image: str
    image_pull_policy: str = "IfNotPresent"
    allow_cpu: bool = False
    backend: str = "PyTorchJob"
    """Kind of the child of a job that does not name one."""
    rendezvous_port: int = 23456
    metrics_port: int = 9464
    storage_dir: str = "/storage"
    claims_dir: str = "/claims"
    configmaps_dir: str = "/etc/posttrain/configmaps"
    secrets_dir: str = "/etc/posttrain/secrets"
    work_dir: str = "/work"


@dataclass(frozen=True)
class Parent:
    """A finished job that `fromJob` names: what its status says. `output` is None where it has failed; then only its
    checkpoint can be gone on with."""

    name: str
    uid: str
    stage: str
    output: Output | None
    checkpoint: Checkpoint | None = None
    """status.checkpoints.last: `checkpoint.from.fromJob` starts at the newest whole one of its folder."""
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
class NewClaim:
    """The claim that is made for a job, named like it. `retain`: it stays when the job is deleted."""

    size: str
    storage_class_name: str | None
    access_mode: str
    retain: bool


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
    new_claim: NewClaim | None
    """What `storage_claim` is made as; None: it is there."""
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
