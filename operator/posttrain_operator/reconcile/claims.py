"""The claim that a job makes for itself: when it is made, whose it may be, and what keeps it from the pods. Pure.

It is made once, before the job starts. One that is gone later is not made again: its checkpoints are gone with it, and
a new, empty one would let the training begin anew in silence.
"""

from __future__ import annotations

import re

from posttrain_api.reasons import Reason
from posttrain_operator.actions import Create, Object
from posttrain_operator.backends import claims
from posttrain_operator.facts import JobFacts, Missing, Observation
from posttrain_operator.plan.types import Plan
from posttrain_operator.records import PodRecord

_OF_VOLUMES = re.compile(r"persistent ?volume|storageclass|volume node affinity", re.IGNORECASE)


def obstacle(job: JobFacts, seen: Observation) -> Missing | None:
    """What has the claim's name and is not for this job, or that the claim is gone."""
    plan = seen.intent.plan
    if plan is None or plan.new_claim is None:
        return None
    found, name = seen.claim, plan.storage_claim
    if found is None and job.has_started:
        message = f"{claims.KIND} {name}, which was made for this job, is gone, and its checkpoints with it; restore it"
        return Missing(Reason.STORAGE_NOT_FOUND, f"{message}, or run the job anew under another name")
    if found is not None and not leaving(job, seen) and found.made_for != job.key.name:
        message = f"a {claims.KIND} named {name} exists and was not made for a job of this name"
        return Missing(Reason.NAME_CONFLICT, f"{message}; name it in storage.claimName, delete it or rename the job")
    return None


def leaving(job: JobFacts, seen: Observation) -> bool:
    """Whether the claim of an earlier job of this name is on its way out."""
    found = seen.claim
    ours = found is not None and found.made_for == job.key.name
    return found is not None and (found.deleting or (ours and found.owner_uid not in (None, job.uid)))


def creation(plan: Plan, seen: Observation) -> tuple[Create, ...]:
    """The claim, where it is not there: what an earlier job of this name has left is used as it is."""
    if plan.new_claim is None or seen.claim is not None:
        return ()
    return (Create(Object.CLAIM, plan.storage_claim, claims.claim(plan)),)


def name_of(job: JobFacts) -> str:
    """The job's claim, as its spec says it."""
    return str((job.spec.get("storage") or {}).get("claimName") or job.key.name)


def waited_for(pod: PodRecord) -> bool:
    """Whether a pod has no node because of a volume."""
    return pod.unschedulable is not None and not pod.ended and _OF_VOLUMES.search(pod.unschedulable) is not None
