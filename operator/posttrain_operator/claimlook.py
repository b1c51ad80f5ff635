"""Looks at claims: the one that a job makes, and those that pods wait for. Used by the observer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from posttrain_api import names
from posttrain_api.reasons import Reason
from posttrain_operator.cluster import Cluster
from posttrain_operator.cluster.kinds import CLAIM
from posttrain_operator.facts import Claimed, Missing


async def claim_of(cluster: Cluster, namespace: str, name: str | None) -> Claimed | None:
    """The claim of this name, None where there is none or none is asked for."""
    found = await cluster.get(CLAIM, namespace, name) if name else None
    return claimed(found) if found else None


async def unbound(cluster: Cluster, namespace: str, wanted: Iterable[str]) -> tuple[Missing, ...]:
    """Of the claims that have no volume yet those whose own Events say why."""
    found = []
    for name in wanted:
        claim = await cluster.get(CLAIM, namespace, name)
        if claim is None or (claim.get("status") or {}).get("phase") == "Bound":
            continue
        events = await cluster.events_about(namespace, f"involvedObject.uid={claim['metadata']['uid']}")
        why = why_unbound(claim, events)
        if why:
            found.append(Missing(Reason.STORAGE_NOT_FOUND, f"{CLAIM.kind} {name} has no volume: {why}"))
    return tuple(found)


def claimed(found: Mapping[str, Any]) -> Claimed:
    """A claim as the API server has it."""
    metadata = found["metadata"]
    marks = metadata.get("labels") or {}
    ours = marks.get(names.LABEL_MANAGED_BY) == names.MANAGED_BY
    owners = [owner["uid"] for owner in metadata.get("ownerReferences") or () if owner.get("controller")]
    return Claimed(
        name=metadata["name"],
        uid=metadata["uid"],
        made_for=str(marks.get(names.LABEL_JOB_NAME, "")) if ours else "",
        owner_uid=owners[0] if owners else None,
        deleting="deletionTimestamp" in metadata,
    )


def why_unbound(claim: Mapping[str, Any], events: Iterable[Mapping[str, Any]]) -> str:
    """The newest warning about a claim, or, where its volume was removed, that. Empty: nothing is wrong yet."""
    if (claim.get("status") or {}).get("phase") == "Lost":
        return "the volume that it was bound to does not exist any more"
    warnings = [event for event in events if event.get("type") == "Warning" and event.get("message")]
    newest = max(warnings, key=lambda event: str(event.get("lastTimestamp") or ""), default=None)
    return str(newest["message"]) if newest else ""
