"""Every request that changes the cluster has a name, and every one passes the gates.

`Api` is the one place where requests leave the operator; it asks each gate before a write and tells it afterwards. A
gate may refuse (raise) a write: whoever leads may write. The failpoints of the tests are a gate too, which is how a
test enumerates all writes of a job's life without a list kept by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import unquote

_SHARED_KINDS = {"configmaps": ("config", "status-ca")}
"""Kinds of which a job has several objects, with the ends of their names that tell them apart."""


@dataclass(frozen=True)
class Write:
    """One request that changes the cluster."""

    verb: str
    resource: str
    """The plural, with the subresource where there is one: `posttrainingjobs/status`."""
    namespace: str
    name: str
    manager: str = ""
    """The field manager of an apply: two of them write a job's status."""

    def __str__(self) -> str:
        """The same for the same step of any job: verb, resource and, where a job has several, the object's role."""
        roles = _SHARED_KINDS.get(self.resource, ())
        role = next((role for role in roles if self.name.endswith(f"-{role}")), "")
        told = role or (self.manager if self.resource.endswith("/status") else "")
        return f"{self.verb} {self.resource}" + (f" {told}" if told else "")


class Gate(Protocol):
    """What stands between the operator and its writes."""

    def before(self, write: Write) -> None:
        """Called before the request is sent. Raises an ApiError to refuse it."""

    def after(self, write: Write) -> None:
        """Called when the request is over, whatever came of it."""


def write_of(method: str, path: str, body: Any, query: Mapping[str, str] | None = None) -> Write:
    """Reads a request of `cluster.api`: `/api/v1/…` or `/apis/group/version/…`."""
    parts = [unquote(part) for part in path.strip("/").split("/")]
    parts = parts[2:] if parts[0] == "api" else parts[3:]
    namespace, parts = (parts[1], parts[2:]) if len(parts) > 2 and parts[0] == "namespaces" else ("", parts)
    resource = "/".join([parts[0], *parts[2:]])
    name = parts[1] if len(parts) > 1 else _name_in(body)
    return Write(method, resource, namespace, name, (query or {}).get("fieldManager", ""))


def _name_in(body: Any) -> str:
    metadata = body.get("metadata") if isinstance(body, Mapping) else None
    return str(metadata.get("name", "")) if isinstance(metadata, Mapping) else ""
