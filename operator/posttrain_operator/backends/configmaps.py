"""The two ConfigMaps of a job: its TrainerConfig, never changed, and the CA bundle of the status server, which
rotates.
"""

from __future__ import annotations

from typing import Any

from posttrain_api import names
from posttrain_operator.backends.owned import config_name, metadata, owner_reference, status_ca_name
from posttrain_operator.plan.types import Plan

CA_FILE = "ca.crt"
PARENTS_FILE = "parents.json"
"""What the operator knew of the jobs that `fromJob` names; the trainer does not read it."""


def config_map(plan: Plan, parents: str = "") -> dict[str, Any]:
    """The immutable ConfigMap that every pod mounts at CONFIG_DIR. `parents`: kept beside the configuration."""
    kept = {PARENTS_FILE: parents} if parents else {}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(plan.config, config_name(plan.config.job.name), "config", plan.spec_hash),
        "immutable": True,
        "data": {names.CONFIG_FILE: plan.config.to_json(), **kept},
    }


def status_ca(namespace: str, name: str, uid: str, bundle: str) -> dict[str, Any]:
    """The CA bundle for the pods of job `name`: old and new certificates together while they rotate."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": status_ca_name(name),
            "namespace": namespace,
            "labels": {
                names.LABEL_NAME: "posttrain-trainer",
                names.LABEL_MANAGED_BY: names.MANAGED_BY,
                names.LABEL_PART_OF: "posttrain",
                names.LABEL_COMPONENT: "config",
                names.LABEL_JOB_NAME: name,
                names.LABEL_JOB_UID: uid,
            },
            "ownerReferences": [owner_reference(name, uid)],
        },
        "data": {CA_FILE: bundle},
    }
