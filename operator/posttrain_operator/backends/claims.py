"""The PersistentVolumeClaim that is made for a job. Pure.

A claim that is retained has no owner: deleting the job deletes no model. Its labels say whom it was made for; a later
job of the same name uses it again, in a folder of its own.
"""

from __future__ import annotations

from typing import Any

from posttrain_operator.backends.owned import labels, owner_reference
from posttrain_operator.plan.types import Plan

KIND = "PersistentVolumeClaim"


def claim(plan: Plan) -> dict[str, Any]:
    """The claim of a plan that makes one."""
    job, wanted = plan.config.job, plan.new_claim
    assert wanted is not None
    owners = {} if wanted.retain else {"ownerReferences": [owner_reference(job.name, job.uid)]}
    chosen = {"storageClassName": wanted.storage_class_name} if wanted.storage_class_name else {}
    return {
        "apiVersion": "v1",
        "kind": KIND,
        "metadata": {
            "name": plan.storage_claim,
            "namespace": job.namespace,
            "labels": labels(plan.config, "storage"),
            **owners,
        },
        "spec": {
            "accessModes": [wanted.access_mode],
            "resources": {"requests": {"storage": wanted.size}},
            **chosen,
        },
    }
