"""The Lease (coordination.k8s.io/v1) as a record, and its JSON.

Pure. Its times are for people to read: no decision is made on another machine's clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from posttrain_api import names

API_VERSION, KIND, PLURAL = "coordination.k8s.io/v1", "Lease", "leases"


@dataclass(frozen=True)
class Lease:
    """Who holds it (`holder` "": nobody), for how many seconds after a renewal, and how often the holder changed.

    `version` is the resourceVersion; "" where the object does not exist.
    """

    holder: str = ""
    seconds: int = 0
    transitions: int = 0
    acquired: str = ""
    renewed: str = ""
    version: str = ""

    def says(self) -> Lease:
        """The same without its version: what somebody wrote into it."""
        return replace(self, version="")


def lease_of(found: Mapping[str, Any]) -> Lease:
    """A Lease from its JSON; what is missing counts as empty."""
    spec = found.get("spec") or {}
    return Lease(
        holder=spec.get("holderIdentity") or "",
        seconds=spec.get("leaseDurationSeconds") or 0,
        transitions=spec.get("leaseTransitions") or 0,
        acquired=spec.get("acquireTime") or "",
        renewed=spec.get("renewTime") or "",
        version=found["metadata"]["resourceVersion"],
    )


def manifest(lease: Lease, namespace: str, name: str) -> dict[str, Any]:
    """The JSON to write. The server refuses a duration below 1 and empty times."""
    metadata: dict[str, Any] = {
        "name": name,
        "namespace": namespace,
        "labels": {names.LABEL_MANAGED_BY: names.MANAGED_BY},
    }
    if lease.version:
        metadata["resourceVersion"] = lease.version
    times = {"acquireTime": lease.acquired, "renewTime": lease.renewed}
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": metadata,
        "spec": {
            "holderIdentity": lease.holder,
            "leaseDurationSeconds": max(1, lease.seconds),
            "leaseTransitions": lease.transitions,
            **{key: value for key, value in times.items() if value},
        },
    }


def micro_time(moment: datetime) -> str:
    """As metav1.MicroTime is written: UTC with six digits."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
