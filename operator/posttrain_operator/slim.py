"""From whole Kubernetes objects to slim records. Pure; called for every watch event, so it must never raise on a
strange object.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any

from posttrain_api import names
from posttrain_operator import clock
from posttrain_operator.backends import BACKENDS, backend
from posttrain_operator.records import ChildRecord, ConditionRecord, End, JobRecord, Key, PodRecord, Seat, Waiting

Object = Mapping[str, Any]
_METADATA = (
    "name",
    "namespace",
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "deletionTimestamp",
    "labels",
)
_STRANGER = Seat("Worker", 0, owned=False)
_STARTING = frozenset({"ContainerCreating", "PodInitializing", ""})


def job_record(obj: Object) -> JobRecord:
    """A PostTrainingJob."""
    metadata = obj["metadata"]
    spec = obj.get("spec") or {}
    slim = {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {field: metadata[field] for field in _METADATA if field in metadata},
        "spec": spec,
        "status": obj.get("status") or {},
    }
    return JobRecord(
        key=Key(metadata["namespace"], metadata["name"]),
        uid=metadata["uid"],
        resource_version=metadata["resourceVersion"],
        generation=metadata.get("generation", 0),
        deleting="deletionTimestamp" in metadata,
        parents=tuple(sorted(set(_from_jobs(spec)))),
        raw=json.dumps(slim, separators=(",", ":")).encode(),
    )


def _from_jobs(value: Any) -> Iterator[str]:
    """Every `fromJob.name` anywhere in a spec."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key == "fromJob" and isinstance(item, Mapping) and isinstance(item.get("name"), str):
                yield item["name"]
            yield from _from_jobs(item)
    elif isinstance(value, list):
        for item in value:
            yield from _from_jobs(item)


def child_record(obj: Object) -> ChildRecord:
    """A child; of the default kind where it does not say its own."""
    metadata, status = obj["metadata"], obj.get("status") or {}
    its = backend(obj.get("kind"))
    return ChildRecord(
        key=Key(metadata["namespace"], metadata["name"]),
        uid=metadata["uid"],
        resource_version=metadata["resourceVersion"],
        owner_uid=controller_uid(metadata),
        spec_hash=(metadata.get("annotations") or {}).get(names.ANNOTATION_SPEC_HASH, ""),
        suspended=its.suspended(obj),
        deleting="deletionTimestamp" in metadata,
        created=metadata.get("creationTimestamp"),
        conditions={its.condition(c["type"]): _condition(c) for c in status.get("conditions") or ()},
        kind=its.KIND,
    )


def controller_uid(metadata: Object) -> str | None:
    """uid of the controlling owner; None where nobody controls it."""
    owners: Iterable[Object] = metadata.get("ownerReferences") or ()
    return next((str(owner["uid"]) for owner in owners if owner.get("controller")), None)


def _condition(raw: Object) -> ConditionRecord:
    return ConditionRecord(
        raw.get("status", ""), raw.get("reason", ""), raw.get("message", ""), raw.get("lastTransitionTime")
    )


def pod_record(obj: Object) -> PodRecord | None:
    """A pod of ours; None where its labels name no job."""
    metadata, status = obj["metadata"], obj.get("status") or {}
    labels = metadata.get("labels") or {}
    if names.LABEL_JOB_NAME not in labels:
        return None
    conditions = {c["type"]: c for c in status.get("conditions") or ()}
    ready = conditions.get("Ready") or {}
    seat, asked = _seat(obj, labels[names.LABEL_JOB_NAME]), _asked(metadata, status)
    return PodRecord(
        job=Key(metadata["namespace"], labels[names.LABEL_JOB_NAME]),
        job_uid=labels.get(names.LABEL_JOB_UID, ""),
        name=metadata["name"],
        uid=metadata["uid"],
        resource_version=metadata["resourceVersion"],
        role=seat.role,
        index=seat.index,
        phase=status.get("phase", "Pending"),
        created=metadata.get("creationTimestamp"),
        node=(obj.get("spec") or {}).get("nodeName"),
        deleting_since=metadata.get("deletionTimestamp"),
        grace=metadata.get("deletionGracePeriodSeconds"),
        asked=asked,
        asked_at=_asked_at(metadata) if asked and seat.ends_peers else None,
        ready=ready.get("status") == "True",
        ready_since=ready.get("lastTransitionTime"),
        unschedulable=_unschedulable(conditions),
        waiting=_waiting(status),
        end=_end(status),
        pod_reason=status.get("reason", ""),
        pod_message=status.get("message", ""),
        disruption=_disruption(conditions),
        mounted=(conditions.get("PodReadyToStartContainers") or {}).get("status") == "True",
        owned=seat.owned,
    )


def _asked(metadata: Object, status: Object) -> bool:
    """The training-operator deletes failed pods after their end; that has no grace and asks for nothing."""
    alive = status.get("phase") not in ("Succeeded", "Failed")
    return "deletionTimestamp" in metadata and (alive or bool(metadata.get("deletionGracePeriodSeconds")))


def _asked_at(metadata: Object) -> datetime | None:
    """`deletionTimestamp` is the end of the grace."""
    end = clock.parse(metadata.get("deletionTimestamp"))
    return end - timedelta(seconds=metadata.get("deletionGracePeriodSeconds") or 0) if end else None


def _seat(pod: Object, job: str) -> Seat:
    seats = (each.seat(pod, job) for each in BACKENDS.values())
    return next((seat for seat in seats if seat), _STRANGER)


def _unschedulable(conditions: Mapping[str, Object]) -> str | None:
    found = conditions.get("PodScheduled") or {}
    blocked = found.get("status") == "False" and found.get("reason") in ("Unschedulable", "SchedulingGated")
    return str(found.get("message") or found.get("reason")) if blocked else None


def _disruption(conditions: Mapping[str, Object]) -> str:
    found = conditions.get("DisruptionTarget") or {}
    return str(found.get("reason", "")) if found.get("status") == "True" else ""


def _waiting(status: Object) -> Waiting | None:
    for container in [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]:
        waiting = (container.get("state") or {}).get("waiting") or {}
        if waiting.get("reason", "") not in _STARTING:
            return Waiting(waiting["reason"], waiting.get("message", ""))
    return None


def _end(status: Object) -> End | None:
    """The trainer container's end; an End without a code where the pod failed and that container never ended."""
    for container in status.get("containerStatuses") or ():
        terminated = (container.get("state") or {}).get("terminated")
        if container.get("name") == names.CONTAINER and terminated:
            return _terminated(terminated)
    return _before_ours(status) if status.get("phase") == "Failed" else None


def _terminated(raw: Object) -> End:
    return End(
        exit_code=raw.get("exitCode"),
        signal=raw.get("signal"),
        reason=raw.get("reason", ""),
        message=raw.get("message", ""),
        finished_at=raw.get("finishedAt"),
    )


def _before_ours(status: Object) -> End:
    """Of a pod that failed without a word of the trainer's container."""
    for container in status.get("initContainerStatuses") or ():
        terminated = (container.get("state") or {}).get("terminated") or {}
        if terminated.get("exitCode"):
            message = f"init container {container.get('name')} ended with exit code {terminated['exitCode']}"
            return End(message=message, finished_at=terminated.get("finishedAt"), initial=True)
    return End()
