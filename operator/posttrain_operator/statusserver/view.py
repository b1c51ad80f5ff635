"""What the status server sees of the rest of the operator: a read-only view of jobs, and the few calls it makes.

The operator's core implements JobsView over its cache, `access` the calls over its Cluster. Nothing here imports the
control loop, so that either can be changed and tested alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from posttrain_api import names
from posttrain_operator.cluster.reviews import TokenIdentity
from posttrain_operator.facts import JobFacts
from posttrain_operator.records import JobRecord


class WriteConflict(Exception):
    """The object changed since it was read (409): read again and try again."""


class ObjectMissing(Exception):
    """The object, or its kind, is not there (404)."""


class WriteRefused(Exception):
    """The API server will never take this body (400, 422, or 500 on a malformed apply): trying again is useless."""


@dataclass(frozen=True)
class JobView:
    """A job as the cache has it. `terminal`: Complete or Failed is True. `progress`: status.progress as last seen.
    `stall_seconds`: after how long a job hangs. `dump`: it stands still, and the stacks of its ranks are wanted."""

    uid: str
    resource_version: str
    terminal: bool
    progress: Mapping[str, Any] | None = None
    stall_seconds: int = names.STALL_SECONDS
    dump: bool = False


def view_of(record: JobRecord) -> JobView:
    """What the status server needs of a job. The wish for stacks is in its status, so every replica has it."""
    job = JobFacts.of(record)
    progress = dict(job.progress) or None
    dump = job.stalled_since is not None
    return JobView(record.uid, record.resource_version, job.terminal, progress, job.stall_seconds, dump)


class JobsView(Protocol):
    """Read-only, from memory: called for every report."""

    async def look(self, namespace: str, name: str, pod: tuple[str, str]) -> None:
        """Before the other two, for a report of a pod (name, uid): brings into memory what is not there. Any error
        means: try again later."""

    def job(self, namespace: str, name: str) -> JobView | None:
        """The job, or None where there is none."""

    def pod_uids(self, namespace: str, name: str) -> frozenset[str]:
        """The pods of the job's current attempt: an old attempt's pod may no longer report."""


class StatusCluster(Protocol):
    """The API calls of the status server. Errors other than the named ones mean: try again later."""

    async def apply_progress(self, namespace: str, name: str, version: str, progress: Mapping[str, Any]) -> None:
        """Applies status.progress at a resourceVersion. WriteConflict, ObjectMissing or WriteRefused."""

    async def read_job(self, namespace: str, name: str) -> JobView | None:
        """The job straight from the API server, for after a conflict."""

    async def review_token(self, token: str, audience: str) -> TokenIdentity | None:
        """TokenReview; None where the token is not valid for the audience."""


class SecretCluster(Protocol):
    """The one Secret that the operator may read and write: its own certificates'."""

    async def read_secret(self, namespace: str, name: str) -> tuple[str, dict[str, bytes]]:
        """(resourceVersion, data). ObjectMissing where the chart did not create it."""

    async def replace_secret(self, namespace: str, name: str, resource_version: str, data: Mapping[str, bytes]) -> None:
        """Writes all of `data`. WriteConflict where another replica was faster."""


class Access(StatusCluster, SecretCluster, Protocol):
    """Everything the status server asks of the API server."""
