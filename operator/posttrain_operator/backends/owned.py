"""What every object that we make carries: labels, the owner, and the names of a job's objects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from posttrain_api import names
from posttrain_api.trainer import TrainerConfig


def config_name(job: str) -> str:
    """The immutable ConfigMap with the TrainerConfig."""
    return f"{job}-config"


def status_ca_name(job: str) -> str:
    """The mutable ConfigMap with the CA bundle of the status server."""
    return f"{job}-status-ca"


def labels(config: TrainerConfig, component: str) -> dict[str, str]:
    """Of everything made for a job. `component`: trainer or config."""
    return {
        names.LABEL_NAME: "posttrain-trainer",
        names.LABEL_MANAGED_BY: names.MANAGED_BY,
        names.LABEL_PART_OF: "posttrain",
        names.LABEL_COMPONENT: component,
        names.LABEL_JOB_NAME: config.job.name,
        names.LABEL_JOB_UID: config.job.uid,
        names.LABEL_STAGE: config.stage,
    }


def metadata(config: TrainerConfig, name: str, component: str, spec_hash: str) -> dict[str, Any]:
    """Metadata of an object that the job owns: it is deleted with the job."""
    return {
        "name": name,
        "namespace": config.job.namespace,
        "labels": labels(config, component),
        "annotations": {names.ANNOTATION_SPEC_HASH: spec_hash},
        "ownerReferences": [owner_reference(config.job.name, config.job.uid)],
    }


def owner_reference(name: str, uid: str) -> dict[str, Any]:
    """The job as the controlling owner."""
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "name": name,
        "uid": uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }


def controlled_by(owned: Mapping[str, Any], kind: str, name: str) -> bool:
    """Whether the object with this metadata has the controller `name` of this kind."""
    owners: Iterable[Mapping[str, Any]] = owned.get("ownerReferences") or ()
    return any(o.get("controller") and (o.get("kind"), o.get("name")) == (kind, name) for o in owners)
